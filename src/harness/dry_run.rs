//! Plans a run without measuring: variants, downloads and memory, from the plan and the hub's answers. No weights are read.

use anyhow::Result;

use super::case::{Case, PromptChoice, Variant};
use super::checks::{self, Chosen};
use super::environment::too_many_threads;
use super::estimate::{self, Work};
use super::measurement_protocol::MeasurementProtocol;
use super::open_model;
use super::prompt::{self, DEFAULT_PICTURE_TEXT, DEFAULT_TEXT, Words};
use super::quality;
use super::room::{MemoryBudget, free_bytes};
use super::stopping::MIN_SPREAD_REPEATS;
use crate::engine::needs::Needs;
use crate::engine::{self, Device, Engine};
use crate::events::Listener;
use crate::kernels::cpu::pool::default_threads;
use crate::kernels::nvml::Gpu;
use crate::os::memory::ProcessMemory;
use crate::report::dry_run::{self, DryRun, File};
use crate::weights::{self, Surveyed};

/// Fails on input that cannot be used, as the run itself would.
pub fn dry_run(case: &Case, events: &dyn Listener) -> Result<DryRun> {
    let Chosen { device, warning } = checks::check(case)?;
    let threads = if case.threads == 0 { default_threads() } else { case.threads };
    let too_many = too_many_threads(threads).filter(|_| device == Device::Cpu);
    warning.into_iter().chain(too_many).for_each(|warning| events.on(warning.event()));
    let Surveyed { checkpoint, files } = weights::survey(&case.model, events)?;
    let mut model = open_model::build(&checkpoint, &case.model, events)?;
    if checkpoint.has_weights() {
        // Fails where the files lack a tensor of the model.
        checkpoint.source_with(&model.matrices, &model.vectors, events)?;
    }
    open_model::select(&mut model, &checkpoint, &case.selection())?;
    let case = &checks::as_saved(case, &checkpoint)?;
    checks::check_engines(case)?;
    checks::on_device(case, device)?;
    if case.has(Engine::Candle) {
        engine::candle::check(&model, &checkpoint.config)?;
    }
    let tokenizer_comes = files.iter().any(|file| file.name == "tokenizer.json" && !file.is_cached);
    let bound = bounded(case).filter(|_| tokenizer_comes);
    case.quality.as_ref().map(|_| quality::check(&checkpoint, tokenizer_comes)).transpose()?;
    let workload = prompt::workload(bound.as_ref().unwrap_or(case), Words::of(&checkpoint), &model)?;
    // Whether the picture can be read.
    open_model::pixels(&model, &checkpoint, &workload.task.encode)?;
    let room = MemoryBudget::new(case, (&model, &workload), device)?;
    let n_gen = estimate::n_gen(case, &Work::new(&room, &model, &workload, threads));
    // A shorter workload needs less of everything.
    let case = &Case { n_gen, ..case.clone() };
    let bound = bound.map(|bound| Case { n_gen, ..bound });
    let workload = prompt::workload(bound.as_ref().unwrap_or(case), Words::of(&checkpoint), &model)?;
    let (room, free_bytes) = (MemoryBudget::new(case, (&model, &workload), device)?, free_bytes(device));
    let seconds = Work::new(&room, &model, &workload, threads).seconds(n_gen, &case.protocol);
    let rows = case.variants().iter().zip(&room.needs).map(|(of, needs)| row(of, *needs, free_bytes)).collect();
    Ok(DryRun {
        model: checkpoint.id.clone(),
        revision: checkpoint.revision.clone(),
        architecture: model.architecture.to_owned(),
        parameters: model.parameters() as u64,
        weights: checkpoint.source_kind().name().to_owned(),
        device: match device {
            Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
            Device::Cpu => "cpu".to_owned(),
        },
        threads,
        workload: workload.recorded(),
        n_prompt_is_a_bound: bound.is_some(),
        order: room.order().name().to_owned(),
        repeats: repeats(&case.protocol),
        seconds: Some(seconds.round()),
        takes: estimate::about(seconds),
        quality: case.quality.as_ref().map(|choice| choice.describe()),
        card_bytes: None,
        download_bytes: files.iter().filter(|file| !file.is_cached).filter_map(|file| file.bytes).sum(),
        files: files.into_iter().map(|f| File { name: f.name, bytes: f.bytes, is_cached: f.is_cached }).collect(),
        rows,
        free_bytes,
        total_bytes: total_bytes(device),
    })
}

/// The case with as many synthetic ids as its text has bytes, and one for the beginning; `None` for a prompt that is no text. A
/// token covers at least one byte.
pub fn bounded(case: &Case) -> Option<Case> {
    let bytes = match &case.prompt {
        PromptChoice::Text(text) => text.len(),
        PromptChoice::Texts(texts) => texts.iter().map(String::len).min().unwrap_or(0),
        PromptChoice::Default => DEFAULT_TEXT.len().max(DEFAULT_PICTURE_TEXT.len()),
        PromptChoice::Synthetic(_) | PromptChoice::Ids(_) => return None,
    };
    Some(Case { prompt: PromptChoice::Synthetic(bytes + 1), ..case.clone() })
}

/// Memory that one worker holds, and whether that is free.
fn row(variant: &Variant, needs: Needs, free_bytes: Option<u64>) -> dry_run::WorkerRow {
    dry_run::WorkerRow {
        engine: variant.engine_name().to_owned(),
        precision: variant.precision(),
        weights_bytes: needs.weights_bytes,
        kv_cache_bytes: needs.kv_cache_bytes,
        scratch_bytes: needs.scratch_bytes,
        context_bytes: needs.context_bytes,
        fits: free_bytes.map(|free| needs.bytes() <= free),
        fits_card: None,
    }
}

/// All memory of the device: the machine's, or the GPU's.
fn total_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(ordinal) => Gpu::open(ordinal)?.memory_bytes().map(|(_, total)| total),
        Device::Cpu => ProcessMemory::default().total_bytes(),
    }
}

fn repeats(protocol: &MeasurementProtocol) -> String {
    match protocol.repeats {
        Some(n) => format!("{n} repeats of each precision"),
        None => format!(
            "{} or more repeats of each precision until the interval is narrow, for {} to {} s, and never fewer than {}",
            protocol.min_repeats, protocol.min_time_s, protocol.max_time_s, MIN_SPREAD_REPEATS
        ),
    }
}
