//! Checks before anything long starts.

use anyhow::Result;

use super::case::{Case, DeviceChoice, PrecisionSelection, PromptChoice, SavedModel};
use super::warnings::Warning;
use super::{doctor, logits};
use crate::engine::{Device, Engine};
use crate::engines::{EngineChoice, ModelForm};
use crate::error::BadInput;
use crate::quant::{self, FormatId, FormatOptions};
use crate::weights::Checkpoint;
use crate::weights::PreQuantized;

/// Runs the checks that need no model, before anything is downloaded.
pub fn check(case: &Case) -> Result<Chosen> {
    check_precisions(case)?;
    check_engines(case)?;
    check_stream(case)?;
    let chosen = choose(case.device, cfg!(feature = "cuda"), &doctor::gpu)?;
    let variants = case.variants();
    for (variant, path) in variants.iter().flat_map(|variant| case.save_logits.iter().map(move |path| (variant, path)))
    {
        logits::check_writable(&logits::path_of(path, &variant.label(), variants.len()))?;
    }
    Ok(chosen)
}

fn check_precisions(case: &Case) -> Result<(), BadInput> {
    if !case.variants().is_empty() || !case.precisions.is_empty() {
        return Ok(());
    }
    let known: Vec<String> = quant::FORMATS.iter().map(|format| format!("`{format}`")).collect();
    Err(BadInput::new("no precision is asked for").hint(format!("known are {}", known.join(", "))))
}

/// A text is shown where the prompt is one, in a run that is not timed.
fn check_stream(case: &Case) -> Result<(), BadInput> {
    let bad = |why: &str, hint: &str| Err(BadInput::new(format!("`--stream` {why}")).hint(hint));
    match &case.prompt {
        _ if !case.stream => Ok(()),
        PromptChoice::Synthetic(_) => bad(
            "shows what follows a prompt, and `--prompt-tokens` are random ids: what follows them means nothing",
            "give a prompt with `--prompt`, `--prompt-file` or `--prompt-ids`, or drop `--stream`",
        ),
        _ if case.protocol.warmup == Some(0) => bad(
            "shows a run before the repeats, and without a warm-up the first run is the one that is timed",
            "drop `--stream`, or what turns the warm-up off: `--warmup 0`, `--method single-cold-run`",
        ),
        _ => Ok(()),
    }
}

/// candle-transformers runs one precision: quantized ones that were asked for by name need quantbench's own engine beside it.
pub fn check_engines(case: &Case) -> Result<(), BadInput> {
    if !case.has(Engine::Candle) {
        return Ok(());
    }
    let runs = |precision: &FormatId| {
        case.engines.iter().any(|choice| match choice {
            EngineChoice::Own(engine) => engine.runs(*precision),
            EngineChoice::Other(_) => true,
        })
    };
    let lost = case
        .precisions
        .iter()
        .find(|precision| !runs(precision))
        .filter(|_| case.precision_selection == PrecisionSelection::ByName);
    let none = case.precisions.first().filter(|_| !case.precisions.iter().any(|p| Engine::Candle.runs(*p)));
    match lost.or(none) {
        None => Ok(()),
        Some(precision) => Err(BadInput::new(format!(
            "`--engine candle` has no `{precision}`: candle-transformers' models run in fp16 or fp32"
        ))
        .hint(format!("add `--precision fp16`, or measure `{precision}` with `--engine quantbench`"))),
    }
}

/// The case as the model's files allow it. Fails where no engine runs them.
pub fn as_saved(case: &Case, checkpoint: &Checkpoint) -> Result<Case, BadInput> {
    let form = if checkpoint.gguf().is_some() { ModelForm::Gguf } else { ModelForm::Folder };
    let precision = checkpoint.quantized.as_ref().map(|own| own.precision);
    let saved = (form == ModelForm::Gguf || precision.is_some()).then_some(SavedModel { form, precision });
    let case = Case { saved, ..in_own_precision(case, checkpoint.quantized.as_ref())? };
    let has_variants = !case.variants().is_empty();
    let lines = if has_variants { Vec::new() } else { case.not_offered() };
    if lines.is_empty() { Ok(case) } else { Err(BadInput::new(lines.join("; "))) }
}

/// A model that was saved quantized is measured in the precision that it has.
fn in_own_precision(case: &Case, quantized: Option<&PreQuantized>) -> Result<Case, BadInput> {
    let Some(own) = quantized else { return Ok(case.clone()) };
    let others = || case.precisions.iter().find(|precision| **precision != own.precision);
    if let Some(other) = others().filter(|_| case.precision_selection == PrecisionSelection::ByName) {
        return Err(BadInput::new(format!(
            "`--precision {other}` is not possible: the weights of `{}` were saved in `{}`",
            case.model.model_id, own.precision
        ))
        .hint(format!("drop `--precision` to measure `{}`, or name the model that it was made from", own.precision)));
    }
    let mut case = Case { precisions: vec![own.precision], ..case.clone() };
    if case.format_options == FormatOptions::default() {
        case.format_options.int8_threshold = own.int8_threshold;
    }
    Ok(case)
}

