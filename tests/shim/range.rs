//! Weights whose values inside exceed fp16's 65504: a step keeps them in range. A prompt does not yet: what a gate multiplies is a product in fp16
//! there (docs/engine.md).

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use quantbench::engine::{self, Device, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::quant::{FormatOptions, fp16};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::session::{Session, folder, golden};
use super::step::TOLERANCE;

/// Parts of tensors' names, and what multiplies these: gates times ups of 10^5 and more. What brings them back leaves a residual that the next norm
/// takes as it was, as nearly all of it is of this kind.
const PLANTED: [(&str, &[(&str, f32)]); 2] = [
    ("gemma3-odd", &[("up_proj", 8192.0), ("o_proj", 4096.0)]),
    ("qwen3-odd", &[("up_proj", 8192.0), ("down_proj", 1.0 / 512.0)]),
];
const CAPACITY: usize = 64;

pub fn values_beyond_fp16_stay_in_range() {
    for (turn, (model, factors)) in PLANTED.into_iter().enumerate() {
        let planted = tempfile::tempdir().expect("a folder");
        plant(&folder(model), planted.path(), factors);
        let ids: Vec<u32> = golden(model, "golden", "p1.input_ids").iter().map(|id| *id as u32).collect();
        let expected = reference(planted.path(), &ids);
        let memory = Memory::default();
        let host = Host { chip: CHIPS[(turn + 1) % CHIPS.len()], memory: &memory };
        let mut session = Session::open(planted.path(), false, "fp16", &host, 16);
        for id in &ids {
            session.place(*id);
            session.step();
        }
        for (at, (logit, expected)) in session.logits().iter().zip(&expected).enumerate() {
            let off = (logit - expected).abs();
            assert!(off <= TOLERANCE, "{model}: logit {at} is {logit}, not {expected}");
        }
    }
}

/// A copy of a model in bf16, some of whose tensors are multiplied by powers of two.
fn plant(from: &Path, to: &Path, factors: &[(&str, f32)]) {
    std::fs::copy(from.join("config.json"), to.join("config.json")).expect("a copy");
    let bytes = std::fs::read(from.join("model.safetensors")).expect("weights");
    let tensors = SafeTensors::deserialize(&bytes).expect("weights");
    let scaled = tensors.tensors().into_iter().map(|(name, tensor)| {
        let widen = match tensor.dtype() {
            Dtype::BF16 => |bytes| bf16::from_le_bytes(bytes).to_f32(),
            Dtype::F16 => |bytes| f16::from_le_bytes(bytes).to_f32(),
            other => panic!("{name} is {other:?}"),
        };
        let factor = factors.iter().find(|(part, _)| name.contains(part)).map_or(1.0, |(_, factor)| *factor);
        let values = tensor.data().as_chunks::<2>().0.iter().map(|bytes| widen(*bytes) * factor);
        let data: Vec<u8> = values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        (name, (tensor.shape().to_vec(), data))
    });
    let scaled: HashMap<String, (Vec<usize>, Vec<u8>)> = scaled.collect();
    let views = scaled.iter().map(|(name, (shape, data))| {
        (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), data).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).expect("weights");
}

/// Logits behind a prompt, in fp32.
fn reference(folder: &Path, ids: &[u32]) -> Vec<f32> {
    let checkpoint = weights::open(&ModelRequest::of(folder.display().to_string()), &Silent).expect("a planted model");
    let plan = quantbench::models::build(&checkpoint.config).expect("a planted model");
    let source = checkpoint.source(&plan.matrices, &plan.vectors).expect("a planted model");
    let setup = Setup {
        model: &plan,
        source: source.as_ref(),
        formats: &Formats::new(fp16::ID, FormatOptions::default()),
        device: Device::Cpu,
        threads: 1,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: CAPACITY,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    let mut session = engine::cpu::load(&setup, Isa::detect(), &Silent).expect("a session").session;
    session.prefill(ids).expect("a prompt");
    let logits = session.logits().expect("logits");
    assert!(logits.iter().all(|logit| logit.is_finite()), "the reference is in range");
    logits
}
