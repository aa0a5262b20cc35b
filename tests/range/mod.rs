//! Golden models with values of 1e5 to 1e6 between operations, as Gemma 2 and 3 and some Qwen checkpoints have them: beyond fp16's 65504.
//!
//! Every weight is a golden one times a power of two, and fits fp16; what is behind the next norm is as it was. So an executor whose values have the range
//! gives the logits of [`Planted::logits`], and one whose values do not gives infinities or NaN.
#![allow(dead_code)] // Not every test binary that plants such weights asks for all of this.

use std::path::Path;

use half::{bf16, f16};
use quantbench::engine::{self, Device, Session, Setup};
use quantbench::events::Silent;
use quantbench::plan::Model;
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, Checkpoint, ModelRequest};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use tempfile::TempDir;

/// The prompt of every planted model.
pub const PROMPT: [u32; 12] = [3, 40, 77, 114, 151, 188, 225, 10, 47, 84, 121, 158];

/// A model with such values inside.
pub struct Planted {
    pub name: &'static str,
    pub folder: TempDir,
}

/// What is done to a tensor whose name contains a part.
enum Change {
    /// Times two to this power.
    Scaled(i32),
    /// The weight `w` of a norm by `1 + w`, so that the norm gives two to this power times as much.
    OffsetScaled(i32),
}

use Change::{OffsetScaled, Scaled};

/// Golden model and changes of each planted one.
const MODELS: &[(&str, &str, &[(&str, Change)])] = &[
    // The residual is 2^15 times as large, and gate · up 2^14 times.
    (
        "a residual and a gate · up of Qwen 3",
        "qwen3-odd",
        &[("embed_tokens", Scaled(15)), ("o_proj", Scaled(15)), ("up_proj", Scaled(14)), ("down_proj", Scaled(1))],
    ),
    // gate · up and the products of down and of o, in front of the norms that follow them.
    (
        "gate · up and output norms of Gemma 3",
        "gemma3-odd",
        &[("up_proj", Scaled(13)), ("v_proj", Scaled(11)), ("o_proj", Scaled(4))],
    ),
    // What the norms behind attention and feed-forward add to the residual.
    (
        "a residual of Gemma 3",
        "gemma3-odd",
        &[("post_attention_layernorm", OffsetScaled(15)), ("post_feedforward_layernorm", OffsetScaled(15))],
    ),
];

/// Every planted model.
pub fn planted() -> Vec<Planted> {
    MODELS.iter().map(|(name, golden, changes)| Planted { name, folder: plant(golden, changes) }).collect()
}

impl Planted {
    pub fn checkpoint(&self) -> Checkpoint {
        weights::open(&ModelRequest::of(self.folder.path().display().to_string()), &Silent).unwrap()
    }

    pub fn model(&self) -> Model {
        quantbench::models::build(&self.checkpoint().config).unwrap()
    }

    /// Loads `model`, which is [`Self::model`] or a variant of it, at a precision; `fp32` is the checkpoint's own values.
    pub fn with_setup<T>(&self, model: &Model, precision: &str, run: impl FnOnce(&Setup) -> T) -> T {
        let checkpoint = self.checkpoint();
        let source = checkpoint.source(&model.matrices, &model.vectors).unwrap();
        run(&Setup {
            model,
            source: source.as_ref(),
            formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
            device: Device::Cpu,
            threads: 2,
            sequences: 1,
            kv_format: Device::Cpu.kv_format(),
            capacity: 64,
            encoder_capacity: 0,
            cuda_graph: false,
        })
    }

    /// Logits behind [`PROMPT`], by the reference executor in fp32.
    pub fn logits(&self, precision: &str) -> Vec<f32> {
        self.with_setup(&self.model(), precision, |setup| {
            logits_behind_prompt(engine::reference::load(setup, &Silent).unwrap().session.as_mut())
        })
    }

    /// The largest magnitude of each buffer.
    pub fn largest_values(&self) -> Vec<(String, f32)> {
        self.with_setup(&self.model(), "fp16", |setup| engine::reference::largest_values(setup, &PROMPT).unwrap())
    }
}

/// Logits behind [`PROMPT`], of which 8 tokens are a prompt and each further one a step.
pub fn logits_behind_prompt(session: &mut dyn Session) -> Vec<f32> {
    session.prefill(&PROMPT[..8]).unwrap();
    for token in &PROMPT[8..] {
        session.prefill(&[*token]).unwrap();
    }
    session.logits().unwrap()
}

fn plant(golden: &str, changes: &[(&str, Change)]) -> TempDir {
    rewritten(golden, |name, _, value| {
        let change = changes.iter().find(|(part, _)| name.contains(part)).map(|(_, change)| change);
        let changed = match change {
            Some(Scaled(power)) => value * 2f32.powi(*power),
            Some(OffsetScaled(power)) => (1.0 + value) * 2f32.powi(*power) - 1.0,
            None => value,
        };
        let half = f16::from_f32(changed);
        assert!(half.is_finite(), "{name}: {changed} does not fit fp16");
        half.to_f32()
    })
}

/// A folder with a golden model's config.json, and its weights in fp32 as `change` makes them of a tensor's name, an index in it and the value there.
pub fn rewritten(golden: &str, change: impl Fn(&str, usize, f32) -> f32) -> TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/architectures/models").join(golden);
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rewrite = |(name, tensor): (String, TensorView)| {
        let halves = tensor.data().chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        let values = halves.map(|pair| match tensor.dtype() {
            Dtype::BF16 => bf16::from_le_bytes(pair).to_f32(),
            _ => f16::from_le_bytes(pair).to_f32(),
        });
        let changed = values.enumerate().flat_map(|(index, value)| change(&name, index, value).to_le_bytes());
        let data: Vec<u8> = changed.collect();
        (name, tensor.shape().to_vec(), data)
    };
    let rewritten: Vec<(String, Vec<usize>, Vec<u8>)> = tensors.tensors().into_iter().map(rewrite).collect();
    let views = rewritten
        .iter()
        .map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}
