//! What each precision of a case costs in quality, in worker processes of their own: nothing here touches what a run
//! measures.

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::measure::{Encode, Task};
use super::process::ProcessWorker;
use super::prompt::{self, Workload};
use super::protocol::{Failure, Job, Share};
use super::schedule::Worker;
use super::scoring::{Greedy, LogitsFile, Scored, Scoring};
use super::worker::Opened;
use super::{Case, Row, modules, room};
use crate::engine::OutlierColumns;
use crate::error::BadInput;
use crate::events::{Event, Listener, Unit};
use crate::plan::{EncoderInputKind, Model};
use crate::quality::cost::TokenCost;
use crate::quality::windows::{self, Window};
use crate::quality::{CallPath, pass, rows, summary, text};
use crate::quant::{self, FormatId, fp32};
use crate::record::{self, Record};
use crate::weights::policy::Selection;
use crate::weights::{Checkpoint, SourceKind};

/// Tokens of the text where the user does not say.
pub const DEFAULT_TOKENS: usize = 512;

/// A greedy text is this long, behind a quarter of it, where the text is long enough.
const GREEDY_TOKENS: usize = 64;

/// The reference's weights: the checkpoint's own values, which fp16 may not hold.
const REFERENCE_PRECISION: FormatId = fp32::ID;

/// What records call it.
const REFERENCE: &str = "the checkpoint's values in fp32 compute on the cpu";

/// What quality is measured on.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct QualityChoice {
    /// Name and content; `None`: the built-in sample.
    pub text: Option<(String, String)>,
    /// Tokens of the text at most, at least 2.
    pub n_tokens: usize,
    /// `None`: by precision, [`CallPath::usual`].
    pub path: Option<CallPath>,
    /// Also with one part of the model quantized at a time.
    pub by_module: bool,
}

/// Fails with [`BadInput`] where the quality of a checkpoint cannot be measured. `tokenizer_comes` says that one is still to be downloaded.
pub fn check(checkpoint: &Checkpoint, tokenizer_comes: bool) -> Result<(), BadInput> {
    let refused =
        |reason: String, hint: &str| Err(BadInput::new(format!("no quality can be measured: {reason}")).hint(hint));
    if checkpoint.source_kind() == SourceKind::Random {
        return refused("random weights predict nothing".to_owned(), "name a folder or a hub id with `--model-id`");
    }
    if let Some(quantized) = &checkpoint.quantized {
        let reason =
            format!("the weights were saved in `{}`, and what they were made from is not here", quantized.precision);
        return refused(reason, "name the model that they were made from with `--model-id`");
    }
    if checkpoint.tokenizer.is_none() && !tokenizer_comes {
        let reason = format!("`{}` has no tokenizer here, so a text cannot become tokens", checkpoint.id);
        return refused(reason, "put tokenizer.json beside the weights");
    }
    Ok(())
}

impl QualityChoice {
    /// For a dry run.
    pub fn describe(&self) -> String {
        let text = self.text.as_ref().map_or(text::SAMPLE_NAME, |(name, _)| name.as_str());
        format!("at most {} tokens of `{text}`", self.n_tokens)
    }
}

/// A text as the ids that every precision is scored on.
pub struct Passage {
    name: String,
    encode: Encode,
    n_encoder: usize,
    prefix: Vec<u32>,
    tokens: Vec<u32>,
    windows: Vec<Window>,
    greedy: Greedy,
}

/// What one precision gave.
pub struct Measured {
    pub costs: Vec<TokenCost>,
    greedy_ids: Vec<u32>,
    path: CallPath,
    outliers: OutlierColumns,
}

impl Measured {
    /// LLM.int8's outlier columns over all columns that it looked through.
    pub fn outlier_share(&self) -> Option<f64> {
        let OutlierColumns { columns, examined, .. } = self.outliers;
        (examined > 0).then(|| columns as f64 / examined as f64)
    }
}

