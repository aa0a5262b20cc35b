//! Configs of every family with a feature of another, without a key, and with values that no model has.

use std::fs;
use std::path::Path;

use quantbench::models::{self, ARCHITECTURES, Fate, Files};
use quantbench::weights::{builtin_models, json};
use serde_json::{Value, json};

/// The configs in tests/golden/architectures, the built-in ones, and those of families that are others under another name.
fn configs() -> Vec<(String, Value)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut configs: Vec<(String, Value)> = Vec::new();
    for folder in ["tests/golden/architectures/models", "tests/golden/models"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let config = json::parse(&fs::read(path.join("config.json")).unwrap()).unwrap();
            configs.push((path.file_name().unwrap().to_string_lossy().into_owned(), config));
        }
    }
    configs.extend(builtin_models().iter().map(|shape| (shape.name.to_owned(), shape.config())));
    let of = |name: &str| configs.iter().find(|(found, _)| found == name).expect("a golden config").1.clone();
    let renamed = |name: &str, model_type: &str| with(&of(name), "model_type", model_type.into());
    let derived = [
        ("mt5", renamed("t5-tiny", "mt5")),
        ("ministral", renamed("mistral", "ministral")),
        ("gemma", with(&of("paligemma-tiny")["text_config"], "model_type", "gemma".into())),
        ("gemma3-nested", json!({"model_type": "gemma3", "text_config": of("gemma3-odd")})),
    ];
    configs.extend(derived.map(|(name, config)| (name.to_owned(), config)));
    configs
}

fn config(name: &str) -> Value {
    configs().into_iter().find(|(found, _)| found == name).expect("a golden or built-in config").1
}

fn build(config: &Value) -> Result<models::Built, String> {
    models::read(&Files { config, generation: None }).map_err(|error| error.to_string())
}

fn with(config: &Value, key: &str, value: Value) -> Value {
    let mut changed = config.clone();
    changed[key] = value;
    changed
}

