//! candle-transformers' configs, from the plan, which has the checked sizes with every default filled in.

use std::collections::HashMap;

use candle_nn::Activation;
use candle_transformers::models::{gemma, llama, phi, siglip, t5};
use serde_json::{Value, json};

use super::causal;
use super::feed::WeightRule;
use crate::error::BadInput;
use crate::models::{Files, RopeKind, RopeSettings};
use crate::plan::{
    ActivationKind, CacheScope, CacheShape, EncoderInputKind, ExpertWeighting, ExpertsSpec, GatedActivation, Model, Op,
    Picture, Plan,
};

/// The config of one of candle's model files.
pub enum Config {
    Llama(llama::Config),
    Phi(phi::Config),
    Gemma(gemma::Config),
    /// One of [`causal::ARCHITECTURES`], whose config is read from JSON.
    Causal {
        architecture: &'static str,
        config: Value,
    },
    T5 {
        encoder: t5::Config,
        decoder: t5::Config,
    },
    PaliGemma {
        vision: siglip::VisionConfig,
        text: gemma::Config,
        picture: Picture,
    },
}

impl Config {
    /// Fails on what candle-transformers does not compute. `config` is the config.json that `model` was built from.
    pub fn new(model: &Model, config: &Value) -> Result<Self, BadInput> {
        let rope = crate::models::read(&Files { config, generation: None });
        let rope = rope.map_err(|error| BadInput::new(error.to_string()))?.rope;
        let shapes = Shapes { model, rope };
        match model.architecture {
            "llama" => shapes.llama().map(Config::Llama),
            "phi" => shapes.phi().map(Config::Phi),
            "gemma" => shapes.gemma("").map(Config::Gemma),
            "t5" | "mt5" => shapes.t5(),
            "paligemma" => shapes.paligemma(),
            architecture if causal::ARCHITECTURES.contains(&architecture) => {
                Ok(Config::Causal { architecture, config: shapes.causal()? })
            }
            other => Err(refused(other, "is not among the models that run here")),
        }
    }

    /// The tensors that are not the checkpoint's of the same name.
    pub fn rules(&self, model: &Model) -> HashMap<String, WeightRule> {
        let mut rules = HashMap::new();
        let Some(head) = model.decoder.head() else { return rules };
        let name = &model.matrices[head.weight.0].name;
        if name != HEAD {
            rules.insert(HEAD.to_owned(), WeightRule::SameAs(name.clone()));
        }
        if let Config::T5 { .. } = self {
            // candle scales a tied head's input by √d where transformers divides; the norm before it carries the right factor.
            rules.insert("decoder.final_layer_norm.weight".to_owned(), WeightRule::Scaled(head.scale));
            rules.insert(format!("{T5_DECODER}.SelfAttention.relative_attention_bias.weight"), WeightRule::Padded);
        }
        rules
    }
}

const HEAD: &str = "lm_head.weight";

const T5_DECODER: &str = "decoder.block.0.layer.0";

fn refused(architecture: &str, why: &str) -> BadInput {
    BadInput::new(format!("`--engine candle` cannot run this model: candle-transformers' `{architecture}` {why}"))
        .hint("use `--engine quantbench`, which runs it")
}

/// The sizes of a plan, and its rotary settings, where it has any.
struct Shapes<'a> {
    model: &'a Model,
    rope: Option<RopeSettings>,
}

