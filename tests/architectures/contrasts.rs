//! What each family computes matters: with one feature off, a model misses the reference by far more than the tolerance.

use quantbench::plan::{
    AttentionSpec, ExpertWeighting, ExpertsSpec, GatedActivation, Model, NormSpec, Op, Rope, RopeByLength, VectorKind,
    Window,
};
use serde_json::Value;

use super::{Executor, FP32_LOGIT_TOLERANCE, Golden, checkpoint, forced, largest_difference, load, models, plan};

/// Ten times the tolerance of a right implementation.
const LEAST_MISS: f32 = 10.0 * FP32_LOGIT_TOLERANCE;

type Break = Box<dyn Fn(&mut Model)>;

fn attentions(model: &mut Model) -> impl Iterator<Item = &mut AttentionSpec> {
    model.decoder.ops.iter_mut().filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None })
}

fn mixtures(model: &mut Model) -> impl Iterator<Item = &mut ExpertsSpec> {
    model.decoder.ops.iter_mut().filter_map(|op| if let Op::Experts(spec) = op { Some(spec) } else { None })
}

fn each_attention(change: fn(&mut AttentionSpec)) -> Break {
    Box::new(move |model| attentions(model).for_each(change))
}

fn each_mixture(change: fn(&mut ExpertsSpec)) -> Break {
    Box::new(move |model| mixtures(model).for_each(change))
}

fn each_rope(change: fn(&mut Rope)) -> Break {
    Box::new(move |model| model.ropes.iter_mut().for_each(change))
}

fn shifted_window(by: isize) -> Break {
    Box::new(move |model| {
        for spec in attentions(model) {
            spec.window = spec.window.map(|Window(window)| Window(window.saturating_add_signed(by)));
        }
    })
}

/// Removes the biases of the linear layers whose name contains one of `names`.
fn without_biases(names: &'static [&'static str]) -> Break {
    Box::new(move |model| {
        let specs = &model.vectors;
        let is_named = |id: quantbench::plan::VectorId| names.iter().any(|name| specs[id.0].name.contains(name));
        for op in &mut model.decoder.ops {
            match op {
                Op::Linear(spec) => {
                    spec.parts.iter_mut().for_each(|part| part.bias = part.bias.filter(|bias| !is_named(*bias)));
                }
                Op::Experts(spec) => {
                    for expert in &mut spec.experts {
                        for matrix in [&mut expert.gate, &mut expert.up, &mut expert.down] {
                            matrix.bias = matrix.bias.filter(|bias| !is_named(*bias));
                        }
                    }
                }
                _ => {}
            }
        }
    })
}

