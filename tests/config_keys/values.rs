//! Settings that are computed: greedy ids and first logits of each.

use quantbench::engine::{self, Device, EncoderInput, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::plan::EncoderInputKind;
use quantbench::quant::{FormatOptions, fp16};
use quantbench::weights::policy::Formats;
use serde_json::{Value, json};

use crate::{Folder, Object, set};

/// fp32 against fp32, as in tests/models.rs, and half of the last digit that is written here.
const LOGIT_TOLERANCE: f32 = 2e-4 + 5e-5;

const SHORT: [u32; 8] = [1, 2, 3, 40, 50, 60, 70, 80];

/// Ids whose positions reach where scalings differ.
fn long(n: u32) -> Vec<u32> {
    (0..n).map(|i| 3 + i * 37 % 300).collect()
}

/// Four greedy tokens, and the first logits of the first step.
type Expected = ([u32; 4], [f32; 4]);

fn check(case: &str, folder: &Folder, prompt: &[u32], (ids, logits): Expected) {
    let checkpoint = folder.open();
    let (model, _) = folder.build().unwrap_or_else(|error| panic!("{case}: {error}"));
    let source = checkpoint.source(&model.matrices, &model.vectors).unwrap();
    let setup = Setup {
        model: &model,
        source: source.as_ref(),
        formats: &Formats::new(fp16::ID, FormatOptions::default()),
        device: Device::Cpu,
        threads: 1,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: prompt.len() + 8,
        encoder_capacity: prompt.len(),
        cuda_graph: false,
    };
    let executors = [
        ("reference", engine::reference::load(&setup, &Silent).unwrap()),
        ("cpu", engine::cpu::load(&setup, Isa::detect(), &Silent).unwrap()),
    ];
    for (name, loaded) in executors {
        let mut session = loaded.session;
        let first = match model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Tokens) => {
                session.encode(EncoderInput::Tokens(prompt)).unwrap();
                vec![model.decoder_start.unwrap()]
            }
            _ => prompt.to_vec(),
        };
        let mut seen = vec![session.prefill(&first).unwrap()];
        let first_logits = session.logits().unwrap();
        session.decode(3, &mut |id| seen.push(id)).unwrap();
        assert_eq!(seen, ids, "{case} on {name}");
        for (seen, expected) in first_logits.iter().zip(logits) {
            assert!(
                (seen - expected).abs() <= LOGIT_TOLERANCE,
                "{case} on {name}: {:?} {logits:?}",
                &first_logits[..4]
            );
        }
    }
}

/// `rope_scaling` in config.json.
fn scaled(model: &str, scaling: Value) -> Folder {
    Folder::changed(model, set(json!({ "rope_scaling": scaling })))
}

fn yarn(more: Value) -> Value {
    let mut scaling = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    scaling
}

