//! The rows of a case that gave none: its settings, and the reason for the missing results.

use crate::engine::Device;
use crate::engines::EngineChoice;
use crate::harness::assemble;
use crate::harness::{self, Case, DeviceChoice, PromptChoice, Variant};
use crate::kernels::isa::Isa;
use crate::kernels::nvml::Gpu;
use crate::protocol::Failure;
use crate::record::{self, Record};
use crate::weights::WeightsChoice;

/// One record for each engine at each precision, as a run would have made them.
pub fn records(case: &Case, failure: &Failure) -> Vec<Record> {
    let timestamp = harness::environment::timestamp();
    variants(case).iter().map(|variant| record(case, variant, failure, &timestamp)).collect()
}

/// The variants of a case; never empty: engines that run none of the precisions count for all of them.
fn variants(case: &Case) -> Vec<Variant> {
    let refused = |choice: &EngineChoice| {
        let own = match choice {
            EngineChoice::Own(engine) => Some(*engine),
            EngineChoice::Other(_) => None,
        };
        let of = move |engine| case.precisions.iter().map(move |&precision| Variant::Own { engine, precision });
        own.into_iter().flat_map(of).collect::<Vec<_>>()
    };
    Some(case.variants())
        .filter(|variants| !variants.is_empty())
        .unwrap_or_else(|| case.engines.iter().flat_map(refused).collect())
}

fn record(case: &Case, variant: &Variant, failure: &Failure, timestamp: &str) -> Record {
    let (machine, cpu) = (harness::environment::Machine::default(), "cpu".to_owned());
    let (device, isa) = match harness::device(case.device).unwrap_or(as_typed(case.device)) {
        Device::Cuda(ordinal) => {
            let (gpu, number) = (Gpu::open(ordinal), format!("cuda:{ordinal}"));
            let name = gpu.as_ref().and_then(Gpu::name).map_or(number.clone(), |name| format!("{name} ({number})"));
            let isa = gpu.as_ref().and_then(Gpu::isa).unwrap_or_default();
            (record::DeviceFacts { kind: "cuda".to_owned(), name }, isa)
        }
        Device::Cpu => (record::DeviceFacts { kind: cpu, name: machine.cpu_name() }, Isa::detect().name().to_owned()),
    };
    let threads = if case.threads == 0 { crate::kernels::cpu::pool::default_threads() } else { case.threads };
    let nothing = Record::unknown(engine_info(variant));
    let mut record = Record {
        command: case.command.clone(),
        timestamp: timestamp.to_owned(),
        model: record::ModelFacts {
            id: shareable_id(&case.model.model_id),
            revision: case.model.revision.clone(),
            ..nothing.model
        },
        weights: weights(case),
        precision: variant.precision(),
        keep_fp16: case.keep_fp16.clone(),
        device,
        workload: workload(case),
        dtypes: record::Dtypes { weights: variant.precision(), ..nothing.dtypes },
        environment: machine.environment(&isa, threads),
        ..nothing
    };
    assemble::fail(&mut record, failure);
    record.reason = Some(shareable_reason(case, failure.message()));
    record
}

/// The version of another engine is not known before it runs.
fn engine_info(variant: &Variant) -> record::EngineInfo {
    match variant.own_engine() {
        Some(engine) => harness::engine_info(engine),
        None => {
            record::EngineInfo { name: variant.engine_name().to_owned(), version: String::new(), commit: String::new() }
        }
    }
}

/// The device of a choice that cannot be had here.
fn as_typed(choice: DeviceChoice) -> Device {
    match choice {
        DeviceChoice::Cuda(ordinal) => Device::Cuda(ordinal),
        DeviceChoice::Cpu | DeviceChoice::Auto => Device::Cpu,
    }
}

/// A folder keeps its last component: rows hold no path.
fn shareable_id(model_id: &str) -> String {
    let path = std::path::Path::new(model_id);
    let is_path = path.is_dir() || path.is_absolute() || model_id.starts_with(['.', '~']);
    match path.file_name().filter(|_| is_path) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => model_id.to_owned(),
    }
}

/// Messages name what was typed.
fn shareable_reason(case: &Case, message: &str) -> String {
    let message = message.replace(&case.model.model_id, &shareable_id(&case.model.model_id));
    match case.image.as_ref().and_then(|path| Some((path.to_str()?, path.file_name()?.to_str()?))) {
        Some((path, name)) => message.replace(path, name),
        None => message,
    }
}

/// Nothing is known of weights that were not opened.
fn weights(case: &Case) -> record::WeightFacts {
    let random = case.model.weights == WeightsChoice::Random;
    record::WeightFacts {
        source: if random { "random".to_owned() } else { String::new() },
        dtype: String::new(),
        seed: random.then_some(case.model.seed),
        hash: String::new(),
        fp16_overflow: 0,
        fp16_overflow_by_tensor: Default::default(),
    }
}

/// The requested lengths; those of a text are not known.
fn workload(case: &Case) -> record::Workload {
    let n_prompt = match &case.prompt {
        PromptChoice::Synthetic(n) => *n,
        PromptChoice::Ids(ids) => ids.len(),
        PromptChoice::Default | PromptChoice::Text(_) | PromptChoice::Texts(_) => 0,
    };
    record::Workload {
        n_prompt: n_prompt as u64,
        n_gen: case.n_gen as u64,
        n_depth: case.n_depth as u64,
        n_image: 0,
        image: None,
        batch_size: case.sequences as u64,
    }
}