/// Every feature of the plan, and the plan without it.
fn breaks(model: &mut Model) -> Vec<(&'static str, Break)> {
    let mut found: Vec<(&'static str, Break)> = Vec::new();
    if attentions(model).any(|spec| spec.window.is_some()) {
        found.push(("no window", each_attention(|spec| spec.window = None)));
        found.push(("a window wider by one", shifted_window(1)));
        found.push(("a window narrower by one", shifted_window(-1)));
    }
    if attentions(model).any(|spec| spec.softcap.is_some()) {
        found.push(("no attention cap", each_attention(|spec| spec.softcap = None)));
    }
    if attentions(model).any(|spec| spec.qk_norm.is_some()) {
        found.push(("no q/k norm", each_attention(|spec| spec.qk_norm = None)));
    }
    if attentions(model).any(|spec| spec.sinks.is_some()) {
        found.push(("no sinks", each_attention(|spec| spec.sinks = None)));
    }
    let caches = model.caches.clone();
    let usual = |spec: &AttentionSpec| 1.0 / (caches[spec.cache.0].head_dim as f32).sqrt();
    if attentions(model).any(|spec| (spec.scale - usual(spec)).abs() > 1e-6) {
        let caches = caches.clone();
        let scale = move |model: &mut Model| {
            attentions(model).for_each(|spec| spec.scale = 1.0 / (caches[spec.cache.0].head_dim as f32).sqrt());
        };
        found.push(("scale of the head dim", Box::new(scale)));
    }
    let rotated = attentions(model).filter(|spec| spec.rope.is_some()).count();
    if rotated < attentions(model).count() {
        let rope_everywhere = |model: &mut Model| {
            let rope = attentions(model).find_map(|spec| spec.rope);
            attentions(model).for_each(|spec| spec.rope = rope);
        };
        found.push(("rope in every layer", Box::new(rope_everywhere)));
        found.push(("rope in no layer", each_attention(|spec| spec.rope = None)));
    }
    if model.ropes.len() > 1 {
        found.push(("the global base everywhere", Box::new(|model| model.ropes[1] = model.ropes[0].clone())));
        found.push(("the local base everywhere", Box::new(|model| model.ropes[0] = model.ropes[1].clone())));
    }
    if model.ropes.iter().any(|rope| rope.attention_factor != 1.0) {
        found.push(("attention factor 1", each_rope(|rope| rope.attention_factor = 1.0)));
    }
    if model.ropes.iter().any(|rope| rope.by_length.is_some()) {
        found.push(("frequencies of short sequences", each_rope(|rope| rope.by_length = None)));
    }
    if model.ropes.iter().any(|rope| matches!(rope.by_length, Some(RopeByLength::Switch { .. }))) {
        let always_long = |rope: &mut Rope| {
            if let Some(RopeByLength::Switch { inverse_frequencies, .. }) = rope.by_length.take() {
                rope.inverse_frequencies = inverse_frequencies;
            }
        };
        found.push(("frequencies of long sequences", each_rope(always_long)));
    }
    if model.decoder.head().is_some_and(|head| head.softcap.is_some()) {
        let uncapped = |model: &mut Model| {
            let last = model.decoder.ops.last_mut();
            if let Some(Op::Argmax(spec)) = last {
                spec.softcap = None;
            }
        };
        found.push(("no final cap", Box::new(uncapped)));
    }
    if model.vectors.iter().any(|vector| vector.kind == VectorKind::NormOffset) {
        let plain = |model: &mut Model| {
            let offsets = model.vectors.iter_mut().filter(|vector| vector.kind == VectorKind::NormOffset);
            offsets.for_each(|vector| vector.kind = VectorKind::NormWeight);
        };
        found.push(("norm weight without 1 +", Box::new(plain)));
    }
    if model.decoder.embedding().is_some_and(|embedding| embedding.scale != 1.0) {
        let unscaled = |model: &mut Model| {
            for op in &mut model.decoder.ops {
                if let Op::Embed(spec) = op {
                    spec.scale = 1.0;
                }
            }
        };
        found.push(("embedding not scaled", Box::new(unscaled)));
    }
    let windows: Vec<Option<Window>> = attentions(model).map(|spec| spec.window).collect();
    if let (Some(window), true) = (windows.iter().copied().find_map(|window| window), windows.contains(&None)) {
        let everywhere = move |model: &mut Model| attentions(model).for_each(|spec| spec.window = Some(window));
        found.push(("every layer windowed", Box::new(everywhere)));
    }
    let head_dims: Vec<usize> = model.caches.iter().map(|cache| cache.head_dim).collect();
    if model.ropes.iter().any(|rope| head_dims.iter().any(|head_dim| rope.rotary_dim < *head_dim)) {
        let head_dim = head_dims[0];
        found.push((
            "pairs over the whole head",
            Box::new(move |model| {
                for rope in &mut model.ropes {
                    rope.rotary_dim = head_dim;
                    rope.inverse_frequencies.resize(head_dim / 2, 0.0);
                    if let Some(RopeByLength::Switch { inverse_frequencies, .. }) = &mut rope.by_length {
                        inverse_frequencies.resize(head_dim / 2, 0.0);
                    }
                }
            }),
        ));
    }
    if !norms_after(model).is_empty() {
        let without = |model: &mut Model| {
            for norm in norms_after(model) {
                for op in &mut model.decoder.ops {
                    if let Op::Add(add) = op
                        && add.b == norm.out
                    {
                        add.b = norm.x;
                    }
                }
            }
        };
        found.push(("no norms behind attention and feed-forward", Box::new(without)));
    }
    if mixtures(model).any(|spec| matches!(spec.activation, GatedActivation::ClampedSwiglu { .. })) {
        let unclamped =
            |spec: &mut ExpertsSpec| spec.activation = GatedActivation::ClampedSwiglu { limit: f32::INFINITY };
        found.push(("no clamp", each_mixture(unclamped)));
    }
    if mixtures(model).next().is_some() {
        found.push(("one expert fewer", each_mixture(|spec| spec.top_k -= 1)));
        let flipped = |spec: &mut ExpertsSpec| {
            spec.weighting = match spec.weighting {
                ExpertWeighting::Chosen => ExpertWeighting::All,
                ExpertWeighting::All => ExpertWeighting::Chosen,
            };
        };
        found.push(("the other weighting", each_mixture(flipped)));
    }
    for (what, names) in BIASES {
        let has = |vector: &quantbench::plan::VectorSpec| {
            vector.name.ends_with(".bias") && names.iter().any(|name| vector.name.contains(name))
        };
        if model.vectors.iter().any(has) {
            found.push((what, without_biases(names)));
        }
    }
    found
}

/// Norms whose output is added to the residual.
fn norms_after(model: &Model) -> Vec<NormSpec> {
    let ops = &model.decoder.ops;
    let is_added = |out| ops.iter().any(|op| matches!(op, Op::Add(add) if add.b == out));
    let norm = |op: &Op| if let Op::Norm(spec) = op { Some(*spec) } else { None };
    ops.iter().filter_map(norm).filter(|spec| is_added(spec.out)).collect()
}

/// Settings of a config.json, and what they would say if they were not read.
fn misread_configs(config: &Value) -> Vec<(&'static str, Value)> {
    let with = |key: &str, value: Value| {
        let mut changed = config.clone();
        changed[key] = value;
        changed
    };
    let mut found = Vec::new();
    if config["rope_scaling"].is_object() {
        found.push(("no rotary scaling", with("rope_scaling", Value::Null)));
    }
    if let Some(parameters) = config["rope_parameters"].as_object() {
        let theta =
            |parameters: &Value| serde_json::json!({"rope_type": "default", "rope_theta": parameters["rope_theta"]});
        let plain = match parameters.contains_key("rope_theta") {
            true => theta(&config["rope_parameters"]),
            false => parameters.iter().map(|(kind, parameters)| (kind.clone(), theta(parameters))).collect(),
        };
        found.push(("no rotary scaling", with("rope_parameters", plain)));
        found.push(("no rope_parameters", with("rope_parameters", Value::Null)));
    }
    if config["rope_scaling"]["truncate"] == false {
        let mut scaling = config["rope_scaling"].clone();
        scaling["truncate"] = true.into();
        found.push(("a rounded range of corrections", with("rope_scaling", scaling)));
    }
    if config["use_sliding_window"] == false && config["sliding_window"].is_u64() {
        found.push(("a window that is switched off", with("use_sliding_window", true.into())));
    }
    if config.get("sliding_window").is_some_and(Value::is_null) && config["model_type"] == "mistral" {
        found.push(("a window although it is null", with("sliding_window", 16.into())));
    }
    if config["layer_types"].is_array() || config["sliding_window_pattern"].is_u64() {
        let layers = config["num_hidden_layers"].as_u64().unwrap() as usize;
        found.push(("every layer local", with("layer_types", vec!["sliding_attention"; layers].into())));
    }
    found
}

const BIASES: &[(&str, &[&str])] = &[
    ("no q/k/v bias", &["q_proj", "k_proj", "v_proj"]),
    ("no o bias", &["o_proj"]),
    ("no mlp bias", &["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    ("no expert biases", &[".experts."]),
    ("no router bias", &["router"]),
];

/// The largest miss over all prompts, fed the reference's own tokens.
fn miss(model: &str, plan: &Model, golden: &Golden) -> f32 {
    let mut session = load(model, plan, "fp16", Executor::Reference).unwrap();
    let mut largest = 0f32;
    for (i, (prompt, continuation)) in golden.prompts().iter().enumerate() {
        let (_, logits) = forced(session.as_mut(), prompt, continuation);
        let expected = golden.steps(&format!("p{i}.step_logits"));
        let differences = logits.iter().zip(&expected).map(|(a, b)| largest_difference(a, b));
        largest = differences.fold(largest, f32::max);
    }
    largest
}

#[test]
fn a_model_without_one_of_its_features_misses_the_reference() {
    let mut seen = std::collections::BTreeSet::new();
    for model in models() {
        let golden = Golden::open(&model, "golden");
        let whole = plan(&model);
        let broken = breaks(&mut whole.clone()).into_iter().map(|(what, change)| {
            let mut broken = whole.clone();
            change(&mut broken);
            (what, broken)
        });
        // A family that refuses the other setting cannot take the one for the other.
        let misread = misread_configs(&checkpoint(&model).config).into_iter();
        let misread = misread.filter_map(|(what, config)| Some((what, quantbench::models::build(&config).ok()?)));
        for (what, broken) in broken.chain(misread) {
            let miss = miss(&model, &broken, &golden);
            println!("{model}: {what}: {miss}");
            assert!(miss >= LEAST_MISS, "{model} with {what} misses by {miss} alone");
            seen.insert(what);
        }
    }
    // Every kind of feature is in some model.
    assert!(seen.len() >= 32, "{seen:?}");
}
