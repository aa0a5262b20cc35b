//! The worker process: loads a model and measures it as the parent asks.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::clock::Monotonic;
use super::measure::Bench;
use super::open_model::{OpenModel, open, pixels};
use super::scoring;
use super::validity::check_kernels;
use super::worker_process::SUBCOMMAND;
use crate::engine::{self, Engine, Setup, check};
use crate::events::{Listener, WithoutWarnings};
use crate::ipc;
use crate::kernels::cpu::rlimit;
use crate::os::cpu_usage::CpuAccounts;
use crate::os::memory::ProcessMemory;
use crate::protocol::{self, LoadReport, LoadRequest, WorkerReply, WorkerRequest};
use crate::quant;
use crate::weights::policy::Formats;

/// The hidden subcommand: answers the parent until it closes the pipe. Fails on input that no parent writes.
pub fn worker_main() -> Result<()> {
    // The kernel should end a worker, not the parent, when memory runs out. Raising one's own score needs no right; where it
    // fails nothing is lost.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    // Ctrl-C reaches all processes of a terminal; the parent decides what it means, and a worker ends with its parent.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::default());
    let mut state = None;
    ipc::serve(SUBCOMMAND, |request, events| answer(request, &mut state, events))
}

struct State {
    bench: Bench<Monotonic>,
    request: LoadRequest,
}

fn answer(request: WorkerRequest, state: &mut Option<State>, events: &dyn Listener) -> Result<WorkerReply> {
    let loaded = state.as_mut().context("nothing is loaded yet");
    Ok(match request {
        WorkerRequest::Load(request) => {
            let (loaded, report) = load(*request, events)?;
            *state = Some(loaded);
            WorkerReply::Loaded(report)
        }
        WorkerRequest::WarmUp => WorkerReply::Warmed(loaded?.bench.warm_up()?),
        WorkerRequest::Repeat => WorkerReply::Sample(loaded?.bench.repeat()?),
        WorkerRequest::Finish => {
            let State { bench, request } = loaded?;
            WorkerReply::Finished(bench.finish(request.save_logits.as_deref())?)
        }
        WorkerRequest::Bandwidth(ordinal) => WorkerReply::Bandwidth(engine::memory::read_bandwidth(ordinal)?),
        WorkerRequest::Score(request) => WorkerReply::Scored(scoring::score(loaded?.bench.encoded()?, &request)?),
    })
}

/// Fails for a parent whose requests this build may not understand.
fn check_version(parent: u32) -> Result<()> {
    if parent > protocol::VERSION {
        bail!(
            "the parent speaks version {parent} of the worker protocol, and this build reads versions up to {}; use two builds of \
             one version",
            protocol::VERSION
        );
    }
    Ok(())
}

fn load(request: LoadRequest, events: &dyn Listener) -> Result<(State, LoadReport)> {
    request.memory_limit_bytes.map_or(Ok(()), rlimit::limit_data_bytes).context("limiting the memory of the worker")?;
    check_version(request.protocol_version)?;
    let mut opened = open(&request.model, &WithoutWarnings(events))?;
    opened.select(&request.selection)?;
    let pixels = pixels(&opened.model, &opened.checkpoint, &request.task.encode)?;
    let formats = Formats::new(request.precision, request.format_options);
    let own_kv_format = match request.engine {
        Engine::Quantbench => request.device.kv_format(),
        Engine::Candle => engine::candle::kv_format(opened.model.architecture),
    };
    let kv_format = request.kv_format.unwrap_or(own_kv_format);
    let setup = Setup {
        model: &opened.model,
        source: opened.source.as_ref(),
        formats: &formats,
        device: request.device,
        threads: request.threads,
        sequences: request.sequences,
        kv_format,
        capacity: request.capacity(),
        encoder_capacity: request.encoder_capacity,
        cuda_graph: request.cuda_graph,
    };
    let loaded = match request.engine {
        Engine::Quantbench => engine::load(&setup, events)?,
        Engine::Candle => {
            let dtype = engine::candle::dtype(opened.model.architecture);
            engine::candle::load(&setup, &opened.checkpoint.config, dtype, events)?
        }
    };
    let memory = ProcessMemory::default();
    let load_peak_bytes = memory.peak_bytes();
    let task = request.task.clone();
    let accounts = CpuAccounts::default();
    let mut bench = Bench::new(loaded.session, Monotonic::start(), memory, accounts, task, pixels);
    bench.loaded()?;
    let self_check = match request.engine {
        Engine::Quantbench => check::self_check(&setup)?,
        // Not our kernels.
        Engine::Candle => None,
    };
    check_kernels(request.precision, self_check.as_ref())?;
    let report = LoadReport {
        protocol_version: protocol::VERSION,
        load_s: loaded.load.as_secs_f64(),
        quantize_s: loaded.quantize.as_secs_f64(),
        fp16_overflow: loaded.fp16_overflow,
        fp16_overflow_by_tensor: match loaded.fp16_overflow {
            0 => BTreeMap::new(),
            _ => engine::load::fp16_overflow_by_tensor(&setup)?,
        },
        isa: loaded.isa,
        kv_format: Some(kv_format),
        load_peak_bytes,
        self_check,
        weights_by_format: weights_by_format(&opened, &formats),
    };
    Ok((State { bench, request }, report))
}

