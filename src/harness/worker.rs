//! The worker process: our own engines as an engine of the protocol.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::clock::Monotonic;
use super::load::{OwnLoad, OwnLoaded};
use super::open_model::{OpenModel, open, pixels};
use super::served::ServedSession;
use super::validity::check_kernels;
use super::worker_process::SUBCOMMAND;
use crate::call::KvFormat;
use crate::engine::{self, Engine, Setup, check};
use crate::events::{Event, Listener, WithoutWarnings};
use crate::ipc;
use crate::kernels::cpu::rlimit;
use crate::os::memory::ProcessMemory;
use crate::protocol::{self, BandwidthReport, EngineReply, EngineRequest, Hello, Load, LoadReply, capability};
use crate::quant;
use crate::weights::policy::Formats;

/// The hidden subcommand: answers the parent until it closes the connection. Fails on input that no parent writes.
pub fn worker_main() -> Result<()> {
    // Ctrl-C reaches all processes of a terminal; the parent decides what it means, and a worker ends with its parent.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::default());
    let mut session = None;
    ipc::serve_engine(SUBCOMMAND, hello(), |request, events| answer(request, &mut session, events))
}

fn hello() -> Hello {
    use capability::{BATCH, DEPTH, ENCODE_PICTURE, ENCODE_TOKENS, LOGITS, MEMORY, PROCEED, SCORE, WAIT};
    let all = [LOGITS, SCORE, MEMORY, DEPTH, PROCEED, ENCODE_TOKENS, ENCODE_PICTURE, WAIT, BATCH];
    Hello {
        protocol: protocol::VERSION,
        engine: Engine::Quantbench.name().to_owned(),
        version: Engine::Quantbench.version().to_owned(),
        capabilities: all.map(str::to_owned).to_vec(),
    }
}

type Served = ServedSession<Monotonic>;

fn answer(request: EngineRequest, session: &mut Option<Served>, events: &dyn Listener) -> Result<EngineReply> {
    let loaded = session.as_mut().context("nothing is loaded yet");
    Ok(match request {
        EngineRequest::Load(request) => {
            let (served, loaded) = load(&request, events)?;
            *session = Some(served);
            EngineReply::Load(Box::new(loaded))
        }
        EngineRequest::Run(run) => {
            // The parent knows the label.
            let show = |id| events.on(Event::Token { label: String::new(), id });
            let report = loaded?.run(&run, &mut { show });
            if run.stream {
                events.on(Event::TextEnd);
            }
            EngineReply::Run(report?)
        }
        EngineRequest::Logits(logits) => EngineReply::Logits(loaded?.logits(&logits)?),
        EngineRequest::Score(score) => EngineReply::Score(loaded?.score(&score)?),
        EngineRequest::Memory(memory) => EngineReply::Memory(loaded?.memory(memory)?),
        EngineRequest::Finish(finish) => EngineReply::Finish(loaded?.finish(&finish)?),
        EngineRequest::Bandwidth(request) => {
            let measured = engine::memory::read_bandwidth(request.device)?;
            EngineReply::Bandwidth(BandwidthReport { read_gb_s: measured.read_gb_s, copy_gb_s: measured.copy_gb_s })
        }
    })
}

/// Fails for a parent whose requests this build may not understand.
fn check_version(parent: u32) -> Result<()> {
    if parent > protocol::VERSION {
        bail!(
            "the parent speaks version {parent} of the engine protocol, and this build reads versions up to {}; use two builds of \
             one version",
            protocol::VERSION
        );
    }
    Ok(())
}

fn load(request: &Load, events: &dyn Listener) -> Result<(Served, LoadReply)> {
    request.memory_limit_bytes.map_or(Ok(()), rlimit::limit_data_bytes).context("limiting the memory of the worker")?;
    check_version(request.protocol)?;
    let request = OwnLoad::of(request)?;
    let options = &request.options;
    let mut opened = open(&options.model, &WithoutWarnings(events))?;
    opened.select(&options.selection)?;
    let pixels = pixels(&opened.model, &opened.checkpoint, &options.encode)?;
    let formats = Formats::new(request.precision, options.format_options);
    let kv_format = kv_format(&request, &opened);
    let setup = Setup {
        model: &opened.model,
        source: opened.source.as_ref(),
        formats: &formats,
        device: request.device,
        threads: request.threads,
        sequences: request.sequences,
        kv_format,
        capacity: request.capacity,
        encoder_capacity: options.encoder_capacity,
        cuda_graph: options.cuda_graph,
    };
    let loaded = match options.engine {
        Engine::Quantbench => engine::load(&setup, events)?,
        Engine::Candle => {
            let dtype = engine::candle::dtype(opened.model.architecture);
            engine::candle::load(&setup, &opened.checkpoint.config, dtype, events)?
        }
    };
    let load_peak_bytes = ProcessMemory::default().peak_bytes();
    // Each sequence looks at the same picture.
    let pixels = pixels.repeat(request.sequences);
    let mut served = ServedSession::new(loaded.session, Monotonic::start(), pixels, request.sequences);
    let pool = served.pool()?;
    let self_check = match options.engine {
        Engine::Quantbench => check::self_check(&setup)?,
        // Not our kernels.
        Engine::Candle => None,
    };
    check_kernels(request.precision, self_check.as_ref())?;
    served.release_unused()?;
    let details = OwnLoaded {
        quantize_s: loaded.quantize.as_secs_f64(),
        fp16_overflow: loaded.fp16_overflow,
        fp16_overflow_by_tensor: match loaded.fp16_overflow {
            0 => BTreeMap::new(),
            _ => engine::load::fp16_overflow_by_tensor(&setup)?,
        },
        kv_format: Some(kv_format),
        self_check,
        load_peak_bytes,
        pool,
        weights_by_format: weights_by_format(&opened, &formats),
    };
    let report = LoadReply {
        load_s: Some(loaded.load.as_secs_f64()),
        kernels: loaded.isa,
        details: serde_json::to_value(details)?,
        ..LoadReply::default()
    };
    Ok((served, report))
}

