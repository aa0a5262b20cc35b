//! One variant against the reference, and the numbers for its record.

use super::reference::ReferenceWorker;
use crate::engine::{Engine, OutlierColumns};
use crate::harness::scoring;
use crate::harness::worker_process::ProcessWorker;
use crate::ipc::failure_of;
use crate::protocol::Failure;
use crate::quality::cost::TokenCost;
use crate::quality::{CallPath, pass, summary};
use crate::quant::FormatId;
use crate::record;
use crate::weights::policy::Selection;

/// Name of the reference in records.
const REFERENCE: &str = "the checkpoint's values in fp32 compute on the cpu";

/// The scores of one variant.
pub struct Scores {
    pub costs: Vec<TokenCost>,
    greedy_ids: Vec<u32>,
    path: CallPath,
    outliers: OutlierColumns,
}

impl Scores {
    /// LLM.int8's outlier columns over all columns that it looked through.
    pub fn outlier_share(&self) -> Option<f64> {
        let OutlierColumns { columns, examined, .. } = self.outliers;
        (examined > 0).then(|| columns as f64 / examined as f64)
    }
}

/// Scores one precision of our own engines, or one selection of the matrices at it.
pub fn score_own(
    reference: &mut ReferenceWorker,
    engine: (Engine, FormatId),
    selection: &Selection,
) -> Result<Scores, Failure> {
    let (text, model, assignment) = (reference.text, (reference.case, reference.model), reference.assignment);
    score(reference, Some(engine.1), &|| text.worker(model, engine, assignment, selection.clone()))
}

/// Scores what `start` loads. `precision` is what our own engine would call it, where that is known.
pub fn score(
    reference: &mut ReferenceWorker,
    precision: Option<FormatId>,
    start: &dyn Fn() -> Result<ProcessWorker, Failure>,
) -> Result<Scores, Failure> {
    let (text, case) = (reference.text, reference.case);
    let usual = precision.map_or(CallPath::Prefill, CallPath::usual);
    let path = case.quality.as_ref().and_then(|choice| choice.path).unwrap_or(usual);
    let mut worker: Option<ProcessWorker> = None;
    let (costs, greedy_ids, outliers) = (Vec::new(), Vec::new(), OutlierColumns::default());
    let mut scores = Scores { costs, greedy_ids, path, outliers };
    for (at, _) in text.windows.iter().enumerate() {
        // The reference first: where one window is all, it is gone before the precision loads.
        let expected = reference.file_of(at)?;
        let worker = match &mut worker {
            Some(worker) => worker,
            none => none.insert(start()?),
        };
        let measured = reference.measured_file();
        let score = text.score(at, path, measured.clone());
        let (tokens, first) = (score.tokens.clone(), score.first);
        scores.outliers = worker.score(&score)?;
        if let Some(run) = text.greedy_run(at) {
            scores.greedy_ids = worker.generate(&run)?;
        }
        let costs = scoring::compare(&expected, &measured, &tokens, first).map_err(|error| failure_of(&error))?;
        scores.costs.extend(costs);
    }
    Ok(scores)
}

/// The numbers for a record; `None` where no token was scored. `fp16` are the costs of fp16 for the ratio of perplexities.
pub fn summary(scores: &Scores, fp16: Option<&[TokenCost]>, reference: &ReferenceWorker) -> Option<record::Quality> {
    let text = reference.text;
    let found = summary::summarize(&scores.costs)?;
    let ratio = fp16.and_then(|fp16| summary::perplexity_ratio(&scores.costs, fp16));
    let ci95 = ratio.and_then(|ratio| ratio.ci95);
    let departs_at = reference.greedy_ids().and_then(|ids| pass::departure(ids, &scores.greedy_ids));
    Some(record::Quality {
        reference: REFERENCE.to_owned(),
        path: scores.path.name().to_owned(),
        text: text.name.clone(),
        n_tokens: found.n_tokens as u64,
        n_windows: text.windows.len() as u64,
        window_tokens: text.windows[0].end as u64,
        nll_mean: found.nll_mean,
        reference_nll_mean: found.reference_nll_mean,
        perplexity: found.perplexity,
        perplexity_ratio: ratio.map(|ratio| ratio.ratio),
        perplexity_ratio_ci95_low: ci95.map(|(low, _)| low),
        perplexity_ratio_ci95_high: ci95.map(|(_, high)| high),
        kl_mean: found.kl_mean,
        kl_mean_half_width: found.kl_mean_half_width,
        kl_median: found.kl_median,
        kl_p99: found.kl_p99,
        top1_agreement: found.top1_agreement,
        logit_error_max: found.logit_error_max,
        greedy_tokens: text.greedy.n_gen as u64,
        greedy_departs_at: departs_at.map(|at| at as u64),
        outlier_share: scores.outlier_share(),
        modules: Vec::new(),
        suggested_keep_fp16: Vec::new(),
    })
}
