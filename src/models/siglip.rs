//! SigLIP's vision tower (Zhai et al. 2023): patches, learned positions, pre-norm blocks that see everything.

use candle_core::{Result, bail};

use super::config::{activation, check_layers, check_sizes};
use super::keys::Keys;
use super::rule::{HARMLESS, REFUSED, Rule};
use crate::plan::{ActivationKind, BufferId, Builder, CacheId, CacheScope, LinearLayer, Mask, Path, Picture, Role};

/// PaliGemma reads the rows of the last norm, not the pooling head, and projects them with a matrix of its own.
const RULE: Rule = Rule {
    harmless: &[HARMLESS, &["num_image_tokens", "projection_dim", "projector_hidden_act", "vision_use_head"]],
    refused: &[REFUSED],
};

/// A checked config, with SiglipVisionConfig's defaults where a file leaves a key out.
pub struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_channels: usize,
    pub image_size: usize,
    pub patch_size: usize,
    layer_norm_eps: f32,
    activation: ActivationKind,
}

impl Config {
    pub fn read(keys: &Keys) -> Result<Self> {
        let config = Self {
            hidden_size: keys.size("hidden_size", 768)?,
            intermediate_size: keys.size("intermediate_size", 3072)?,
            num_hidden_layers: keys.size("num_hidden_layers", 12)?,
            num_attention_heads: keys.size("num_attention_heads", 12)?,
            num_channels: keys.size("num_channels", 3)?,
            image_size: keys.size("image_size", 224)?,
            patch_size: keys.size("patch_size", 16)?,
            layer_norm_eps: keys.number("layer_norm_eps", 1e-6)? as f32,
            activation: activation(keys, "hidden_act", "gelu_pytorch_tanh")?,
        };
        config.check()?;
        keys.finish(&RULE)?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        check_sizes(&[
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("patch_size", self.patch_size),
            ("image_size", self.image_size),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        let (size, patch) = (self.image_size, self.patch_size);
        check_sizes(&[("(image_size / patch_size)²", (size / patch).pow(2)), ("patch_size²", patch.pow(2))])?;
        let heads_divide = self.hidden_size.is_multiple_of(self.num_attention_heads);
        if !size.is_multiple_of(patch) || !heads_divide || self.num_channels != 3 {
            bail!(
                "config.json's vision tower must have 3 channels, an image size ({size}) in whole patches ({patch}) and equal heads"
            );
        }
        Ok(())
    }
}

/// The tower under `path`: patches to the last norm.
pub fn tower(b: &mut Builder, path: &Path, config: &Config, picture: Picture) -> BufferId {
    let path = path.at("vision_model");
    let embeddings = path.at("embeddings");
    let patches = b.patches(picture, config.num_channels);
    let x = b.linear_as(Role::Patches, patches, embeddings.at("patch_embedding"), config.hidden_size, true);
    let positions =
        b.matrix(&embeddings.at("position_embedding"), picture.patches(), config.hidden_size, Role::Embedding);
    b.add_rows(x, positions);
    // The layers of one call use it one after the other.
    let heads = config.num_attention_heads;
    let cache = b.cache(heads, config.hidden_size / heads, CacheScope::Encoder);
    for layer in 0..config.num_hidden_layers {
        block(b, &path.at("encoder").at("layers").at(layer), config, cache, x);
    }
    b.layer_norm(&path.at("post_layernorm"), config.layer_norm_eps, x)
}

/// `x += attention(norm(x))`, then `x += feed_forward(norm(x))`.
fn block(b: &mut Builder, path: &Path, config: &Config, cache: CacheId, x: BufferId) {
    let (n, d) = (config.hidden_size, config.hidden_size / config.num_attention_heads);
    let h = b.layer_norm(&path.at("layer_norm1"), config.layer_norm_eps, x);
    let attention = path.at("self_attn");
    let names = ["q_proj", "k_proj", "v_proj"];
    let [q, k, v] = b.linears(h, names.map(|name| LinearLayer { path: attention.at(name), n, bias: true }));
    b.append(k, v, cache);
    let h = b.attention(q, cache, 1.0 / (d as f32).sqrt(), Mask::Full, None);
    let h = b.linear(h, attention.at("out_proj"), n, true);
    b.add_to(x, h);

    let h = b.layer_norm(&path.at("layer_norm2"), config.layer_norm_eps, x);
    let h = b.linear(h, path.at("mlp").at("fc1"), config.intermediate_size, true);
    let h = b.activate(config.activation, h, None);
    let h = b.linear(h, path.at("mlp").at("fc2"), n, true);
    b.add_to(x, h);
}
