//! Model architectures: each file reads a `config.json` and builds a plan. A model never names a precision.

mod config;
mod gemma;
mod llama;
mod paligemma;
mod phi;
mod siglip;
mod t5;

use candle_core::{Result, bail};
use serde_json::Value;

use crate::plan::Model;

/// A row of [`ARCHITECTURES`].
pub struct Architecture {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// For help and README.
    pub doc: &'static str,
    pub build: fn(&Value) -> Result<Model>,
}

/// Every architecture that can be run.
pub static ARCHITECTURES: &[Architecture] =
    &[llama::ARCHITECTURE, phi::ARCHITECTURE, t5::ARCHITECTURE, gemma::ARCHITECTURE, paligemma::ARCHITECTURE];

/// The model that a `config.json` describes. Fails on an unknown `model_type`, a missing or mistyped key, and on settings
/// that the architecture's file does not compute.
pub fn build(config: &Value) -> Result<Model> {
    let known = || ARCHITECTURES.iter().map(|a| format!("`{}`", a.model_type)).collect::<Vec<_>>().join(", ");
    let Some(model_type) = config.get("model_type").and_then(Value::as_str) else {
        bail!("config.json has no `model_type`; known are {}", known());
    };
    match ARCHITECTURES.iter().find(|architecture| architecture.model_type == model_type) {
        Some(architecture) => (architecture.build)(config),
        None => bail!("config.json says `model_type` `{model_type}`; known are {}", known()),
    }
}
