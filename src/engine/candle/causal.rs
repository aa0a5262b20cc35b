//! candle-transformers' decoder-only models that are called alike and read their config from JSON.

use candle_core::{Error, Result, Tensor};
use candle_nn::VarBuilder;
#[cfg(not(feature = "cuda"))]
use candle_transformers::models::qwen3_moe;
use candle_transformers::models::{mistral, mixtral, olmo2, phi3, qwen2, qwen3};
use serde_json::Value;

/// A model with its caches.
pub trait Causal: Send + Sync {
    /// Logits behind the last of `ids`, `[1, t]` tokens that follow `position` others.
    fn forward(&mut self, ids: &Tensor, position: usize) -> Result<Tensor>;

    /// It and its caches; the weights are shared.
    fn boxed(&self) -> Box<dyn Causal>;
}

impl Clone for Box<dyn Causal> {
    fn clone(&self) -> Self {
        (**self).boxed()
    }
}

macro_rules! causal {
    ($($model:ty),*) => {
        $(impl Causal for $model {
            fn forward(&mut self, ids: &Tensor, position: usize) -> Result<Tensor> {
                <$model>::forward(self, ids, position)
            }

            fn boxed(&self) -> Box<dyn Causal> {
                Box::new(self.clone())
            }
        })*
    };
}

causal!(qwen2::ModelForCausalLM, qwen3::ModelForCausalLM, mistral::Model, mixtral::Model, olmo2::Model, phi3::Model);

// With CUDA its experts are kernels that are linked with CUDA's runtime, so that a binary with them starts on no machine without it.
#[cfg(not(feature = "cuda"))]
causal!(qwen3_moe::ModelForCausalLM);

/// Those that run here.
pub const ARCHITECTURES: &[&str] = &[
    "qwen2",
    "qwen3",
    #[cfg(not(feature = "cuda"))]
    "qwen3_moe",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
];

/// candle's model of `architecture`.
///
/// # Errors
/// If candle does not take the config, or a tensor is missing.
pub fn load(architecture: &str, config: &Value, tensors: VarBuilder) -> Result<Box<dyn Causal>> {
    fn of<C: serde::de::DeserializeOwned>(config: &Value) -> Result<C> {
        serde_json::from_value(config.clone())
            .map_err(|error| Error::Msg(format!("candle takes no such config: {error}")))
    }
    Ok(match architecture {
        "qwen2" => Box::new(qwen2::ModelForCausalLM::new(&of(config)?, tensors)?),
        "qwen3" => Box::new(qwen3::ModelForCausalLM::new(&of(config)?, tensors)?),
        #[cfg(not(feature = "cuda"))]
        "qwen3_moe" => Box::new(qwen3_moe::ModelForCausalLM::new(&of(config)?, tensors)?),
        "mistral" => Box::new(mistral::Model::new(&of(config)?, tensors)?),
        "mixtral" => Box::new(mixtral::Model::new(&of(config)?, tensors)?),
        "olmo2" => Box::new(olmo2::Model::new(&of(config)?, tensors)?),
        "phi3" => Box::new(phi3::Model::new(&of(config)?, tensors)?),
        other => candle_core::bail!("candle's `{other}` is not called here"),
    })
}