impl Shapes<'_> {
    fn refused(&self, why: &str) -> BadInput {
        refused(self.model.architecture, why)
    }

    /// Rows and columns of the linear layer `name`. Fails where there is none, as in a model without layers.
    fn matrix(&self, name: &str) -> Result<(usize, usize), BadInput> {
        let named = |spec: &&crate::plan::MatrixSpec| spec.name.strip_suffix(".weight") == Some(name);
        let spec = self.model.matrices.iter().find(named);
        spec.map(|spec| (spec.n, spec.k)).ok_or_else(|| self.refused(&format!("needs `{name}`")))
    }

    fn has_bias(&self, prefix: &str) -> bool {
        self.model.vectors.iter().any(|spec| spec.name.starts_with(prefix) && spec.name.ends_with(".bias"))
    }

    /// Matrices of one name in the layers below `prefix`: how many layers there are.
    fn count(&self, prefix: &str, suffix: &str) -> usize {
        let names = self.model.matrices.iter().map(|spec| &spec.name);
        names.filter(|name| name.starts_with(prefix) && name.ends_with(suffix)).count()
    }

    /// The cache of one layer, and how many there are.
    fn caches(&self, scope: CacheScope) -> Result<(CacheShape, usize), BadInput> {
        let caches: Vec<&CacheShape> = self.model.caches.iter().filter(|cache| cache.scope == scope).collect();
        let first = caches.first().ok_or_else(|| self.refused("needs at least one layer"))?;
        Ok((**first, caches.len()))
    }

    /// The base, and how frequencies are made of it.
    fn rope(&self) -> Result<(f64, &RopeKind), BadInput> {
        let rope = self.rope.as_ref().ok_or_else(|| self.refused("needs rotary positions"))?;
        Ok((rope.theta, &rope.kind))
    }

    /// The base where nothing is scaled within the context.
    fn plain_rope(&self) -> Result<f64, BadInput> {
        match self.rope()? {
            (theta, RopeKind::Default) => Ok(theta),
            (_, kind) => Err(self.no_such_rope(kind)),
        }
    }

    fn no_such_rope(&self, kind: &RopeKind) -> BadInput {
        self.refused(&format!("has no rope scaling of type `{}`", kind.name()))
    }

    fn llama(&self) -> Result<llama::Config, BadInput> {
        let (vocab_size, hidden_size) = self.matrix("model.embed_tokens")?;
        let (cache, num_hidden_layers) = self.caches(CacheScope::Decoder)?;
        let num_attention_heads = self.matrix("model.layers.0.self_attn.q_proj")?.0 / cache.head_dim;
        if num_attention_heads * cache.head_dim != hidden_size {
            return Err(self.refused("has heads that share the hidden size evenly"));
        }
        if self.has_bias("") || activation(&self.model.decoder) != Some(Activation::Silu) {
            return Err(self.refused("has no biases and no activation but `silu`"));
        }
        let (theta, kind) = self.rope()?;
        let rope_scaling = match kind {
            RopeKind::Default => None,
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original } => Some(llama::Llama3RopeConfig {
                factor: *factor as f32,
                low_freq_factor: *low_freq_factor as f32,
                high_freq_factor: *high_freq_factor as f32,
                original_max_position_embeddings: *original as usize,
                rope_type: llama::Llama3RopeType::Llama3,
            }),
            RopeKind::Linear { .. }
            | RopeKind::Dynamic { .. }
            | RopeKind::Yarn(_)
            | RopeKind::LongRope { .. }
            | RopeKind::Proportional { .. } => {
                return Err(self.no_such_rope(kind));
            }
        };
        Ok(llama::Config {
            hidden_size,
            intermediate_size: self.matrix("model.layers.0.mlp.gate_proj")?.0,
            vocab_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: cache.kv_heads,
            use_flash_attn: false,
            rms_norm_eps: epsilon(&self.model.decoder),
            rope_theta: theta as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling,
            max_position_embeddings: self.model.context,
            tie_word_embeddings: self.matrix("lm_head").is_err(),
        })
    }

    /// candle keeps the fields of this config to itself, but reads them from JSON.
    fn phi(&self) -> Result<phi::Config, BadInput> {
        let (vocab_size, hidden_size) = self.matrix("model.embed_tokens")?;
        let (cache, num_hidden_layers) = self.caches(CacheScope::Decoder)?;
        if self.matrix("model.layers.0.self_attn.q_proj")?.0 != hidden_size {
            return Err(self.refused("has heads that share the hidden size evenly"));
        }
        let rotary_dim = self.model.ropes.first().map_or(cache.head_dim, |rope| rope.rotary_dim);
        let config = json!({
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": self.matrix("model.layers.0.mlp.fc1")?.0,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": hidden_size / cache.head_dim,
            "num_key_value_heads": cache.kv_heads,
            "hidden_act": activation(&self.model.decoder),
            "max_position_embeddings": self.model.context,
            "layer_norm_eps": epsilon(&self.model.decoder),
            "tie_word_embeddings": false,
            "rope_theta": self.plain_rope()?,
            // candle cuts the product with the head's length to a whole number.
            "partial_rotary_factor": (rotary_dim as f64 + 0.5) / cache.head_dim as f64,
            "qk_layernorm": false,
        });
        serde_json::from_value(config).map_err(|error| self.refused(&format!("does not take its config: {error}")))
    }

    /// The keys of all of [`causal::ARCHITECTURES`]: each reads its own.
    fn causal(&self) -> Result<Value, BadInput> {
        let (vocab_size, hidden_size) = self.matrix("model.embed_tokens")?;
        let (cache, num_hidden_layers) = self.caches(CacheScope::Decoder)?;
        let attention =
            self.model.decoder.ops.iter().find_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None });
        let attention = attention.ok_or_else(|| self.refused("needs at least one layer"))?;
        let heads = self.model.decoder.buffers[attention.q.0].width / cache.head_dim;
        let has_head_dim = matches!(self.model.architecture, "qwen3" | "qwen3_moe" | "mistral");
        if !has_head_dim && heads * cache.head_dim != hidden_size {
            return Err(self.refused("has heads that share the hidden size evenly"));
        }
        if self.model.caches.iter().any(|cache| cache.window.is_some()) {
            return Err(self.refused("attends over other windows than transformers does"));
        }
        if self.model.ropes.iter().any(|rope| rope.rotary_dim != cache.head_dim) {
            return Err(self.refused("rotates whole heads here"));
        }
        let mixture =
            self.model.decoder.ops.iter().find_map(|op| if let Op::Experts(spec) = op { Some(spec) } else { None });
        let dense = ["gate_proj", "gate_up_proj"].map(|name| self.dense_rows(name));
        let intermediate = match (dense, mixture) {
            ([Some(rows), _], _) => rows,
            ([None, Some(rows)], _) => rows / 2,
            ([None, None], Some(mixture)) => self.rows_of(mixture),
            ([None, None], None) => return Err(self.refused("needs a feed-forward")),
        };
        let mixtures = self.model.decoder.ops.iter().filter(|op| matches!(op, Op::Experts(_))).count();
        if mixture.is_some() && mixtures != num_hidden_layers {
            return Err(self.refused("has a mixture in every layer or in none"));
        }
        let hidden_act = match mixture.map(|mixture| mixture.activation) {
            None => activation(&self.model.decoder),
            Some(GatedActivation::Plain(kind)) => Some(named(kind)),
            Some(GatedActivation::ClampedSwiglu { .. }) => return Err(self.refused("has no clamped gates")),
        };
        Ok(json!({
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": cache.kv_heads,
            "head_dim": cache.head_dim,
            "max_position_embeddings": self.model.context,
            "rope_theta": self.plain_rope()?,
            "rms_norm_eps": epsilon(&self.model.decoder),
            "hidden_act": hidden_act,
            "tie_word_embeddings": self.matrix("lm_head").is_err(),
            "attention_bias": self.has_bias("model.layers.0.self_attn.o_proj"),
            // None of its length, by the check above; some of candle's files need a number.
            "sliding_window": self.model.context,
            "use_sliding_window": false,
            "max_window_layers": num_hidden_layers,
            "use_flash_attn": false,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": mixture.map_or(0, |mixture| self.rows_of(mixture)),
            "num_experts": mixture.map_or(0, |mixture| mixture.experts.len()),
            "num_local_experts": mixture.map_or(0, |mixture| mixture.experts.len()),
            "num_experts_per_tok": mixture.map_or(0, |mixture| mixture.top_k),
            "norm_topk_prob": mixture.is_some_and(|mixture| mixture.weighting == ExpertWeighting::Chosen),
        }))
    }

    /// Rows of the first matrix of this name in a feed-forward that is no mixture.
    fn dense_rows(&self, name: &str) -> Option<usize> {
        let end = format!(".mlp.{name}.weight");
        self.model.matrices.iter().find(|spec| spec.name.ends_with(&end)).map(|spec| spec.n)
    }

    /// Elements between the matrices of an expert.
    fn rows_of(&self, mixture: &ExpertsSpec) -> usize {
        mixture.experts.first().map_or(0, |expert| self.model.matrices[expert.gate.weight.0].n)
    }

    /// The config of the model below `prefix`, which is empty or ends with a dot.
    fn gemma(&self, prefix: &str) -> Result<gemma::Config, BadInput> {
        let layer = format!("{prefix}model.layers.0");
        let (vocab_size, hidden_size) = self.matrix(&format!("{prefix}model.embed_tokens"))?;
        let (cache, num_hidden_layers) = self.caches(CacheScope::Decoder)?;
        if self.matrix(&format!("{prefix}lm_head")).is_ok() {
            return Err(
                self.refused("always ties the head to the token embedding, and this checkpoint has a head of its own")
            );
        }
        Ok(gemma::Config {
            attention_bias: self.has_bias(&format!("{layer}.self_attn")),
            head_dim: cache.head_dim,
            hidden_act: activation(&self.model.decoder),
            hidden_activation: None,
            hidden_size,
            intermediate_size: self.matrix(&format!("{layer}.mlp.gate_proj"))?.0,
            num_attention_heads: self.matrix(&format!("{layer}.self_attn.q_proj"))?.0 / cache.head_dim,
            num_hidden_layers,
            num_key_value_heads: cache.kv_heads,
            rms_norm_eps: epsilon(&self.model.decoder),
            rope_theta: self.plain_rope()?,
            vocab_size,
            max_position_embeddings: self.model.context,
        })
    }

    fn t5(&self) -> Result<Config, BadInput> {
        let (vocab_size, d_model) = self.matrix("shared")?;
        let (cache, n_decoder) = self.caches(CacheScope::Decoder)?;
        let buckets = self.matrix(&format!("{T5_DECODER}.SelfAttention.relative_attention_bias"))?.0;
        let feed_forward = "decoder.block.0.layer.2.DenseReluDense";
        let gated = self.matrix(&format!("{feed_forward}.wi_0")).ok();
        let encoder = t5::Config {
            vocab_size,
            d_model,
            d_kv: cache.head_dim,
            d_ff: gated.map_or_else(|| self.matrix(&format!("{feed_forward}.wi")), Ok)?.0,
            num_layers: self.count("encoder.block.", ".SelfAttention.q.weight"),
            num_heads: cache.kv_heads,
            relative_attention_num_buckets: buckets,
            relative_attention_max_distance: self.model.biases.first().map_or(128, |bias| bias.max_distance),
            layer_norm_epsilon: epsilon(&self.model.decoder),
            feed_forward_proj: t5::ActivationWithOptionalGating {
                gated: gated.is_some(),
                activation: activation(&self.model.decoder).unwrap_or_default(),
            },
            tie_word_embeddings: false,
            ..t5::Config::default()
        };
        let decoder = t5::Config {
            num_layers: 0,
            num_decoder_layers: Some(n_decoder),
            relative_attention_num_buckets: 2 * buckets,
            ..encoder.clone()
        };
        Ok(Config::T5 { encoder, decoder })
    }

    fn paligemma(&self) -> Result<Config, BadInput> {
        let encoder = self.model.encoder.as_ref().ok_or_else(|| self.refused("needs a vision tower"))?;
        let EncoderInputKind::Picture(picture) = encoder.input else {
            return Err(self.refused("needs a vision tower"));
        };
        let tower = "vision_tower.vision_model";
        let layers = format!("{tower}.encoder.layers.");
        let (intermediate_size, hidden_size) = self.matrix(&format!("{layers}0.mlp.fc1"))?;
        let vision = siglip::VisionConfig {
            hidden_size,
            intermediate_size,
            num_hidden_layers: self.count(&layers, ".self_attn.q_proj.weight"),
            num_attention_heads: self.caches(CacheScope::Encoder)?.0.kv_heads,
            num_channels: 3,
            image_size: picture.size,
            patch_size: picture.patch,
            hidden_act: activation(&encoder.plan).unwrap_or_default(),
            layer_norm_eps: epsilon(&encoder.plan),
        };
        Ok(Config::PaliGemma { vision, text: self.gemma("language_model.")?, picture })
    }
}

/// The epsilon of all norms of a plan.
fn epsilon(plan: &Plan) -> f64 {
    let epsilon = plan.ops.iter().find_map(|op| if let Op::Norm(spec) = op { Some(spec.norm.epsilon) } else { None });
    epsilon.map_or(1e-6, f64::from)
}

/// The activation of all feed-forwards of a plan.
fn activation(plan: &Plan) -> Option<Activation> {
    let kind = plan.ops.iter().find_map(|op| if let Op::Activation(spec) = op { Some(spec.kind) } else { None });
    kind.map(named)
}

fn named(kind: ActivationKind) -> Activation {
    match kind {
        ActivationKind::Silu => Activation::Silu,
        ActivationKind::GeluTanh => Activation::GeluPytorchTanh,
        ActivationKind::Relu => Activation::Relu,
    }
}
