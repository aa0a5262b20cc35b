//! A decode step on the CPU allocates nothing: counted by the allocator, on every thread.

mod coverage;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use coverage::combinations;
use quantbench::call::Batch;
use quantbench::engine::{self, Device, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::quant::{FORMATS, FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands every call to the system's allocator and counts it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One of each kind of block, cache, rotation and mixture.
const MODELS: &[&str] = &[
    "models/llama-tiny",
    "models/phi-odd",
    "models/t5-tiny",
    "architectures/models/gemma2-odd",
    "architectures/models/gpt_oss",
    "architectures/models/llama-dynamic",
    "architectures/models/mistral",
    "architectures/models/olmo2-odd",
    "architectures/models/phi3",
    "architectures/models/qwen3_moe-odd",
];

#[test]
fn a_decode_step_allocates_nothing() {
    for (turn, isa) in Isa::available().into_iter().enumerate() {
        for (model, format) in combinations(MODELS, FORMATS, turn) {
            for sequences in [1, 3] {
                let counted = allocations_of_decoding(model, format.name, isa, sequences);
                let what = format!("{model} {} {}, {sequences} sequences", format.name, isa.name());
                assert_eq!(counted, 0, "{what}: allocations in 16 decode steps");
            }
        }
    }
}

fn allocations_of_decoding(model: &str, precision: &str, isa: Isa, sequences: usize) -> u64 {
    let request = ModelRequest::of(format!("{}/tests/golden/{model}", env!("CARGO_MANIFEST_DIR")));
    let checkpoint = weights::open(&request, &Silent).unwrap();
    let plan = quantbench::models::build(&checkpoint.config).unwrap();
    let source = checkpoint.source(&plan.matrices, &plan.vectors).unwrap();
    let setup = Setup {
        model: &plan,
        source: source.as_ref(),
        formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
        device: Device::Cpu,
        threads: 2,
        sequences,
        kv_format: Device::Cpu.kv_format(),
        capacity: 64,
        encoder_capacity: 8,
        cuda_graph: true,
    };
    let mut session = engine::cpu::load(&setup, isa, &Silent).unwrap().session;
    if plan.encoder.is_some() {
        session.encode(engine::EncoderInput::Tokens(&[1, 2, 3].repeat(sequences))).unwrap();
    }
    // Beyond the lengths at which rotations change: LongRoPE computes its cache anew there, in a call that is no step.
    let prompt: Vec<u32> = (1..=20).collect::<Vec<u32>>().repeat(sequences);
    let (batch, mut next) = (Batch { sequences, positions: (0..20).into() }, vec![0; sequences]);
    session.prefill_batch(batch, &prompt, &mut next).unwrap();
    // Scratch grows to what the steps need, outlier columns included.
    session.decode_batch(16, &mut |_| {}).unwrap();
    session.rewind(0);
    session.prefill_batch(batch, &prompt, &mut next).unwrap();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    session.decode_batch(16, &mut |_| {}).unwrap();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}
