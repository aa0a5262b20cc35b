//! Mixtral (Jiang et al. 2024): Mistral's blocks, whose feed-forward is a mixture of experts.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, FeedForward, NormPlace};
use super::experts::{ExpertsBlock, Packing};
use super::keys::Keys;
use super::rope::{RopeBasis, RopeSettings};
use super::rule::{HARMLESS, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{Builder, ExpertWeighting, GatedActivation, Model, Path};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "mixtral", doc: "Mixtral: decoder-only, a mixture of experts in each layer", build };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    head_dim: None,
    max_positions: 131_072,
    epsilon: ("rms_norm_eps", 1e-5),
    activation: ("hidden_act", "silu"),
    tied: false,
};

/// transformers' base where a file has none.
const THETA: f64 = 1_000_000.0;

/// Noise is for training.
const RULE: Rule = Rule { harmless: &[HARMLESS, &["router_jitter_noise"]], refused: &[REFUSED, REFUSED_IN_DECODERS] };

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let window = keys.optional_size("sliding_window")?;
    let window = config.window_of_all(keys, window)?;
    let experts = ExpertsBlock {
        experts: keys.size_by("num_local_experts", "num_experts", 8)?,
        top_k: keys.size("num_experts_per_tok", 2)?,
        intermediate: config.intermediate_size,
        weighting: ExpertWeighting::Chosen,
        activation: GatedActivation::Plain(config.activation),
        bias: false,
        module: "block_sparse_moe",
        router: "gate",
        matrices: ["w1", "w3", "w2"],
        packing: Packing::RowsInTurn,
    };
    experts.check(config.layers)?;
    let rope = RopeSettings::read(keys, RopeBasis { theta: THETA, ..config.rope_basis() })?;
    keys.finish(&RULE)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |_| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock { window, ..config.attention(Some(angles)) },
        feed_forward: FeedForward::Experts(experts),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
