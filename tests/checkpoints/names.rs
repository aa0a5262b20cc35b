//! Names that checkpoints bear by how they were saved.

use crate::folder::{Folder, LOGIT_TOLERANCE, Run};

/// The same tensors under other names give the same run, bit for bit, and no warning.
fn same_as_plain(model: &str, precision: &str, rename: &dyn Fn(&str) -> String) -> Run {
    let (plain, renamed) = (Folder::of(model).run(precision), Folder::of(model).renamed(rename).write().run(precision));
    renamed.warns(&[]);
    assert_eq!((&plain.ids, &plain.logits), (&renamed.ids, &renamed.logits), "{model}");
    assert_eq!(plain.weights_bytes, renamed.weights_bytes, "{model}");
    renamed
}

#[test]
fn a_base_model_is_read_and_so_are_wrapped_ones() {
    let bare = |name: &str| name.trim_start_matches("model.").to_owned();
    let run = same_as_plain("llama-tiny", "fp16", &bare);
    run.is([50, 305, 415, 115], [1.0639, -0.0455, -2.8492, -2.9945]);
    same_as_plain("llama-odd", "nf4", &bare);
    same_as_plain("phi-odd", "int8", &bare);
    for wrapper in ["module.", "_orig_mod.", "model.", "transformer."] {
        same_as_plain("llama-odd", "fp16", &|name| format!("{wrapper}{name}"));
        same_as_plain("t5-odd", "fp16", &|name| format!("{wrapper}{name}"));
    }
}

#[test]
fn every_spelling_of_paligemma_is_read() {
    let no_vision_model = |name: &str| name.replace("vision_tower.vision_model.", "vision_tower.");
    let run = same_as_plain("paligemma-tiny", "fp16", &no_vision_model);
    assert_eq!(run.ids[..2], [25, 490]);
    for (seen, expected) in run.logits.iter().zip([-1.6771f32, -0.0204, -2.4863, 0.6184]) {
        assert!((seen - expected).abs() < LOGIT_TOLERANCE, "{:?}", &run.logits[..4]);
    }
    // transformers 4.52 and later, and 5, which has no `vision_model`; then their base models.
    let new = |name: &str| format!("model.{}", name.replace("language_model.model.", "language_model."));
    same_as_plain("paligemma-odd", "fp16", &new);
    same_as_plain("paligemma-odd", "nf4", &|name| no_vision_model(&new(name)));
    same_as_plain("paligemma-odd", "fp16", &|name| new(name).trim_start_matches("model.").to_owned());
}

#[test]
fn the_one_table_of_t5_may_have_any_of_its_names() {
    for name in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] {
        let rename = |seen: &str| if seen == "shared.weight" { name.to_owned() } else { seen.to_owned() };
        let run = same_as_plain("t5-tied-relu", "fp16", &rename);
        run.is([114, 202, 32, 32], [2.6987, -0.6049, -3.9385, -1.5327]);
    }
    // All of them, as pickles that were converted have it.
    let t5 = Folder::of("t5-tied-relu");
    let table = t5.tensors["shared.weight"].clone();
    let all = t5.with("encoder.embed_tokens.weight", table.clone()).with("decoder.embed_tokens.weight", table);
    all.write().run("fp16").is([114, 202, 32, 32], [2.6987, -0.6049, -3.9385, -1.5327]).warns(&[]);
}

#[test]
fn what_belongs_to_a_quantized_weight_is_found_beside_it() {
    for name in ["llama-tiny-int8", "llama-tiny-nf4", "llama-tiny-nf4-nodq"] {
        let precision = name.trim_start_matches("llama-tiny-");
        let plain = Folder::of_kind("bnb", name).run(precision);
        let bare = Folder::of_kind("bnb", name).renamed(|name| name.trim_start_matches("model.").to_owned()).write();
        let bare = bare.run(precision);
        assert_eq!((&plain.logits, plain.weights_bytes), (&bare.warns(&[]).logits, bare.weights_bytes), "{name}");
    }
}

#[test]
fn an_absent_tensor_is_named_with_the_nearest() {
    let folder = Folder::of("llama-tiny").renamed(|name| name.replace("q_proj", "query")).write();
    folder.refused(&["`model.layers.0.self_attn.q_proj.weight` and 2 others", "nearest is `model.layers.0.self_attn."]);
    let folder =
        Folder::of("llama-tiny").renamed(|name| name.replace("q_proj.weight", "q_proj.base_layer.weight")).write();
    folder.refused(&["LoRA adapter that is not merged"]);
    let folder = Folder::of("llama-tiny").renamed(|name| name.replace("proj.weight", "proj.qweight")).write();
    folder.refused(&["GPTQ, AWQ"]);
}
