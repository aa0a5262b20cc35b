//! The worker process: loads a model and measures it as the parent asks.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::clock::Monotonic;
use super::measure::Bench;
use super::open_model::{Opened, open, pixels};
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
    let kv_format = match request.engine {
        Engine::Quantbench => request.device.kv_format(),
        Engine::Candle => engine::candle::kv_format(opened.model.architecture),
    };
    let setup = Setup {
        model: &opened.model,
        source: opened.source.as_ref(),
        formats: &formats,
        device: request.device,
        threads: request.threads,
        sequences: 1,
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
        isa: loaded.isa,
        load_peak_bytes,
        self_check,
        weights_by_format: weights_by_format(&opened, &formats),
    };
    Ok((State { bench, request }, report))
}

/// Stored bytes of the weights by the format that holds them; vectors count as fp16.
fn weights_by_format(opened: &Opened, formats: &Formats) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::from([(quant::BASELINE.to_string(), opened.model.vector_bytes() as u64)]);
    for spec in &opened.model.matrices {
        // What a checkpoint that was saved quantized holds in 2 bytes a value or more was left out on purpose.
        let wide = opened.source.stored_bytes(&spec.name) >= 2 * (spec.n * spec.k) as u64;
        let left_out = opened.source.is_quantized() && spec.role.is_quantized() && wide;
        let format = if left_out { formats.fp16() } else { formats.of(spec.role) };
        *bytes.entry(format.id().to_string()).or_default() += format.stored_bytes(spec.n, spec.k) as u64;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_of_a_newer_protocol_is_refused_by_name() {
        assert!(check_version(1).is_ok() && check_version(protocol::VERSION).is_ok());
        let refused = check_version(protocol::VERSION + 1).unwrap_err().to_string();
        assert!(refused.starts_with("the parent speaks version 2 of the worker protocol"), "{refused}");
    }
}
