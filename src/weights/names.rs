//! A tensor's name as a plan asks for it, and the names that it may bear in a file.
//!
//! Checkpoints are saved from the base model or from a wrapper, by releases that moved modules about, and of tensors that share
//! memory safetensors keeps one under whichever name came first. transformers loads all of these; so does what is here.

use std::collections::HashSet;

/// A part that names begin with in plans, and what stands in its place in files, the likeliest first.
const SPELLINGS: &[(&str, &[&str])] = &[
    // PaliGemma: before transformers 4.52 (as plans have it), since then, and saved from the base model.
    ("language_model.model.", &["model.language_model.", "language_model.", "model.language_model.model."]),
    ("language_model.lm_head.", &["lm_head.", "model.language_model.lm_head."]),
    // transformers 5 has no `vision_model` inside the tower.
    ("vision_tower.vision_model.", &["model.vision_tower.vision_model.", "vision_tower.", "model.vision_tower."]),
    ("multi_modal_projector.", &["model.multi_modal_projector."]),
    // Saved from the base model; LlamaForQuestionAnswering calls it otherwise.
    ("model.", &["", "transformer."]),
    // T5's one table.
    ("shared.", &["encoder.embed_tokens.", "decoder.embed_tokens."]),
];

/// Parts that wrappers put before every name: base models, classifiers, `torch.nn.DataParallel`, `torch.compile`.
const WRAPPERS: &[&str] = &["model.", "transformer.", "module.", "_orig_mod."];

/// A token embedding and the head that may share its memory, as plans spell them.
pub const TIED: &[(&str, &str)] = &[
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("shared.weight", "lm_head.weight"),
];

/// The names that the tensor `name` of a plan may bear in a file, the likeliest first; its own is the first.
pub fn spellings(name: &str) -> Vec<String> {
    let mut plain = vec![name.to_owned()];
    // A longer part stands before a shorter one that begins like it.
    if let Some((part, others)) = SPELLINGS.iter().find(|(part, _)| name.starts_with(part)) {
        plain.extend(others.iter().map(|other| format!("{other}{}", &name[part.len()..])));
    }
    let wrapped = WRAPPERS.iter().flat_map(|wrapper| plain.iter().map(move |name| format!("{wrapper}{name}")));
    let mut all: Vec<String> = Vec::new();
    for spelling in plain.iter().cloned().chain(wrapped) {
        if !all.contains(&spelling) {
            all.push(spelling);
        }
    }
    all
}

/// Every name that the tensor `name` may bear in the files of a plan that asks for the names `asked`: a token embedding may bear that
/// of its head, where the plan asks for no head.
pub fn candidates(name: &str, asked: &HashSet<&str>) -> Vec<String> {
    let head = TIED.iter().find(|(table, head)| *table == name && !asked.contains(head)).map(|(_, head)| *head);
    // What the plan asks for under another name is that tensor and no other.
    let free = |candidate: &String| candidate == name || !asked.contains(candidate.as_str());
    spellings(name).into_iter().chain(head.into_iter().flat_map(spellings)).filter(free).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_that_transformers_loads_is_among_them() {
        for (name, in_file) in [
            ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            ("model.norm.weight", "norm.weight"),
            ("model.norm.weight", "_orig_mod.model.norm.weight"),
            ("lm_head.weight", "model.lm_head.weight"),
            ("shared.weight", "encoder.embed_tokens.weight"),
            ("shared.weight", "transformer.decoder.embed_tokens.weight"),
            ("encoder.final_layer_norm.weight", "transformer.encoder.final_layer_norm.weight"),
            ("language_model.model.norm.weight", "model.language_model.norm.weight"),
            ("language_model.model.norm.weight", "language_model.norm.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
            ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
            ("multi_modal_projector.linear.bias", "model.multi_modal_projector.linear.bias"),
        ] {
            let spellings = spellings(name);
            assert_eq!(spellings[0], name);
            assert!(spellings.iter().any(|spelling| spelling == in_file), "{in_file} not in {spellings:?}");
        }
    }

    #[test]
    fn a_table_may_bear_its_heads_name_where_the_plan_has_no_head() {
        let has = |name: &str, asked: &[&str], candidate: &str| {
            candidates(name, &asked.iter().copied().collect()).iter().any(|found| found == candidate)
        };
        assert!(has("shared.weight", &["shared.weight"], "lm_head.weight"));
        assert!(has("language_model.model.embed_tokens.weight", &[], "lm_head.weight"));
        assert!(!has("model.embed_tokens.weight", &["model.embed_tokens.weight", "lm_head.weight"], "lm_head.weight"));
        assert!(!has(
            "model.embed_tokens.weight",
            &["model.embed_tokens.weight", "lm_head.weight"],
            "model.lm_head.weight"
        ));
        assert!(!has("model.norm.weight", &[], "lm_head.weight"));
        assert!(!has("model.norm.weight", &["norm.weight"], "norm.weight"), "asked for by itself");
    }
}
