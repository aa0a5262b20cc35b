//! What several architectures read from `config.json`.

use candle_core::{Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::plan::{ActivationKind, Rope};

/// The keys of a config struct, with serde's own words for what is missing or mistyped.
pub fn parse<T: DeserializeOwned>(config: &Value) -> Result<T> {
    serde_json::from_value(config.clone()).map_err(|error| candle_core::Error::Msg(error.to_string()))
}

/// `eos_token_id`: absent, one id or several.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    #[default]
    None,
    One(u32),
    Several(Vec<u32>),
}

impl TokenIds {
    pub fn to_vec(&self) -> Vec<u32> {
        match self {
            TokenIds::None => Vec::new(),
            TokenIds::One(id) => vec![*id],
            TokenIds::Several(ids) => ids.clone(),
        }
    }
}

/// The activation that `hidden_act` names.
pub fn activation(name: &str) -> Result<ActivationKind> {
    match name {
        "silu" | "swish" => Ok(ActivationKind::Silu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(ActivationKind::GeluTanh),
        other => bail!("config.json says activation `{other}`; known are `silu`, `gelu_new`, `gelu_pytorch_tanh`"),
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

/// Rotary settings in either spelling: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RopeSettings {
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    rope_parameters: Option<RopeScaling>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Debug, Clone, Deserialize)]
struct RopeScaling {
    /// Older files say `type`.
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl RopeSettings {
    /// Fails on a scaling that is not computed here and on a scaling whose keys are missing.
    pub fn rope(&self, head_dim: usize, default_partial: f64) -> Result<Rope> {
        let scaling = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = scaling.and_then(|s| s.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let partial = scaling.and_then(|s| s.partial_rotary_factor).or(self.partial_rotary_factor);
        let rotary_dim = (head_dim as f64 * partial.unwrap_or(default_partial)) as usize / 2 * 2;
        if rotary_dim == 0 || rotary_dim > head_dim {
            bail!("config.json rotates {rotary_dim} of {head_dim} head elements; it must be 2 to {head_dim}");
        }
        let frequencies = (0..rotary_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / rotary_dim as f32;
            1.0 / (theta as f32).powf(exponent)
        });
        let inverse_frequencies = match scaling {
            None => frequencies.collect(),
            Some(scaling) => scaling.scale(frequencies.collect())?,
        };
        Ok(Rope { rotary_dim, inverse_frequencies })
    }
}

impl RopeScaling {
    fn scale(&self, frequencies: Vec<f32>) -> Result<Vec<f32>> {
        let need = |value: Option<f64>, key: &str| match value {
            Some(value) if value > 0.0 => Ok(value as f32),
            _ => Err(candle_core::Error::Msg(format!("config.json's rope scaling needs a positive `{key}`"))),
        };
        match self.rope_type.as_deref().unwrap_or("default") {
            "default" => Ok(frequencies),
            "linear" => {
                let factor = need(self.factor, "factor")?;
                Ok(frequencies.into_iter().map(|f| f / factor).collect())
            }
            "llama3" => {
                let factor = need(self.factor, "factor")?;
                let low = need(self.low_freq_factor, "low_freq_factor")?;
                let high = need(self.high_freq_factor, "high_freq_factor")?;
                let original = need(self.original_max_position_embeddings, "original_max_position_embeddings")?;
                Ok(frequencies.into_iter().map(|f| llama3_frequency(f, factor, low, high, original)).collect())
            }
            other => bail!("config.json says rope type `{other}`; known are `default`, `linear`, `llama3`"),
        }
    }
}

/// Llama 3.1's scaling: short wavelengths stay, long ones are stretched by `factor`, those between are blended.
fn llama3_frequency(frequency: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(config: Value) -> Result<Rope> {
        parse::<RopeSettings>(&config)?.rope(64, 1.0)
    }

    #[test]
    fn both_spellings_give_the_same_frequencies() {
        let scaling = r#"{"rope_type":"llama3","factor":32.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192}"#;
        let scaling: Value = serde_json::from_str(scaling).unwrap();
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = 500_000.0.into();
        let old = rope(serde_json::json!({"rope_theta": 500_000.0, "rope_scaling": scaling})).unwrap();
        let new = rope(serde_json::json!({"rope_parameters": parameters})).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.inverse_frequencies[0], 1.0);
        let plain = rope(serde_json::json!({"rope_theta": 500_000.0})).unwrap();
        assert_eq!(old.inverse_frequencies[31], plain.inverse_frequencies[31] / 32.0);
    }

    #[test]
    fn partial_rotation_is_cut_to_an_even_number() {
        let rope = parse::<RopeSettings>(&serde_json::json!({"partial_rotary_factor": 0.4})).unwrap().rope(32, 1.0);
        assert_eq!(rope.unwrap().rotary_dim, 12);
    }

    #[test]
    fn unknown_scaling_is_named() {
        let error = rope(serde_json::json!({"rope_scaling": {"type": "yarn", "factor": 2.0}})).unwrap_err();
        assert!(error.to_string().contains("`yarn`"), "{error}");
    }
}
