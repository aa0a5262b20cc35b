//! What a run would do, download and need, from the plan and the hub's answers: no weights are read and nothing is measured.

use anyhow::Result;

use super::memory::ProcessMemory;
use super::prompt::{self, DEFAULT_PICTURE_TEXT, DEFAULT_TEXT, Workload};
use super::{Case, DeviceChoice, PromptChoice, Protocol, Row, checks, doctor, parent, quality, worker};
use crate::engine::{self, Engine};
use crate::events::Listener;
use crate::kernels::cpu::pool::default_threads;
use crate::plan::{Model, Plan, Rows};
use crate::report::dry_run::{self, DryRun, File};
use crate::weights::{self, Surveyed};

/// Fails on input that cannot be used, as the run itself would.
pub fn dry_run(case: &Case, events: &dyn Listener) -> Result<DryRun> {
    let device = checks::check(case)?;
    let Surveyed { checkpoint, files } = weights::survey(&case.model, events)?;
    let mut model = worker::build(&checkpoint, &case.model.model_id)?;
    worker::select(&mut model, &checkpoint, &case.selection())?;
    let case = &checks::in_own_precision(case, checkpoint.quantized.as_ref())?;
    checks::check_engines(case)?;
    if case.engines.contains(&Engine::Candle) {
        engine::candle::check(&model, &checkpoint.config)?;
    }
    let tokenizer_comes = files.iter().any(|file| file.name == "tokenizer.json" && !file.is_cached);
    let bound = bounded(case).filter(|_| tokenizer_comes);
    case.quality.as_ref().map(|_| quality::check(&checkpoint, tokenizer_comes)).transpose()?;
    let workload = prompt::workload(bound.as_ref().unwrap_or(case), checkpoint.tokenizer.as_ref(), &model)?;
    // Whether the picture can be read.
    worker::pixels(&model, &checkpoint, &workload.task.encode)?;
    let free_bytes = free_bytes(device);
    let of_row = |row: &Row| needs(case, row, (&model, &workload), device, free_bytes);
    let rows: Vec<dry_run::Row> = case.rows().iter().map(of_row).collect::<Result<_>>()?;
    let needs: Vec<u64> = rows.iter().map(dry_run::Row::bytes).collect();
    Ok(DryRun {
        model: checkpoint.id.clone(),
        revision: checkpoint.revision.clone(),
        architecture: model.architecture.to_owned(),
        parameters: model.parameters() as u64,
        weights: checkpoint.source_kind().name().to_owned(),
        device: match device {
            DeviceChoice::Cuda(ordinal) => format!("cuda:{ordinal}"),
            DeviceChoice::Cpu | DeviceChoice::Auto => "cpu".to_owned(),
        },
        threads: if case.threads == 0 { default_threads() } else { case.threads },
        workload: parent::workload_facts(&workload),
        n_prompt_is_a_bound: bound.is_some(),
        order: parent::order(device, &needs, free_bytes).name().to_owned(),
        repeats: repeats(&case.protocol),
        quality: case.quality.as_ref().map(|choice| choice.describe()),
        card_bytes: None,
        download_bytes: files.iter().filter(|file| !file.is_cached).filter_map(|file| file.bytes).sum(),
        files: files.into_iter().map(|f| File { name: f.name, bytes: f.bytes, is_cached: f.is_cached }).collect(),
        rows,
        free_bytes,
    })
}

/// The case with so many synthetic ids as its text has bytes, and one for the beginning; `None` where its prompt is no text. A
/// token stands for a byte at least.
fn bounded(case: &Case) -> Option<Case> {
    let bytes = match &case.prompt {
        PromptChoice::Text(text) => text.len(),
        PromptChoice::Default => DEFAULT_TEXT.len().max(DEFAULT_PICTURE_TEXT.len()),
        PromptChoice::Synthetic(_) | PromptChoice::Ids(_) => return None,
    };
    Some(Case { prompt: PromptChoice::Synthetic(bytes + 1), ..case.clone() })
}

/// What one worker holds, by the sizes that the engines themselves work with.
fn needs(
    case: &Case,
    row: &Row,
    (model, workload): (&Model, &Workload),
    device: DeviceChoice,
    free_bytes: Option<u64>,
) -> Result<dry_run::Row> {
    let n_prompt = workload.task.prompt.len().max(workload.task.depth.len());
    let encoder = model.encoder.as_ref().map_or(0, |encoder| activation_bytes(&encoder.plan, workload.n_encoder));
    let mut needs = dry_run::Row {
        engine: row.engine.name().to_owned(),
        precision: row.precision.clone(),
        weights_bytes: worker::stored_bytes(model, &row.precision, case.format_options)?,
        // Keys and values are fp16 on a GPU.
        kv_cache_bytes: worker::cache_bytes(model, workload) / if device == DeviceChoice::Cpu { 1 } else { 2 },
        scratch_bytes: activation_bytes(&model.decoder, n_prompt) + encoder,
        fits: None,
        fits_card: None,
    };
    needs.fits = free_bytes.map(|free| needs.bytes() <= free);
    Ok(needs)
}

/// Buffers of a call of `rows` rows, fp32.
fn activation_bytes(plan: &Plan, rows: usize) -> u64 {
    let slots = plan.storage().slots;
    let floats = slots.iter().map(|slot| slot.width * if slot.rows == Rows::Tokens { rows } else { 1 });
    4 * floats.sum::<usize>() as u64
}

/// Of the machine, or all of the GPU: to ask for its free memory would take some of it.
fn free_bytes(device: DeviceChoice) -> Option<u64> {
    match device {
        DeviceChoice::Cuda(ordinal) => doctor::gpu_bytes(ordinal),
        DeviceChoice::Cpu | DeviceChoice::Auto => ProcessMemory::default().room_bytes(),
    }
}

fn repeats(protocol: &Protocol) -> String {
    match protocol.repeats {
        Some(n) => format!("{n} repeats of each precision"),
        None => format!(
            "at least {} repeats and {} s of each precision, at most {} s",
            protocol.min_repeats, protocol.min_time_s, protocol.max_time_s
        ),
    }
}