#[test]
fn yarn_is_what_transformers_computes() {
    let plain: [Expected; 2] = [
        ([142, 295, 29, 358], [-3.0894, -1.615, 0.1765, 1.9674]),
        ([297, 259, 330, 454], [2.1228, -0.7985, 0.902, 1.1778]),
    ];
    for (more, [short, far]) in [
        (json!({}), plain),
        (json!({"type": "yarn"}), plain),
        (json!({"mscale": 0.707}), plain),
        (json!({"factor": null}), plain),
        (json!({"beta_fast": 0, "beta_slow": null}), plain),
        (
            json!({"beta_fast": 4.0, "beta_slow": 2}),
            [
                ([142, 295, 29, 358], [-3.1991, -1.4971, -0.1095, 2.3011]),
                ([36, 403, 299, 18], [-1.731, -0.2665, 2.3151, -2.07]),
            ],
        ),
        (
            json!({"truncate": false}),
            [
                ([142, 381, 61, 326], [-3.156, -1.6159, 0.2779, 1.9859]),
                ([297, 81, 289, 424], [3.2443, 2.494, 3.4845, 0.021]),
            ],
        ),
        (
            json!({"attention_factor": 1.5}),
            [
                ([264, 388, 510, 253], [-2.908, -0.0373, 0.6696, 2.9278]),
                ([88, 145, 322, 348], [3.5357, -1.2377, 2.5713, 2.3468]),
            ],
        ),
        (
            json!({"mscale": 0.707, "mscale_all_dim": 1.0}),
            [
                ([142, 381, 61, 293], [-2.8655, -2.5572, -0.3732, 1.2833]),
                ([437, 294, 501, 443], [1.3155, -0.6074, 2.3187, 0.7081]),
            ],
        ),
        (
            json!({"original_max_position_embeddings": null}),
            [
                ([142, 295, 29, 358], [-2.965, -1.5785, -0.136, 2.1298]),
                ([240, 80, 387, 385], [2.7321, 0.0208, 3.7931, -3.2477]),
            ],
        ),
    ] {
        let folder = scaled("llama-odd", yarn(more.clone()));
        check(&format!("yarn {more}"), &folder, &SHORT, short);
        check(&format!("yarn {more}, far"), &folder, &long(300), far);
    }
    // The model's own key goes before the scaling's.
    let outer = |config: &mut Object| {
        config.insert("rope_scaling".into(), yarn(json!({})));
        config.insert("original_max_position_embeddings".into(), 32.into());
    };
    let expected = ([163, 320, 299, 511], [0.9587, 0.7751, 1.6021, -0.7134]);
    check("yarn, outer original", &Folder::changed("llama-odd", outer), &long(300), expected);
    let expected = ([286, 333, 494, 101], [0.5602, 3.7775, -4.3661, 4.5315]);
    check("phi yarn", &scaled("phi-odd", yarn(json!({}))), &long(300), expected);
}

