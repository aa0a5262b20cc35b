//! Loading onto a GPU: what it makes is what the host makes, in the memory that it may take. On a machine without a usable GPU
//! each test prints why it skips.
#![cfg(feature = "cuda")]

mod gpu;
#[path = "shim/plain.rs"]
mod plain;
mod skips;

use std::path::Path;

use candle_core::{CudaDevice, Result};
use gpu::gpu;
use plain::{Case, DTYPES, cases};
use quantbench::engine::{self, Loaded, Setup};
use quantbench::events::Silent;
use quantbench::kernels::cuda::launch::address;
use quantbench::kernels::cuda::memory;
use quantbench::plan::Model;
use quantbench::quant::cuda::{GRANULE, SourceDtype, SourceValues};
use quantbench::quant::fp32::Fp32Stored;
use quantbench::quant::{CudaMatrix, FORMATS, Format, FormatId, FormatOptions, HalfMatrix, INTERNAL_FORMATS, Stored};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};

/// What loading may use beyond the model and its largest tensor.
const BEYOND_BYTES: u64 = 256_000_000;

#[test]
fn what_the_device_makes_is_what_the_host_makes() {
    let Some((device, _turn)) = gpu() else { return };
    let cuda = device.as_cuda_device().expect("a CUDA device");
    let cases = cases();
    for entry in FORMATS.iter().chain(INTERNAL_FORMATS) {
        let format = (entry.new)(FormatOptions::default());
        for case in &cases {
            let Case { n, k, .. } = *case;
            let what = format!("{} {}", entry.name, case.what);
            let expected = stored(format.as_ref(), case).upload(&device).expect("upload");
            // All at once, and the last rows first.
            for step in [n, GRANULE.min(n)] {
                let (made, overflow) = make(format.as_ref(), case, step, cuda, &device).expect("encode");
                assert_eq!(made.resident_bytes(), format.device_bytes(n, k).resident, "{what}");
                assert_eq!(made.shape(), (n, k), "{what}");
                let parts = made.download().expect("download").into_iter().zip(expected.download().expect("download"));
                for (part, (made, expected)) in parts.enumerate() {
                    let at = made.iter().zip(&expected).position(|(made, expected)| made != expected);
                    assert_eq!(at, None, "{what}: part {part}, {step} rows at a time, first difference");
                    assert_eq!(made.len(), expected.len(), "{what}: part {part}");
                }
                let counted = if entry.is_exact { 0 } else { case.overflow };
                assert_eq!(overflow, counted, "{what}: values that overflowed");
            }
        }
        println!("{}: {} matrices", entry.name, cases.len());
    }
}

/// By the host alone.
fn stored(format: &dyn Format, case: &Case) -> Box<dyn Stored> {
    let Case { n, k, halves, floats, .. } = case;
    match format.id().is_exact {
        true => Box::new(Fp32Stored::new(*n, *k, floats.clone()).expect("fp32")),
        false => format.quantize(HalfMatrix { n: *n, k: *k, data: halves.clone() }).expect("quantize"),
    }
}

/// By the device, `step` rows at a time from the end; and how many values it saw overflow.
fn make(
    format: &dyn Format,
    case: &Case,
    step: usize,
    cuda: &CudaDevice,
    device: &candle_core::Device,
) -> Result<(Box<dyn CudaMatrix>, u64)> {
    let kinds = [SourceDtype::F16, SourceDtype::Bf16, SourceDtype::F32];
    let kind = DTYPES.into_iter().zip(kinds).find(|(dtype, _)| *dtype == case.dtype).expect("a plain dtype").1;
    let row_bytes = case.k * kind.bytes();
    let overflow = cuda.alloc_zeros::<u64>(1)?;
    let encoder = format.encoder(case.n, case.k, device)?;
    for start in (0..case.n).step_by(step).collect::<Vec<_>>().into_iter().rev() {
        let rows = start..case.n.min(start + step);
        let bytes = cuda.clone_htod(&case.bytes[rows.start * row_bytes..rows.end * row_bytes])?;
        let plain = SourceValues { values: address(&bytes, cuda), overflow: address(&overflow, cuda), kind };
        // SAFETY: `bytes` are the values of these rows, freed on the same stream behind the call.
        unsafe { encoder.encode(rows, plain) }?;
    }
    Ok((encoder.finish()?, cuda.clone_dtoh(&overflow)?[0]))
}

fn open(model_id: &str) -> (Model, Box<dyn weights::Source>) {
    let checkpoint = weights::open(&ModelRequest::of(model_id), &Silent).expect("a model");
    let model = quantbench::models::build(&checkpoint.config).expect("a plan");
    let source = checkpoint.source(&model.matrices, &model.vectors).expect("weights");
    (model, source)
}

fn load(model: &Model, source: &dyn weights::Source, precision: &str, cuda_graph: bool) -> Loaded {
    let setup = Setup {
        model,
        source,
        formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
        device: engine::Device::Cuda(0),
        threads: 8,
        sequences: 1,
        kv_format: engine::Device::Cuda(0).kv_format(),
        capacity: 64,
        encoder_capacity: 8,
        cuda_graph,
    };
    engine::load(&setup, &Silent).expect("load")
}

#[test]
fn loading_takes_little_beyond_what_stays() {
    let Some((device, _turn)) = gpu() else { return };
    let cuda = device.as_cuda_device().expect("a CUDA device");
    let (model, source) = open("llama-3.2-1b");
    let largest = model.matrices.iter().map(|spec| source.stored_bytes(&spec.name)).max().expect("matrices");
    for entry in FORMATS {
        memory::release_unused(cuda).expect("release");
        memory::reset_high_marks(cuda).expect("reset");
        let before = memory::pool_use(cuda).expect("pool").used_bytes;
        let loaded = load(&model, source.as_ref(), entry.name, true);
        let after = memory::pool_use(cuda).expect("pool");
        let (peak, stays) = (after.used_high_bytes - before, after.used_bytes - before);
        println!("{}: {} ms, {stays} bytes stay, {} beyond", entry.name, loaded.load.as_millis(), peak - stays);
        assert!(peak <= stays + largest + BEYOND_BYTES, "{}: a peak of {peak}, {stays} stay", entry.name);
    }
}

#[test]
fn a_decode_step_allocates_nothing_on_the_device() {
    let Some((device, _turn)) = gpu() else { return };
    let cuda = device.as_cuda_device().expect("a CUDA device");
    for name in ["llama-tiny", "phi-odd", "t5-tiny"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name);
        let (model, source) = open(&folder.display().to_string());
        for (entry, cuda_graph) in FORMATS.iter().flat_map(|entry| [(entry, true), (entry, false)]) {
            let mut session = load(&model, source.as_ref(), entry.name, cuda_graph).session;
            if model.encoder.is_some() {
                session.encode(engine::EncoderInput::Tokens(&[1, 2, 3])).expect("encode");
            }
            session.prefill(&[1, 2, 3]).expect("prefill");
            // The first call captures the graph. An allocation in it would be a node, which every replay repeats.
            for steps in [1, 16] {
                memory::reset_high_marks(cuda).expect("reset");
                let before = memory::pool_use(cuda).expect("pool");
                session.decode(steps, &mut |_| {}).expect("decode");
                assert_eq!(memory::pool_use(cuda).expect("pool"), before, "{name} {} graph {cuda_graph}", entry.name);
            }
        }
    }
}