#[test]
fn every_family_has_a_config_here() {
    let seen: Vec<String> =
        configs().iter().map(|(_, config)| config["model_type"].as_str().unwrap().to_owned()).collect();
    let missing = ARCHITECTURES.iter().map(|family| family.model_type);
    let missing = missing.filter(|family| !seen.iter().any(|seen| seen == family));
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn features_that_a_family_does_not_compute_are_refused() {
    for (model, refused) in [
        (
            "qwen2-odd",
            &[("attn_logit_softcapping", json!(50.0)), ("num_experts", json!(4)), ("use_qk_norm", json!(true))],
        ),
        ("qwen3-odd", &[("logit_scale", json!(0.5)), ("no_rope_layers", json!([1, 0])), ("clip_qkv", json!(8.0))]),
        (
            "qwen3_moe-odd",
            &[("final_logit_softcapping", json!(30.0)), ("n_routed_experts", json!(4)), ("is_causal", json!(false))],
        ),
        (
            "mistral",
            &[
                ("layer_types", json!(["sliding_attention", "full_attention"])),
                ("qk_norm", json!(true)),
                ("num_local_experts", json!(8)),
            ],
        ),
        (
            "mixtral-odd",
            &[
                ("attention_chunk_size", json!(8)),
                ("query_pre_attn_scalar", json!(16)),
                ("embedding_multiplier", json!(2.0)),
            ],
        ),
        (
            "gemma2-odd",
            &[
                ("use_bidirectional_attention", json!(true)),
                ("rope_local_base_freq", json!(1e4)),
                ("num_experts", json!(2)),
            ],
        ),
        (
            "gemma3-odd",
            &[
                ("use_bidirectional_attention", json!(true)),
                ("hidden_activation", json!("gelu")),
                ("attn_output_gate", json!(true)),
            ],
        ),
        (
            "phi3-odd",
            &[
                ("lm_head_bias", json!(true)),
                ("mlp_bias", json!(true)),
                ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
            ],
        ),
        (
            "olmo2-odd",
            &[("clip_qkv", json!(8.0)), ("sliding_window", json!(8)), ("use_parallel_residual", json!(true))],
        ),
        (
            "smollm3-odd",
            &[("sliding_window_pattern", json!(6)), ("residual_multiplier", json!(0.2)), ("alibi", json!(true))],
        ),
        ("gpt_oss", &[("swiglu_alpha", json!(1.5)), ("hidden_act", json!("gelu")), ("qk_layernorm", json!(true))]),
    ] {
        let config = config(model);
        for (key, value) in refused {
            let error = build(&with(&config, key, value.clone())).map(|_| ()).expect_err(&format!("{model} {key}"));
            assert!(error.contains(&format!("`{key}`")), "{model} {key}: {error}");
        }
    }
}

/// Keys whose sections have keys of their own.
const SECTIONS: &[&str] = &["rope_scaling", "rope_parameters", "text_config", "vision_config"];

/// A model, or an error that says in which file what is wrong.
fn answers(config: &Value, case: &str) {
    if let Err(error) = build(config) {
        let said = crate::first_line(&error);
        assert!(said.contains("config.json") && (said.contains('`') || said.contains("must")), "{case}: {said}");
    }
}

#[test]
fn values_of_the_wrong_kind_are_named_and_none_panics() {
    for (name, config) in configs() {
        let built = build(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let computed = built.keys.iter().filter(|walked| walked.fate == Fate::Computed && !walked.key.contains('.'));
        for key in computed.map(|walked| walked.key.as_str()) {
            for wrong in [json!("nonsense"), json!([["x"]])] {
                let error = build(&with(&config, key, wrong.clone())).map(|_| ());
                let error = error.expect_err(&format!("{name} {key} {wrong}"));
                assert!(error.contains(&format!("`{key}`")), "{name} {key} {wrong}: {error}");
            }
            for odd in [json!(0), json!(-1), json!(1), json!(7), json!(1e300), json!(u64::MAX), json!(null)] {
                let changed = with(&config, key, odd.clone());
                answers(&changed, &format!("{name} {key} {odd}"));
            }
            let mut without = config.clone();
            without.as_object_mut().unwrap().remove(key);
            answers(&without, &format!("{name} without {key}"));
        }
        for section in SECTIONS {
            for key in config[*section].as_object().into_iter().flatten().map(|(key, _)| key) {
                for odd in [json!("nonsense"), json!(0), json!(-1), json!(1e300), json!(null), json!([]), json!({})] {
                    let mut changed = config.clone();
                    changed[*section][key] = odd.clone();
                    answers(&changed, &format!("{name} {section}.{key} {odd}"));
                }
            }
        }
    }
}

/// Sizes that no model has end before anything is made of them.
#[test]
fn sizes_without_bounds_are_refused() {
    for (model, key, value) in [
        ("qwen3-odd", "vocab_size", json!(1u64 << 40)),
        ("qwen3-odd", "head_dim", json!(0)),
        ("mistral", "sliding_window", json!(0)),
        ("gemma3", "sliding_window_pattern", json!(0)),
        ("gemma3-odd", "layer_types", json!(["full_attention"])),
        ("gemma2-odd", "query_pre_attn_scalar", json!(0)),
        ("gemma2-odd", "final_logit_softcapping", json!(-1.0)),
        ("smollm3-odd", "no_rope_layer_interval", json!(0)),
        ("smollm3-odd", "no_rope_layers", json!([1])),
        ("qwen3_moe-odd", "decoder_sparse_step", json!(0)),
        ("qwen3_moe-odd", "num_experts_per_tok", json!(6)),
        ("qwen3_moe-odd", "num_experts", json!(1 << 20)),
        ("mixtral-odd", "num_local_experts", json!(0)),
        ("gpt_oss", "swiglu_limit", json!(0)),
    ] {
        let Some((_, config)) = configs().into_iter().find(|(name, _)| name == model) else { continue };
        let error = build(&with(&config, key, value.clone())).map(|_| ()).expect_err(&format!("{model} {key} {value}"));
        let named = [key, "experts", "sliding_window"].iter().any(|name| error.contains(name));
        assert!(named, "{model} {key} {value}: {error}");
    }
}

#[test]
fn the_nearest_family_of_an_unknown_one_is_named_with_the_keys_that_it_does_not_compute() {
    let mut qwen = config("qwen3-odd");
    qwen["model_type"] = "qwen3_next".into();
    qwen["linear_num_key_heads"] = 4.into();
    qwen["logit_scale"] = 0.5.into();
    let error = build(&qwen).map(|_| ()).unwrap_err();
    let said = "`model_type` `qwen3_next`; nearest is `qwen3_moe`, which does not compute `linear_num_key_heads`, `logit_scale`; known are";
    assert!(error.contains(said), "{error}");
    let mut other = config("llama-bias-odd");
    other["model_type"] = "zebra".into();
    let error = build(&other).map(|_| ()).unwrap_err();
    assert!(error.contains("nearest is `llama`, which computes all of its keys"), "{error}");
}

/// Gemma 3 as the hub has it: the text under `text_config`, the tower beside it.
#[test]
fn a_nested_text_is_the_same_model_under_other_names() {
    let text = config("gemma3-odd");
    let nested = json!({
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
        "vision_config": {"hidden_size": 32, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 256,
        "boi_token_index": 255, "eoi_token_index": 256, "image_token_index": 257, "eos_token_id": [1, 106],
        "initializer_range": 0.02, "dtype": "bfloat16",
    });
    let (plain, nested) = (build(&text).unwrap(), build(&nested).unwrap());
    // Buffers are named after tensors, whose names have a prefix.
    let decoder = format!("{:?}", nested.model.decoder).replace("language_model.", "");
    assert_eq!(decoder, format!("{:?}", plain.model.decoder));
    assert_eq!((nested.model.eos.as_slice(), nested.model.architecture), (&[1, 106][..], "gemma3"));
    let renamed: Vec<String> =
        plain.model.matrices.iter().map(|spec| format!("language_model.{}", spec.name)).collect();
    assert_eq!(renamed, nested.model.matrices.iter().map(|spec| spec.name.clone()).collect::<Vec<_>>());
    let notes: Vec<&str> = nested.notes.iter().map(|note| note.name).collect();
    assert_eq!(notes, ["pictures_not_read"]);
}

#[test]
fn mt5_is_t5_with_its_own_head() {
    let mut t5 = config("t5-tiny");
    t5["tie_word_embeddings"] = false.into();
    let own = build(&t5).unwrap().model;
    t5["model_type"] = "mt5".into();
    let mt5 = build(&t5).unwrap().model;
    assert_eq!((mt5.architecture, &mt5.decoder), ("mt5", &own.decoder));
    // A tied head of mT5 reads the output as it is.
    t5["tie_word_embeddings"] = true.into();
    let scale = |model: &quantbench::plan::Model| model.decoder.head().unwrap().scale;
    assert_eq!(scale(&build(&t5).unwrap().model), 1.0);
    t5["model_type"] = "t5".into();
    assert!(scale(&build(&t5).unwrap().model) < 1.0);
}

/// Windows of Qwen2 and Qwen3 count from a layer on, and only where they are asked for.
#[test]
fn windows_are_those_that_the_config_asks_for() {
    let windows = |config: &Value| {
        let model = build(config).unwrap().model;
        let spec = |op: &quantbench::plan::Op| match op {
            quantbench::plan::Op::Attention(spec) => Some(spec.window.map(|window| window.0)),
            _ => None,
        };
        model.decoder.ops.iter().filter_map(spec).collect::<Vec<_>>()
    };
    let mut qwen = config("qwen3-0.6b");
    (qwen["num_hidden_layers"], qwen["sliding_window"], qwen["max_window_layers"]) = (4.into(), 32.into(), 3.into());
    assert_eq!(windows(&qwen), [None; 4]);
    qwen["use_sliding_window"] = true.into();
    assert_eq!(windows(&qwen), [None, None, None, Some(32)]);
    qwen["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]);
    assert_eq!(windows(&qwen), [Some(32), None, None, None]);
    let gemma = windows(&config("gemma-3-1b"));
    assert_eq!((gemma.len(), gemma.iter().filter(|window| window.is_none()).count()), (26, 4));
    assert_eq!((gemma[4], gemma[5]), (Some(512), None));
    // No sequence outgrows it.
    assert_eq!(windows(&config("phi-4-mini")), [None; 32]);
    let mut mistral = config("mistral-7b");
    mistral.as_object_mut().unwrap().remove("sliding_window");
    assert_eq!(windows(&mistral), [Some(4096); 32], "transformers' default");
    mistral["model_type"] = "ministral".into();
    assert_eq!(windows(&mistral), [Some(4096); 32]);
    mistral["num_hidden_layers"] = 2.into();
    mistral["layer_types"] = json!(["full_attention", "sliding_attention"]);
    assert_eq!(windows(&mistral), [None, Some(4096)]);
}
