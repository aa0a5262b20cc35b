//! Powers of two by which fp16 values are stored where they may be out of range.

use crate::plan::{ActivationSpec, BufferId, GatedActivation, LinearPart, LinearSpec, Model, Op};

/// What such values are stored by: up to 2 million are in range then, and values below 0.002 lose places.
const SCALE: f32 = 1.0 / 32.0;

/// By the decoder's buffers, the power of two that fp16 values are stored by. In models that norm queries, keys or products, or add biases to
/// queries, these have one: results of gates, what gates multiply, products that a norm reads, and products and norms that a residual takes. Such
/// checkpoints were trained in bf16, and have values of 10^5 and more (Gemma 2 and 3, Qwen).
pub fn scales(model: &Model) -> Vec<f32> {
    let plan = &model.decoder;
    let mut scales = vec![1.0; plan.buffers.len()];
    let linears = || plan.ops.iter().filter_map(|op| if let Op::Linear(spec) = op { Some(spec) } else { None });
    let parts_of =
        |buffer: BufferId| linears().flat_map(|spec| &spec.parts).filter(move |part: &&LinearPart| part.out == buffer);
    let is_wide = |op: &Op| match op {
        Op::Attention(spec) => spec.qk_norm.is_some() || parts_of(spec.q).any(|part| part.bias.is_some()),
        Op::Norm(spec) => parts_of(spec.x).next().is_some(),
        Op::Embed(_) | Op::Patches(_) | Op::AddRows(_) | Op::Features(_) | Op::Linear(_) | Op::Append(_) => false,
        Op::Activation(_) | Op::Experts(_) | Op::Add(_) | Op::LastRow(_) | Op::Argmax(_) => false,
    };
    if !plan.ops.iter().any(is_wide) {
        return scales;
    }
    // A bias behind it would have to be stored so too.
    let has_bias = |spec: &LinearSpec| spec.parts.iter().any(|part| part.bias.is_some());
    let is_biased = |out: BufferId| linears().any(|spec| spec.x == out && has_bias(spec));
    // A bias of its own would have to be, and rows that are cut from a product have one scale.
    let is_plain = |buffer: BufferId| {
        let mut parts = parts_of(buffer).peekable();
        parts.peek().is_some() && parts.all(|part| part.bias.is_none() && part.rows.is_none())
    };
    let is_normed = |buffer: BufferId| plan.ops.iter().any(|op| matches!(op, Op::Norm(spec) if spec.out == buffer));
    let is_added_norm = |buffer| is_normed(buffer) && !linears().any(|spec| spec.x == buffer);
    for op in &plan.ops {
        match op {
            Op::Activation(ActivationSpec { kind: _, gate: _, up: Some(up), out }) if !is_biased(*out) => {
                scales[out.0] = SCALE;
                scales[up.0] = if is_plain(*up) { SCALE } else { 1.0 };
            }
            Op::Experts(spec) if matches!(spec.activation, GatedActivation::Plain(_)) => scales[spec.out.0] = SCALE,
            Op::Norm(spec) if is_plain(spec.x) => scales[spec.x.0] = SCALE,
            Op::Add(spec) if is_plain(spec.b) || is_added_norm(spec.b) => scales[spec.b.0] = SCALE,
            Op::Activation(_) | Op::Experts(_) | Op::Attention(_) | Op::Norm(_) | Op::Embed(_) | Op::Patches(_) => {}
            Op::AddRows(_) | Op::Features(_) | Op::Linear(_) | Op::Append(_) | Op::Add(_) => {}
            Op::LastRow(_) | Op::Argmax(_) => {}
        }
    }
    scales
}

/// What products into `outs` are rounded by, of values that were stored by `read`: what was stored by a power of two gives products by it.
pub fn rounded(scales: &[f32], read: f32, outs: impl Iterator<Item = BufferId>) -> f32 {
    if read == 1.0 { outs.map(|out| scales[out.0]).fold(1.0, f32::min) } else { 1.0 }
}