impl Passage {
    /// The ids of the text, cut to windows that the context and the bound of the reference's file allow. Fails where they
    /// hold no token to score, and as [`check`] does.
    pub fn new(choice: &QualityChoice, opened: &Opened, workload: &Workload) -> Result<Self> {
        let (model, checkpoint) = (&opened.model, &opened.checkpoint);
        check(checkpoint, false)?;
        let tokenizer = checkpoint.tokenizer.as_ref().context("a tokenizer, which was checked for")?;
        let sample = || (text::SAMPLE_NAME.to_owned(), text::SAMPLE.to_owned());
        let (name, text) = choice.text.clone().unwrap_or_else(sample);
        let input = model.encoder.as_ref().map(|encoder| encoder.input);
        // A caption goes on where the prompt ends.
        let adds_special = !matches!(input, Some(EncoderInputKind::Picture(_)));
        let mut tokens = prompt::encode(tokenizer, &text, adds_special)?;
        tokens.truncate(choice.n_tokens);
        prompt::check_vocabulary(&tokens, false, model)?;
        let prefix = match input {
            Some(EncoderInputKind::Picture(_)) => workload.task.prompt.clone(),
            Some(EncoderInputKind::Tokens) => {
                tokens.insert(0, model.decoder_start.unwrap_or(0));
                Vec::new()
            }
            None => Vec::new(),
        };
        let room = model.context.saturating_sub(prefix.len());
        let length = windows::MAX_LENGTH.min(rows::max_rows(model.vocab)).min(room);
        let windows = if length < 2 { Vec::new() } else { windows::windows(tokens.len(), length, !prefix.is_empty()) };
        if windows.is_empty() {
            let message = format!("the text `{name}` has {} tokens, and a context of {room} is left", tokens.len());
            return Err(BadInput::new(message).hint("at least 2 tokens are needed").into());
        }
        let longest = windows[0].end;
        let n_prompt = longest.min(GREEDY_TOKENS / 4);
        let greedy = Greedy { n_prompt, n_gen: (length - n_prompt).min(GREEDY_TOKENS) };
        let (encode, n_encoder) = (workload.task.encode.clone(), workload.n_encoder);
        Ok(Self { name, encode, n_encoder, prefix, tokens, windows, greedy })
    }

    /// Fills the `quality` of every record that is ok, precision by precision, and tells those that failed.
    pub fn measure(
        &self,
        case: &Case,
        (share, model): (Share, &Model),
        records: &mut [Record],
        events: &dyn Listener,
    ) -> Result<Vec<Failed>> {
        let folder = tempfile::Builder::new().prefix("quantbench-").tempdir()?;
        let mut reference = Reference { passage: self, case, share, model, folder, worker: None, held: None };
        let total = case.precisions.len() as u64;
        events.on(Event::Begin { label: "quality".to_owned(), total, unit: Unit::Runs });
        let mut outcomes = Vec::new();
        for (at, precision) in case.precisions.iter().copied().enumerate() {
            let runs = records[at].status == record::Status::Ok;
            outcomes.push(runs.then(|| self.of_precision(&mut reference, precision, &case.selection())));
            events.on(Event::Progress { done: at as u64 + 1 });
        }
        events.on(Event::End);
        let fp16 = case
            .precisions
            .iter()
            .position(|precision| *precision == quant::BASELINE)
            .and_then(|at| outcomes[at].as_ref()?.as_ref().ok());
        let fp16 = fp16.map(|measured| measured.costs.as_slice());
        let mut failed = Vec::new();
        for ((record, outcome), at) in records.iter_mut().zip(&outcomes).zip(0..) {
            match outcome {
                None => {}
                Some(Ok(measured)) => record.quality = self.summary(measured, fp16, &reference),
                Some(Err(failure)) => failed.push(Failed { at, failure: failure.clone() }),
            }
        }
        if case.quality.as_ref().is_some_and(|choice| choice.by_module) {
            modules::measure(&mut reference, records, events);
        }
        Ok(failed)
    }

    /// One precision, or one selection of the matrices at it.
    pub fn of_precision(
        &self,
        reference: &mut Reference,
        precision: FormatId,
        selection: &Selection,
    ) -> Result<Measured, Failure> {
        let path = reference.case.quality.as_ref().and_then(|choice| choice.path).unwrap_or(CallPath::usual(precision));
        let mut worker: Option<ProcessWorker> = None;
        let (costs, greedy_ids, outliers) = (Vec::new(), Vec::new(), OutlierColumns::default());
        let mut measured = Measured { costs, greedy_ids, path, outliers };
        for (at, _) in self.windows.iter().enumerate() {
            // The reference first: where one window is all, it is gone before the precision loads.
            let logits = LogitsFile::Compare(reference.file_of(at)?);
            let worker = match &mut worker {
                Some(worker) => worker,
                none => {
                    let model = (reference.case, reference.model);
                    none.insert(self.worker(model, precision, reference.share, selection.clone())?)
                }
            };
            let Scored { costs, greedy_ids, outliers } = worker.score(self.scoring(at, path, logits))?;
            measured.costs.extend(costs);
            measured.greedy_ids.extend(greedy_ids);
            measured.outliers = outliers;
        }
        Ok(measured)
    }

