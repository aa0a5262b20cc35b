//! What several architectures read from `config.json`.

use candle_core::{Result, bail};

use super::keys::Keys;
use crate::plan::ActivationKind;

/// The activation that transformers calls `name`, where it is computed here.
pub fn activation_named(name: &str) -> Option<ActivationKind> {
    match name {
        "silu" | "swish" => Some(ActivationKind::Silu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Some(ActivationKind::GeluTanh),
        "relu" => Some(ActivationKind::Relu),
        _ => None,
    }
}

/// The activation that `key` names.
pub fn activation(keys: &Keys, key: &'static str, default: &str) -> Result<ActivationKind> {
    let name = keys.optional_word(key)?.unwrap_or(default);
    activation_named(name).ok_or_else(|| {
        keys.refused(
            key,
            "this activation is not computed here; known are `silu`, `gelu_new`, `gelu_pytorch_tanh`, `relu`",
        )
    })
}

/// A window of attention that no sequence of the model outgrows is none.
pub fn check_window(keys: &Keys, context: usize) -> Result<()> {
    match keys.optional_size("sliding_window")? {
        Some(window) if window < context => {
            Err(keys
                .refused("sliding_window", "attention over a window is not computed here, unless it spans the context"))
        }
        _ => Ok(()),
    }
}

/// Beyond any model's; the bytes of `MOST_LAYERS` layers of such matrices can be counted in 64 bits.
const LARGEST_SIZE: usize = 1 << 22;
const MOST_LAYERS: usize = 1 << 12;

/// Rows, columns and what makes them up, which a plan divides by, indexes with and multiplies: 1 to `LARGEST_SIZE`.
pub fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| !(1..=LARGEST_SIZE).contains(size)) {
        Some((key, size)) => bail!("config.json says `{key}` {size}; it must be 1 to {LARGEST_SIZE}"),
        None => Ok(()),
    }
}

/// Layers of a stack: `MOST_LAYERS` at most.
pub fn check_layers(key: &str, n: usize) -> Result<()> {
    if n > MOST_LAYERS {
        bail!("config.json says `{key}` {n}; it must be at most {MOST_LAYERS}");
    }
    Ok(())
}

/// Heads of a size that fits, and query heads that share key/value heads evenly.
pub fn check_heads(heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
    check_sizes(&[("head_dim", head_dim), ("num_attention_heads × head_dim", heads.saturating_mul(head_dim))])?;
    if !heads.is_multiple_of(kv_heads) {
        bail!("config.json says {heads} attention heads over {kv_heads} key/value heads; they must divide");
    }
    Ok(())
}
