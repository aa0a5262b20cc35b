//! What is refused before anything long starts.

use anyhow::Result;

use super::{Asked, Case, DeviceChoice, logits};
use crate::engine::Engine;
use crate::error::BadInput;
use crate::quant::{self, FormatOptions};
use crate::weights::bnb::PreQuantized;

/// The checks that need no model; what is wrong is said before anything is downloaded.
pub fn check(case: &Case) -> Result<DeviceChoice> {
    check_precisions(case)?;
    check_engines(case)?;
    let device = device(case.device)?;
    let rows = case.rows();
    for (row, path) in rows.iter().flat_map(|row| case.save_logits.iter().map(move |path| (row, path))) {
        logits::check_writable(&logits::path_of(path, &row.label(), rows.len()))?;
    }
    Ok(device)
}

fn check_precisions(case: &Case) -> Result<(), BadInput> {
    let known = || quant::FORMATS.iter().map(|entry| format!("`{}`", entry.name)).collect::<Vec<_>>().join(", ");
    if case.precisions.is_empty() {
        return Err(BadInput::new("no precision is asked for").hint(format!("known are {}", known())));
    }
    match case.precisions.iter().find(|name| quant::find(name).is_none()) {
        Some(name) => Err(BadInput::new(format!("unknown precision `{name}`")).hint(format!("known are {}", known()))),
        None => Ok(()),
    }
}

/// candle-transformers runs one precision: where quantized ones are asked for by name, our own engine must be there for them.
pub fn check_engines(case: &Case) -> Result<(), BadInput> {
    if !case.engines.contains(&Engine::Candle) {
        return Ok(());
    }
    let runs = |precision: &&String| case.engines.iter().any(|engine| engine.runs(precision));
    let lost = case.precisions.iter().find(|precision| !runs(precision)).filter(|_| case.asked == Asked::ByName);
    let none = case.precisions.first().filter(|_| !case.precisions.iter().any(|p| Engine::Candle.runs(p)));
    match lost.or(none) {
        None => Ok(()),
        Some(precision) => Err(BadInput::new(format!(
            "`--engine candle` has no `{precision}`: candle-transformers' models run in fp16 or fp32"
        ))
        .hint(format!("add `--precision fp16`, or measure `{precision}` with `--engine quantbench`"))),
    }
}

/// The case as a model that was saved quantized allows it: in the precision that it has.
pub fn in_own_precision(case: &Case, quantized: Option<&PreQuantized>) -> Result<Case, BadInput> {
    let Some(own) = quantized else { return Ok(case.clone()) };
    let others = || case.precisions.iter().find(|name| *name != own.precision);
    if let Some(other) = others().filter(|_| case.asked == Asked::ByName) {
        return Err(BadInput::new(format!(
            "`--precision {other}` is not possible: the weights of `{}` were saved in `{}`",
            case.model.model_id, own.precision
        ))
        .hint(format!("drop `--precision` to measure `{}`, or name the model that it was made from", own.precision)));
    }
    let mut case = Case { precisions: vec![own.precision.to_owned()], ..case.clone() };
    if case.format_options == FormatOptions::default() {
        case.format_options.int8_threshold = own.int8_threshold;
    }
    Ok(case)
}

/// The device that a choice means here. The parent creates no CUDA context, which would take memory from the workers.
pub fn device(choice: DeviceChoice) -> Result<DeviceChoice, BadInput> {
    let built = cfg!(feature = "cuda");
    let driver = std::path::Path::new("/proc/driver/nvidia/version").exists();
    match choice {
        DeviceChoice::Auto if built && driver => Ok(DeviceChoice::Cuda(0)),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(DeviceChoice::Cpu),
        DeviceChoice::Cuda(_) if !built => Err(BadInput::new("this build of quantbench has no CUDA support")
            .hint("use `--device cpu`, or build with `--features cuda` (scripts/cuda-toolkit.sh gets the toolkit)")),
        DeviceChoice::Cuda(_) => Ok(choice),
    }
}