/// What was asked for, else the engine's own.
fn kv_format(request: &OwnLoad, opened: &OpenModel) -> KvFormat {
    let own = match request.options.engine {
        Engine::Quantbench => request.device.kv_format(),
        Engine::Candle => engine::candle::kv_format(opened.model.architecture),
    };
    request.options.kv_format.unwrap_or(own)
}

/// Stored bytes of the weights by the format that holds them; vectors count as fp16.
fn weights_by_format(opened: &OpenModel, formats: &Formats) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::from([(quant::BASELINE.to_string(), opened.model.vector_bytes() as u64)]);
    for spec in &opened.model.matrices {
        // What a checkpoint that was saved quantized holds in 2 bytes a value or more was left out on purpose.
        let wide = opened.source.stored_bytes(&spec.name) >= 2 * (spec.n * spec.k) as u64;
        let may_be_left_out = spec.role.is_quantized() && spec.held.is_none();
        let left_out = opened.source.is_quantized() && may_be_left_out && wide;
        let (format, of_matrix) = match left_out {
            true => (formats.unquantized(), formats.unquantized().stored_bytes(spec.n, spec.k) as u64),
            false => (formats.of(spec), formats.stored_bytes(spec)),
        };
        *bytes.entry(format.id().to_string()).or_default() += of_matrix;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::KvFormat;
    use crate::engine::Device;
    use crate::events::Silent;
    use crate::harness::case::Case;
    use crate::harness::load::{DeviceAssignment, LoadRequest, OwnOptions};
    use crate::harness::prompt::TokenizedWorkload;
    use crate::harness::task::Task;
    use crate::quant;
    use crate::weights::WeightsChoice;

    /// A request for llama-tiny on the CPU.
    fn request() -> LoadRequest {
        let model_id = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny").to_owned();
        let plain = crate::harness::case::tests::case();
        let task = Task { prompt: vec![1, 2], n_gen: 2, ..Task::default() };
        let workload = TokenizedWorkload { task, n_prompt: 2, n_image: 0, n_encoder: 0, longest_given: None };
        let assignment = DeviceAssignment { device: Device::Cpu, threads: 1 };
        let model = crate::weights::ModelRequest { model_id, weights: WeightsChoice::Auto, ..plain.model.clone() };
        workload.load_request(&Case { model, ..plain }, (Engine::Quantbench, quant::BASELINE), assignment)
    }

    fn loaded(request: LoadRequest) -> Result<OwnLoaded> {
        let line = request.wire().unwrap();
        let (_, report) = load(&line, &Silent)?;
        Ok(serde_json::from_value(report.details).unwrap())
    }

    #[test]
    fn a_batch_or_a_cache_that_an_engine_cannot_run_is_refused_by_name() {
        let with = |sequences: usize, kv_format| {
            let plain = request();
            let task = Task { sequences, prompt: vec![1; 2 * sequences], n_gen: 2, ..Task::default() };
            LoadRequest { task, options: OwnOptions { kv_format, ..plain.options.clone() }, ..plain }
        };
        let none = Load { batch: 0, ..request().wire().unwrap() };
        let none = load(&none, &Silent).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert_eq!(none, "the CPU engine cannot run a batch of 0 sequences; it runs 1 or more");
        let message = |request| loaded(request).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert_eq!(loaded(request()).unwrap().kv_format, Some(KvFormat::Fp32));
        assert_eq!(message(with(1, Some(KvFormat::Fp32))), "");
        assert_eq!(message(with(4, None)), "");
        for (sequences, kv_format, expected) in [
            (1, Some(KvFormat::Fp8), "the CPU engine cannot run a cache in fp8; it runs fp32"),
            (1, Some(KvFormat::Bf16), "the CPU engine cannot run a cache in bf16; it runs fp32"),
        ] {
            assert_eq!(message(with(sequences, kv_format)), expected);
        }
    }

    #[test]
    fn words_and_options_of_another_build_are_refused_by_name() {
        let line = request().wire().unwrap();
        let message = |line: Load| load(&line, &Silent).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert_eq!(message(Load { precision: "q9".to_owned(), ..line.clone() }), "this build knows no precision `q9`");
        assert_eq!(message(Load { device: "tpu".to_owned(), ..line.clone() }), "this build knows no device `tpu`");
        let other = message(Load { options: serde_json::Value::Null, ..line });
        assert!(other.starts_with("the options of the worker come from another build"), "{other}");
    }

    #[test]
    fn a_parent_of_a_newer_protocol_is_refused_by_name() {
        assert!(check_version(1).is_ok() && check_version(protocol::VERSION).is_ok());
        let refused = check_version(protocol::VERSION + 1).unwrap_err().to_string();
        assert!(refused.starts_with("the parent speaks version 3 of the engine protocol"), "{refused}");
    }
}