    fn scoring(&self, at: usize, path: CallPath, logits: LogitsFile) -> Scoring {
        let Window { start, first, end } = self.windows[at];
        Scoring {
            prefix: self.prefix.clone(),
            tokens: self.tokens[start..end].to_vec(),
            first: first - start,
            path,
            logits,
            greedy: if at == 0 { self.greedy } else { Greedy::default() },
        }
    }

    /// A loaded worker whose cache holds the longest window.
    fn worker(
        &self,
        (case, model): (&Case, &Model),
        precision: FormatId,
        share: Share,
        selection: Selection,
    ) -> Result<ProcessWorker, Failure> {
        let longest = self.windows[0].end.max(self.greedy.n_prompt + self.greedy.n_gen);
        let (encode, prompt) = (self.encode.clone(), vec![0; self.prefix.len() + longest]);
        let task = Task { encode, prompt, n_gen: 1, ..Task::default() };
        let workload = Workload { task, n_prompt: longest, n_image: 0, n_encoder: self.n_encoder };
        let mut selected = model.clone();
        // Patterns were checked when the model was opened.
        let _ = selection.apply(&mut selected.matrices);
        let needed_bytes = room::needs(case, &Row::own(precision), (&selected, &workload), share.device)
            .map_err(|error| Failure::of(&error))?
            .bytes();
        let job = Job { save_logits: None, selection, ..Job::new(case, &Row::own(precision), share, &workload) };
        let mut worker = ProcessWorker::new(job, needed_bytes, case.protocol.deadline);
        worker.load(&crate::events::Silent)?;
        Ok(worker)
    }

    fn summary(
        &self,
        measured: &Measured,
        fp16: Option<&[TokenCost]>,
        reference: &Reference,
    ) -> Option<record::Quality> {
        let found = summary::summarize(&measured.costs)?;
        let ratio = fp16.and_then(|fp16| summary::perplexity_ratio(&measured.costs, fp16));
        let ci95 = ratio.and_then(|ratio| ratio.ci95);
        let departs_at =
            reference.held.as_ref().and_then(|held| pass::departure(&held.greedy_ids, &measured.greedy_ids));
        Some(record::Quality {
            reference: REFERENCE.to_owned(),
            path: measured.path.name().to_owned(),
            text: self.name.clone(),
            n_tokens: found.n_tokens as u64,
            n_windows: self.windows.len() as u64,
            window_tokens: self.windows[0].end as u64,
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
            greedy_tokens: self.greedy.n_gen as u64,
            greedy_departs_at: departs_at.map(|at| at as u64),
            outlier_share: measured.outlier_share(),
            modules: Vec::new(),
            suggested_keep_fp16: Vec::new(),
        })
    }
}

/// A precision whose quality is not known.
pub struct Failed {
    /// Index into the case's precisions.
    pub at: usize,
    pub failure: Failure,
}

/// The worker that writes the reference's logits, one window's file at a time.
pub struct Reference<'a> {
    pub passage: &'a Passage,
    pub case: &'a Case,
    pub share: Share,
    pub model: &'a Model,
    /// Removed with all that it holds when this goes.
    folder: TempDir,
    worker: Option<ProcessWorker>,
    held: Option<Held>,
}

/// What the file holds now.
struct Held {
    window: usize,
    /// Of the first window.
    greedy_ids: Vec<u32>,
}

impl Reference<'_> {
    /// The file with the logits of a window, computed where it holds another one.
    fn file_of(&mut self, window: usize) -> Result<std::path::PathBuf, Failure> {
        let path = self.folder.path().join("reference.logits");
        if self.held.as_ref().is_some_and(|held| held.window == window) {
            return Ok(path);
        }
        let (passage, model) = (self.passage, (self.case, self.model));
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => {
                let share = Share { device: super::DeviceChoice::Cpu, ..self.share };
                let loaded = passage.worker(model, REFERENCE_PRECISION, share, Selection::Usual);
                none.insert(loaded.map_err(|failure| failure.within("the fp32 reference"))?)
            }
        };
        // Gone until the new one is whole.
        let known = self.held.take().map(|held| held.greedy_ids).filter(|_| window > 0);
        let scored = worker.score(passage.scoring(window, CallPath::Prefill, LogitsFile::Write(path.clone())));
        let scored = scored.map_err(|failure| failure.within("the fp32 reference"))?;
        self.held = Some(Held { window, greedy_ids: known.unwrap_or(scored.greedy_ids) });
        if passage.windows.len() == 1 {
            self.worker = None;
        }
        Ok(path)
    }
}