/// Fails where a precision of our own engine has no kernels for the device.
pub fn on_device(case: &Case, device: Device) -> Result<(), BadInput> {
    if !case.has(Engine::Quantbench) {
        return Ok(());
    }
    let lacks = |precision: &&FormatId| matches!(device, Device::Cuda(_)) && !precision.runs_on_cuda;
    match case.precisions.iter().find(lacks) {
        None => Ok(()),
        Some(precision) => Err(BadInput::new(format!(
            "`{}` is held in `{precision}`, which has no kernels for CUDA yet",
            case.model.model_id
        ))
        .hint("measure it with `--device cpu`")),
    }
}

/// The device of a case, and a warning about the choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    pub device: Device,
    pub warning: Option<Warning>,
}

/// The device that a choice means here. The parent creates no CUDA context, which would take memory from the workers.
pub fn device(choice: DeviceChoice) -> Result<Device, BadInput> {
    choose(choice, cfg!(feature = "cuda"), &doctor::gpu).map(|chosen| chosen.device)
}

/// Resolves a choice for a build with CUDA or without. `driver` gives the reason why the GPU of a number cannot be used. `auto`
/// falls back to the CPU where there is no GPU.
fn choose(
    choice: DeviceChoice,
    has_cuda: bool,
    driver: &dyn Fn(usize) -> Result<(), BadInput>,
) -> Result<Chosen, BadInput> {
    let of = |device| Chosen { device, warning: None };
    match choice {
        DeviceChoice::Auto if has_cuda => Ok(match driver(0) {
            Ok(()) => of(Device::Cuda(0)),
            Err(problem) => {
                let warning = Some(Warning::NoGpu { problem: problem.to_string() });
                Chosen { device: Device::Cpu, warning }
            }
        }),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(of(Device::Cpu)),
        DeviceChoice::Cuda(_) if !has_cuda => Err(BadInput::new("this build of quantbench has no CUDA support")
            .hint("use `--device cpu`, or build with `--features cuda` (scripts/cuda-toolkit.sh gets the toolkit)")),
        // Its worker says what is wrong with it.
        DeviceChoice::Cuda(ordinal) => Ok(of(Device::Cuda(ordinal))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_without_kernels_for_a_device_is_refused_there() {
        let case = crate::harness::case::tests::case();
        for precision in quant::FORMATS.iter().chain(quant::STORED_FORMATS.iter()).copied() {
            let case = Case { precisions: vec![precision], ..case.clone() };
            assert!(on_device(&case, Device::Cpu).is_ok(), "{precision}");
            assert_eq!(on_device(&case, Device::Cuda(0)).is_ok(), precision.runs_on_cuda, "{precision}");
        }
        assert!(quant::FORMATS.iter().all(|format| format.runs_on_cuda));
    }

    #[test]
    fn where_no_device_was_asked_for_the_cpu_does() {
        let fine = |_: usize| Ok(());
        let none = |_: usize| Err(BadInput::new("the NVIDIA driver sees no GPU").hint("check `nvidia-smi`"));
        let chosen = |choice, has_cuda, driver: &dyn Fn(usize) -> Result<(), BadInput>| {
            let chosen = choose(choice, has_cuda, driver).map_err(|error| error.to_string())?;
            Ok((chosen.device, chosen.warning.map(|warning| warning.to_string())))
        };
        let (cpu, cuda) = (DeviceChoice::Cpu, DeviceChoice::Cuda(0));
        let (on_cpu, on_cuda) = (Device::Cpu, Device::Cuda(0));
        let said = "no_gpu: the NVIDIA driver sees no GPU, so the CPU was measured; `--device cuda` fails instead";
        for (choice, has_cuda, sees, expected) in [
            (DeviceChoice::Auto, true, true, Ok((on_cuda, None))),
            (DeviceChoice::Auto, true, false, Ok((on_cpu, Some(said.to_owned())))),
            (DeviceChoice::Auto, false, false, Ok((on_cpu, None))),
            (cpu, true, false, Ok((on_cpu, None))),
            (cuda, true, true, Ok((on_cuda, None))),
            (cuda, true, false, Ok((on_cuda, None))),
            (cuda, false, true, Err("this build of quantbench has no CUDA support".to_owned())),
        ] {
            let driver: &dyn Fn(usize) -> Result<(), BadInput> = if sees { &fine } else { &none };
            assert_eq!(chosen(choice, has_cuda, driver), expected, "{choice:?} {has_cuda} {sees}");
        }
    }
}
