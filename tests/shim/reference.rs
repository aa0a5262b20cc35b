//! Logits of the reference executor, where the golden ones are of other weights.

use quantbench::engine::{self, Device, Setup};
use quantbench::events::Silent;
use quantbench::plan::Model;
use quantbench::quant::nf4;
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};

use super::session::{folder, golden};

/// Whether a reference at nf4 was computed with other weights than were stored: bitsandbytes on a CPU with AVX-512 takes another block's absmax where
/// rows are no whole blocks (tests/architectures/bitsandbytes.rs).
pub fn is_misread(precision: &str, model: &Model) -> bool {
    let misread = |k: usize| k.is_multiple_of(16) && !k.is_multiple_of(nf4::BLOCK);
    precision == "nf4"
        && model.encoder.is_none()
        && model.matrices.iter().any(|m| m.role.is_quantized() && misread(m.k))
}

/// Logits of `steps` steps behind a golden prompt, each of the token that the one before found: `[steps, vocab]`.
pub fn logits(name: &str, model: &Model, formats: &Formats, prompt: &str, steps: usize) -> Vec<f32> {
    let checkpoint =
        weights::open(&ModelRequest::of(folder(name).display().to_string()), &Silent).expect("a golden model");
    let source = checkpoint.source(&model.matrices, &model.vectors).expect("a golden model");
    let ids: Vec<u32> = golden(name, "golden", &format!("{prompt}.input_ids")).iter().map(|id| *id as u32).collect();
    let setup = Setup {
        model,
        source: source.as_ref(),
        formats,
        device: Device::Cpu,
        threads: 1,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: ids.len() + steps,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    let mut session = engine::reference::load(&setup, &Silent).expect("the reference").session;
    session.prefill(&ids).expect("a prompt");
    let mut all = session.logits().expect("logits");
    for _ in 1..steps {
        session.decode(1, &mut |_| {}).expect("a step");
        all.extend(session.logits().expect("logits"));
    }
    all
}
