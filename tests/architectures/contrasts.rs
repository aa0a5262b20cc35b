//! What each family computes matters: with one feature off, a model misses the reference by far more than the tolerance.

use quantbench::plan::{
    AttentionSpec, ExpertWeighting, ExpertsSpec, Model, Op, Rope, RopeByLength, VectorKind, Window,
};

use super::{Executor, FP32_LOGIT_TOLERANCE, Golden, forced, largest_difference, load, models, plan};

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
        for (what, change) in breaks(&mut whole.clone()) {
            let mut broken = whole.clone();
            change(&mut broken);
            let miss = miss(&model, &broken, &golden);
            println!("{model}: {what}: {miss}");
            assert!(miss >= LEAST_MISS, "{model} with {what} misses by {miss} alone");
            seen.insert(what);
        }
    }
    // Every kind of feature is in some model.
    assert!(seen.len() >= 24, "{seen:?}");
}
