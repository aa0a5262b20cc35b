//! Settings that change what transformers computes and are not computed here, and values of the wrong kind.

use serde_json::{Value, json};

use crate::{Folder, Object, set};

/// The error of a config, or its warnings.
fn said(model: &str, change: impl FnOnce(&mut Object)) -> Result<Vec<(String, String)>, String> {
    Folder::changed(model, change).build().map(|(_, warnings)| warnings).map_err(|error| error.to_string())
}

fn inside(section: &'static str, keys: Value) -> impl FnOnce(&mut Object) {
    move |config| config[section].as_object_mut().unwrap().extend(keys.as_object().unwrap().clone())
}

fn refused(model: &str, key: &str, shown: &str, change: impl FnOnce(&mut Object)) {
    let error = said(model, change).expect_err(&format!("{model} {key} {shown}"));
    assert!(error.contains(&format!("`{key}`")) && error.contains(shown), "{model} {key} {shown}: {error}");
}

#[test]
fn settings_of_llama_phi_and_t5_that_are_not_computed_are_refused() {
    for (model, key, value) in [
        // Each of these gives other tokens or logits in transformers 5.24.
        ("llama-odd", "sliding_window", json!(4)),
        ("llama-odd", "attention_chunk_size", json!(4)),
        ("llama-odd", "is_causal", json!(false)),
        ("llama-odd", "hidden_act", json!("gelu")),
        ("phi-odd", "qk_layernorm", json!(true)),
        ("phi-odd", "sliding_window", json!(4)),
        ("phi-odd", "is_causal", json!(false)),
        ("t5-tiny", "sliding_window", json!(2)),
        ("t5-tiny", "attention_chunk_size", json!(2)),
        ("t5-tied-relu", "feed_forward_proj", json!("gelu")),
        ("t5-tiny", "is_encoder_decoder", json!(false)),
        // transformers ends with an error.
        ("llama-odd", "per_layer_config", json!({"0": {"rms_norm_eps": 0.5}})),
        // Of other families than the model's type says.
        ("llama-odd", "attn_logit_softcapping", json!(50.0)),
        ("llama-odd", "final_logit_softcapping", json!(30.0)),
        ("llama-odd", "logit_scale", json!(0.0625)),
        ("llama-odd", "residual_multiplier", json!(0.22)),
        ("llama-odd", "no_rope_layers", json!([1, 0])),
        ("llama-odd", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("phi-odd", "num_local_experts", json!(4)),
    ] {
        refused(model, key, &value.to_string(), set(json!({ key: value })));
    }
    // 0.45 of 20 elements is an odd number, with which transformers ends with an error.
    let error = said("phi-odd", set(json!({"partial_rotary_factor": 0.45}))).unwrap_err();
    assert!(error.contains("9 of 20"), "{error}");
}

#[test]
fn settings_at_the_value_that_means_off_change_nothing() {
    for (key, value) in [
        ("sliding_window", json!(null)),
        ("sliding_window", json!(512)),
        ("use_sliding_window", json!(true)),
        ("is_causal", json!(true)),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("attn_logit_softcapping", json!(null)),
        ("logit_scale", json!(1.0)),
        ("residual_multiplier", json!(1)),
        ("pretraining_tp", json!(2)),
        ("foo", json!(null)),
        ("foo", json!([])),
    ] {
        assert_eq!(said("llama-odd", set(json!({ key: value }))), Ok(vec![]), "{key}");
    }
}

#[test]
fn the_parts_of_paligemma_must_be_those_that_are_computed() {
    let model = "paligemma-tiny";
    let gemma2 = json!({"model_type": "gemma2", "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh"});
    refused(model, "text_config.model_type", "gemma2", inside("text_config", gemma2));
    for (section, key, value) in [
        ("text_config", "model_type", json!("gemma3_text")),
        ("vision_config", "model_type", json!("clip_vision_model")),
        ("text_config", "use_bidirectional_attention", json!(false)),
        ("text_config", "final_logit_softcapping", json!(30.0)),
        ("text_config", "sliding_window", json!(8)),
        ("text_config", "query_pre_attn_scalar", json!(256)),
        ("text_config", "is_causal", json!(false)),
        ("vision_config", "hidden_act", json!("quick_gelu")),
        ("vision_config", "image_size", json!([224, 224])),
    ] {
        refused(model, &format!("{section}.{key}"), &value.to_string(), inside(section, json!({ key: value })));
    }
    refused(model, "projection_dim", "64", set(json!({"projection_dim": 64})));
    refused(model, "text_config", "\"gemma\"", set(json!({"text_config": "gemma"})));
    let scaling = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    let error = said(model, inside("text_config", scaling)).unwrap_err();
    assert!(error.contains("`dynamic`"), "{error}");
}

#[test]
fn settings_of_gemma_that_are_not_computed_are_refused() {
    // The text of the golden PaliGemma by itself.
    let gemma = |change: &dyn Fn(&mut Object)| {
        let mut config = crate::object(&Folder::of("paligemma-odd").text("config.json"))["text_config"].clone();
        change(config.as_object_mut().unwrap());
        quantbench::models::build(&config)
    };
    assert!(gemma(&|_| {}).is_ok());
    for (key, value) in [
        ("use_bidirectional_attention", json!(true)),
        ("sliding_window", json!(4)),
        ("is_causal", json!(false)),
        ("hidden_act", json!("quick_gelu")),
        ("query_pre_attn_scalar", json!(256)),
        ("attn_logit_softcapping", json!(50.0)),
    ] {
        let error = gemma(&|config| set(json!({ key: value.clone() }))(config)).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
}

#[test]
fn scalings_that_are_not_computed_are_named() {
    for (scaling, key, shown) in [
        (json!({"type": "su", "factor": 4.0}), "rope_scaling.type", "su"),
        (json!({"rope_type": "mrope"}), "rope_scaling.rope_type", "mrope"),
        (json!({"type": "linear", "rope_type": "dynamic", "factor": 4.0}), "rope_scaling.rope_type", "\"linear\""),
        (json!({"rope_type": "linear"}), "rope_scaling.factor", "missing"),
        (json!({"rope_type": "linear", "factor": "4.0"}), "rope_scaling.factor", "\"4.0\""),
        (json!({"rope_type": "linear", "factor": 0}), "rope_scaling.factor", "0"),
        (json!({"rope_type": "linear", "factor": -2.0}), "rope_scaling.factor", "-2.0"),
        (json!({"rope_type": "dynamic"}), "rope_scaling.factor", "missing"),
        (json!({"rope_type": "yarn"}), "rope_scaling.factor", "missing"),
        (json!({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}), "rope_scaling.truncate", "\"no\""),
        (json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}), "rope_scaling.beta_fast", "\"32\""),
        (
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
            "rope_scaling.high_freq_factor",
            "missing",
        ),
        (json!({"rope_type": "longrope", "short_factor": [1.0]}), "rope_scaling.short_factor", "10 numbers"),
        (json!({"rope_type": 3}), "rope_scaling.rope_type", "3"),
        (json!({"full_attention": {"rope_type": "default"}}), "rope_scaling", "full_attention"),
        (json!("linear"), "rope_scaling", "linear"),
        (
            json!({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
            "rope_scaling.partial_rotary_factor",
            "0.5",
        ),
        (json!({"rope_theta": "10000"}), "rope_scaling.rope_theta", "\"10000\""),
    ] {
        refused("llama-odd", key, shown, set(json!({ "rope_scaling": scaling })));
    }
    refused("llama-odd", "rope_theta", "\"1e4\"", set(json!({"rope_theta": "1e4"})));
    refused("llama-odd", "rope_theta", "0", set(json!({"rope_theta": 0})));
}

/// candle's own models compute fewer scalings: llama's alone.
#[test]
fn candle_refuses_a_scaling_that_it_would_leave_out() {
    for (model, scaling, runs) in [
        ("llama-odd", json!({"rope_type": "linear", "factor": 2.0}), false),
        ("llama-odd", json!({"rope_type": "yarn", "factor": 2.0}), false),
        ("llama-odd", json!({"rope_type": "proportional"}), false),
        ("llama-odd", json!({"rope_type": "dynamic", "factor": 2.0}), false),
        ("llama-odd", json!({"rope_type": "default"}), true),
        ("phi-odd", json!({"rope_type": "yarn", "factor": 2.0}), false),
        ("phi-odd", json!({"rope_type": "dynamic", "factor": 2.0}), false),
        (
            "phi-odd",
            json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
            false,
        ),
    ] {
        // Beside the other spelling, which is not read.
        let rope = json!({"rope_scaling": scaling, "rope_parameters": {"rope_type": "default"}});
        let folder = Folder::changed(model, set(rope));
        let (plan, _) = folder.build().unwrap();
        let error =
            quantbench::engine::candle::check(&plan, &folder.open().config).err().map(|error| error.to_string());
        let kind = scaling["rope_type"].as_str().unwrap();
        assert!(error.as_ref().map_or(runs, |error| !runs && error.contains(kind)), "{model} {kind}: {error:?}");
    }
}

#[test]
fn a_value_of_the_wrong_kind_is_named_with_its_key() {
    for (model, key, value) in [
        ("llama-odd", "hidden_size", json!("100")),
        ("llama-odd", "hidden_size", json!(100.0)),
        ("llama-odd", "num_hidden_layers", json!(-1)),
        ("llama-odd", "rms_norm_eps", json!("NaN")),
        ("llama-odd", "tie_word_embeddings", json!("false")),
        ("llama-odd", "eos_token_id", json!(2.5)),
        ("llama-odd", "eos_token_id", json!("2")),
        ("llama-odd", "eos_token_id", json!([1, "2"])),
        ("llama-odd", "eos_token_id", json!(true)),
        ("phi-odd", "partial_rotary_factor", json!("0.4")),
        ("t5-tiny", "feed_forward_proj", json!(7)),
        ("t5-tiny", "decoder_start_token_id", json!("0")),
        ("t5-tiny", "d_ff", json!({})),
    ] {
        refused(model, key, &value.to_string(), set(json!({ key: value })));
    }
}