#[test]
fn other_scalings_are_what_transformers_computes() {
    let plain: Expected = ([142, 78, 293, 206], [-2.6644, -2.3943, -0.5388, 1.3447]);
    let linear: Expected = ([142, 496, 293, 501], [-3.0386, -3.7393, -0.641, 2.3674]);
    let far = |scaling: Value, expected| {
        check(&scaling.to_string(), &scaled("llama-odd", scaling.clone()), &long(300), expected)
    };
    let near =
        |scaling: Value, expected| check(&scaling.to_string(), &scaled("llama-odd", scaling.clone()), &SHORT, expected);

    near(json!({"type": "linear", "rope_type": "linear", "factor": 4.0}), linear);
    near(json!({"type": "linear", "factor": 4}), linear);
    near(json!({"type": "linear", "rope_type": null, "factor": 4}), linear);
    far(json!({"rope_type": "linear", "factor": 4.0}), ([483, 176, 502, 406], [-0.2148, 1.8378, 3.6219, -0.7827]));
    near(json!({"rope_type": "linear", "factor": 1.0}), plain);
    near(json!({"type": "default", "rope_type": "default", "mrope_section": [4, 3, 3]}), plain);
    near(json!({"factor": 4.0}), plain);
    near(json!({}), plain);
    near(json!({"type": "dynamic", "factor": 4.0}), plain);
    far(json!({"rope_type": "dynamic", "factor": 4.0}), ([13, 334, 411, 390], [2.0942, -1.2954, 2.5422, -1.833]));
    far(
        json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ([437, 196, 137, 501], [1.8044, -1.9108, 1.8243, -2.6614]),
    );
    let proportional = json!({"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0});
    far(proportional, ([78, 47, 496, 54], [2.5053, -2.449, 1.2285, 0.7639]));

    let [short, stretched]: [Vec<f64>; 2] =
        [(1.0, 0.1), (2.0, 0.3)].map(|(start, step)| (0..10).map(|i| start + step * f64::from(i)).collect());
    let mut longrope = json!({"rope_type": "longrope", "short_factor": short, "long_factor": stretched,
        "original_max_position_embeddings": 400});
    far(longrope.clone(), ([56, 376, 132, 443], [2.5922, 2.1692, 1.4843, -1.4806]));
    let (model, warnings) = scaled("llama-odd", longrope.clone()).build().unwrap();
    assert_eq!((model.context, warnings), (512, vec![]));
    longrope["factor"] = 8.0.into();
    far(longrope, ([56, 78, 374, 200], [1.8113, 2.6479, 2.8584, -1.4184]));

    check(
        "phi linear",
        &scaled("phi-odd", json!({"type": "linear", "factor": 4.0})),
        &long(300),
        ([286, 333, 473, 101], [0.2865, 3.7153, -4.2915, 4.7513]),
    );
    check(
        "phi dynamic",
        &scaled("phi-odd", json!({"type": "dynamic", "factor": 4.0})),
        &SHORT,
        ([356, 305, 433, 248], [-3.8276, 0.3358, -2.3995, 3.6609]),
    );
}

/// `rope_scaling` takes the place of `rope_parameters` as a whole: its theta is not that of the other.
#[test]
fn of_two_rope_sections_the_older_is_computed() {
    let both = |scaling: Value, theta: f64, kind: &str| {
        let parameters = json!({"rope_type": kind, "factor": 8.0, "rope_theta": theta});
        Folder::changed("llama-odd", move |config| {
            config.remove("rope_theta");
            config.extend([("rope_scaling".to_owned(), scaling), ("rope_parameters".to_owned(), parameters)]);
        })
    };
    let linear = json!({"rope_type": "linear", "factor": 8.0});
    for theta in [10_000.0, 500_000.0] {
        let folder = both(linear.clone(), theta, "default");
        check("both", &folder, &SHORT, ([142, 381, 23, 293], [-3.4198, -4.0226, -0.978, 2.703]));
        let told = folder.build().unwrap().1.iter().any(|(name, _)| name == "config_key_not_read");
        assert_eq!(told, theta != 10_000.0);
    }
    let expected = ([142, 381, 23, 293], [-3.4601, -3.9926, -0.9326, 2.7807]);
    check("an empty one", &both(json!({}), 500_000.0, "linear"), &SHORT, expected);
    check("null", &both(json!(null), 500_000.0, "linear"), &SHORT, expected);
}

#[test]
fn what_a_file_leaves_out_has_the_value_that_transformers_gives_it() {
    let without = |model, keys: &'static [&'static str]| {
        Folder::changed(model, move |config| keys.iter().for_each(|key| drop(config.remove(*key))))
    };
    let llama = without(
        "llama-odd",
        &[
            "max_position_embeddings",
            "hidden_act",
            "rms_norm_eps",
            "rope_theta",
            "attention_bias",
            "mlp_bias",
            "tie_word_embeddings",
        ],
    );
    let llama = llama.edit("config.json", set(json!({"max_sequence_length": 2048, "pad_token_id": -1})));
    check("llama", &llama, &SHORT, ([142, 78, 293, 206], [-2.6644, -2.3943, -0.5387, 1.3449]));
    assert_eq!(llama.build().unwrap().0.context, 2048);

    let phi = [
        "hidden_act",
        "layer_norm_eps",
        "num_key_value_heads",
        "rope_theta",
        "qk_layernorm",
        "max_position_embeddings",
        "rope_scaling",
        "tie_word_embeddings",
    ];
    let phi = Folder::changed("phi-odd", move |config| phi.iter().for_each(|key| drop(config.remove(*key))));
    check("phi", &phi, &SHORT, ([356, 305, 433, 248], [-3.8276, 0.3358, -2.3995, 3.6609]));
    check(
        "phi, half",
        &without("phi-odd", &["partial_rotary_factor"]),
        &SHORT,
        ([356, 128, 128, 128], [-3.4676, 0.4732, -1.8065, 4.6275]),
    );

    let t5 = without(
        "t5-tied-relu",
        &["layer_norm_epsilon", "feed_forward_proj", "relative_attention_num_buckets", "n_positions"],
    );
    check("t5", &t5, &SHORT, ([114, 202, 32, 32], [2.6987, -0.6049, -3.9385, -1.5328]));

    // SigLIP's and Gemma's defaults are those of the golden PaliGemma, which says few keys.
    let (model, warnings) = Folder::of("paligemma-odd").build().unwrap();
    let (same, _) = Folder::changed("paligemma-odd", |config| {
        let text = config["text_config"].as_object_mut().unwrap();
        text.extend(json!({"rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "attention_bias": false,
            "tie_word_embeddings": true, "use_bidirectional_attention": null}).as_object().unwrap().clone());
        text.remove("model_type");
        let vision = config["vision_config"].as_object_mut().unwrap();
        vision.extend(json!({"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}).as_object().unwrap().clone());
        vision.remove("model_type");
        let token = config.remove("image_token_index").unwrap();
        config.insert("image_token_id".into(), token);
    })
    .build()
    .unwrap();
    assert_eq!((model, warnings), (same, vec![]));
}

#[test]
fn t5_says_its_feed_forward_and_its_head_in_several_ways() {
    let tiny = |keys: Value| Folder::changed("t5-tiny", set(keys));
    for (keys, expected) in [
        (json!({}), ([6, 122, 212, 6], [2.1833, -0.1957, 1.6621, -2.4967])),
        (json!({"feed_forward_proj": "gated-silu"}), ([277, 251, 251, 100], [2.2364, -0.1895, 1.4725, -2.7086])),
        (json!({"feed_forward_proj": "gated-relu"}), ([6, 6, 100, 6], [1.9444, -0.1871, 1.9187, -2.5053])),
        (json!({"dense_act_fn": "silu"}), ([277, 251, 251, 100], [2.2364, -0.1895, 1.4725, -2.7086])),
        (json!({"scale_decoder_outputs": true}), ([6, 122, 212, 6], [0.2729, -0.0245, 0.2078, -0.3121])),
        // Saved by transformers 5 with no head of its own.
        (
            json!({"tie_word_embeddings": true, "scale_decoder_outputs": false}),
            ([276, 276, 276, 276], [2.8611, 5.5302, 5.327, 6.2323]),
        ),
        (json!({"tie_word_embeddings": true}), ([276, 276, 276, 276], [0.3576, 0.6913, 0.6659, 0.779])),
    ] {
        let folder = tiny(keys.clone());
        let folder = if keys["tie_word_embeddings"] == true { folder.without_head() } else { folder };
        check(&format!("t5 {keys}"), &folder, &SHORT, expected);
    }
    let silu = Folder::changed("t5-tied-relu", set(json!({"feed_forward_proj": "silu"})));
    check("t5 silu", &silu, &SHORT, ([114, 202, 32, 32], [3.1306, -0.6199, -3.3349, -1.0589]));
    let renamed = Folder::changed("t5-tiny", |config| {
        for (old, new) in [
            ("d_model", "hidden_size"),
            ("num_heads", "num_attention_heads"),
            ("num_layers", "num_hidden_layers"),
            ("d_kv", "head_dim"),
        ] {
            let value = config.remove(old).unwrap();
            config.insert(new.into(), value);
        }
    });
    check("t5 by other names", &renamed, &SHORT, ([6, 122, 212, 6], [2.1833, -0.1957, 1.6621, -2.4967]));
}

/// Positions are relative: `n_positions` 512 is what it was trained on.
#[test]
fn t5_reads_more_tokens_than_it_was_trained_on() {
    check("t5 600", &Folder::of("t5-tiny"), &long(600), ([18, 170, 117, 273], [4.1701, -0.4646, -0.3752, -3.9728]));
}

impl Folder {
    /// The weights without `lm_head.weight`.
    fn without_head(self) -> Self {
        let path = self.0.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let kept = tensors.tensors().into_iter().filter(|(name, _)| name != "lm_head.weight");
        std::fs::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
        self
    }
}