/// Stored bytes of the weights by the format that holds them; vectors count as fp16.
fn weights_by_format(opened: &OpenModel, formats: &Formats) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::from([(quant::BASELINE.to_string(), opened.model.vector_bytes() as u64)]);
    for spec in &opened.model.matrices {
        // What a checkpoint that was saved quantized holds in 2 bytes a value or more was left out on purpose.
        let wide = opened.source.stored_bytes(&spec.name) >= 2 * (spec.n * spec.k) as u64;
        let left_out = opened.source.is_quantized() && spec.role.is_quantized() && wide;
        let format = if left_out { formats.unquantized() } else { formats.of(spec.role) };
        *bytes.entry(format.id().to_string()).or_default() += format.stored_bytes(spec.n, spec.k) as u64;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::KvFormat;
    use crate::engine::Device;
    use crate::events::Silent;
    use crate::harness::case::{Case, Variant};
    use crate::harness::prompt::TokenizedWorkload;
    use crate::protocol::{DeviceAssignment, Task};
    use crate::quant;
    use crate::weights::WeightsChoice;

    /// A request for llama-tiny on the CPU.
    fn request() -> LoadRequest {
        let model_id = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny").to_owned();
        let plain = crate::harness::case::tests::case();
        let task = Task { prompt: vec![1, 2], n_gen: 2, ..Task::default() };
        let (sequences, n_prompt, n_image, n_encoder) = (1, 2, 0, 0);
        let workload = TokenizedWorkload { task, sequences, n_prompt, n_image, n_encoder };
        let assignment = DeviceAssignment { device: Device::Cpu, threads: 1 };
        let variant = Variant::own(quant::BASELINE);
        let model = crate::weights::ModelRequest { model_id, weights: WeightsChoice::Auto, ..plain.model.clone() };
        workload.load_request(&Case { model, ..plain }, &variant, assignment)
    }

    #[test]
    fn a_batch_or_a_cache_that_an_engine_cannot_run_is_refused_by_name() {
        let message = |request| load(request, &Silent).err().map(|error| format!("{error:#}")).unwrap_or_default();
        let fine = load(request(), &Silent).map(|(_, report)| report.kv_format).unwrap();
        assert_eq!(fine, Some(KvFormat::Fp32));
        assert_eq!(message(LoadRequest { kv_format: Some(KvFormat::Fp32), ..request() }), "");
        for (sequences, kv_format, expected) in [
            (4, None, "the CPU engine cannot run a batch of 4 sequences; it runs 1"),
            (0, None, "the CPU engine cannot run a batch of 0 sequences; it runs 1"),
            (1, Some(KvFormat::Fp8), "the CPU engine cannot run a cache in fp8; it runs fp32"),
            (1, Some(KvFormat::Bf16), "the CPU engine cannot run a cache in bf16; it runs fp32"),
        ] {
            assert_eq!(message(LoadRequest { sequences, kv_format, ..request() }), expected);
        }
    }

    #[test]
    fn a_request_without_a_batch_is_for_one_sequence_in_the_engines_own_cache() {
        let mut line = serde_json::to_value(request()).unwrap();
        let fields = line.as_object_mut().unwrap();
        for added in ["sequences", "kv_format", "protocol_version"] {
            assert!(fields.remove(added).is_some(), "{added}");
        }
        let older: LoadRequest = serde_json::from_value(line).unwrap();
        assert_eq!((older.sequences, older.kv_format, older.protocol_version), (1, None, 1));
    }

    #[test]
    fn a_parent_of_a_newer_protocol_is_refused_by_name() {
        assert!(check_version(1).is_ok() && check_version(protocol::VERSION).is_ok());
        let refused = check_version(protocol::VERSION + 1).unwrap_err().to_string();
        assert!(refused.starts_with("the parent speaks version 2 of the worker protocol"), "{refused}");
    }
}
