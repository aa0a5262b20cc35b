//! Qwen3 MoE (Yang et al. 2025): Qwen3's attention with a mixture of many small experts, or a plain feed-forward in some layers.

use candle_core::Result;

use super::Architecture;
use super::blocks::{BlockSpec, DecoderConfig, Defaults, FeedForward, NormPlace};
use super::experts::{ExpertsBlock, Packing};
use super::keys::Keys;
use super::qwen3;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, ExpertWeighting, GatedActivation, Model, Path};

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen3_moe",
    doc: "Qwen3 mixtures (30B-A3B, 235B-A22B): decoder-only, many small experts",
    build,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 6144,
    layers: 24,
    heads: 32,
    kv_heads: Some(4),
    head_dim: None,
    max_positions: 32_768,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", false)?;
    let window = keys.size_or_null("sliding_window", Some(4096))?;
    let window = if keys.flag("use_sliding_window", false)? { window } else { None };
    let window = config.window_of_all(keys, window)?;
    let weighting = match keys.flag("norm_topk_prob", false)? {
        true => ExpertWeighting::Chosen,
        false => ExpertWeighting::All,
    };
    let experts = ExpertsBlock {
        experts: keys.size_by("num_experts", "num_local_experts", 128)?,
        top_k: keys.size("num_experts_per_tok", 8)?,
        intermediate: keys.size("moe_intermediate_size", 768)?,
        weighting,
        activation: GatedActivation::Plain(config.activation),
        bias: false,
        module: "mlp",
        router: "gate",
        matrices: ["gate_proj", "up_proj", "down_proj"],
        packing: Packing::RowsInTurn,
    };
    let is_sparse = sparse_layers(keys, &config, &experts)?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Before,
        attention: qwen3::attention(&config, angles, bias, window),
        feed_forward: if is_sparse[layer] { FeedForward::Experts(experts) } else { config.gated() },
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}

/// A layer is a mixture unless `mlp_only_layers` lists it or `decoder_sparse_step` skips it.
fn sparse_layers(keys: &Keys, config: &DecoderConfig, experts: &ExpertsBlock) -> Result<Vec<bool>> {
    let step = keys.size("decoder_sparse_step", 1)?;
    let dense = keys.sizes("mlp_only_layers")?.unwrap_or_default();
    if step == 0 {
        return Err(keys.wrong("decoder_sparse_step", "a number above 0"));
    }
    let is_sparse = |layer: usize| experts.experts > 0 && !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
    let is_sparse: Vec<bool> = (0..config.layers).map(is_sparse).collect();
    if is_sparse.contains(&true) {
        experts.check(config.layers)?;
    }
    Ok(is_sparse)
}
