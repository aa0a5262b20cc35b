//! Whether a head has weights of its own is told by the file.

use quantbench::quant::nf4;
use quantbench::weights::{self, export};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::folder::{Folder, Run};

const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Bytes of the head and the table of a run: fp16 `[n, k]` each.
fn head_bytes(run: &Run) -> (u64, usize) {
    let head = run.model.decoder.head().unwrap();
    let spec = &run.model.matrices[head.weight.0];
    ((2 * spec.n * spec.k) as u64, head.weight.0)
}

#[test]
fn a_head_in_the_file_is_used_though_config_json_says_tied() {
    let folder = Folder::of("llama-odd").set("tie_word_embeddings", json!(true)).write();
    let run = folder.run("fp16");
    run.is([142, 78, 293, 206], [-2.6644, -2.3943, -0.5388, 1.3447]).warns(&["own_head"]);
    assert!(run.message("own_head").contains("`lm_head.weight`"));

    // As much memory as the model whose config.json says so, in every precision; the head stays fp16.
    let untied = Folder::of("llama-odd");
    for precision in ["fp16", "int8", "nf4"] {
        let [own, said] = [&folder, &untied].map(|folder| folder.run(precision));
        assert_eq!((own.ids, own.weights_bytes), (said.ids, said.weights_bytes), "{precision}");
    }
}

#[test]
fn every_family_takes_its_own_head() {
    let llama = Folder::of("llama-tiny");
    let head = llama.tensors[TABLE].reversed();
    let run = llama.with(HEAD, head).write().run("fp16");
    run.is([461, 224, 255, 486], [5.8655, -2.8809, 0.9465, 1.3603]).warns(&["own_head"]);

    // The head's input stays scaled.
    let t5 = Folder::of("t5-tied-relu");
    let head = t5.tensors["shared.weight"].reversed();
    let run = t5.with(HEAD, head).write().run("fp16");
    run.is([205, 235, 68, 319], [-3.9459, 2.9523, 2.2808, -1.5085]).warns(&["own_head"]);

    gemma().run("fp16").is([366, 149, 252, 389], [-2.5945, 0.005, 2.357, 2.1955]).warns(&[]);
    let gemma = gemma();
    let head = gemma.tensors[TABLE].reversed();
    let run = gemma.with(HEAD, head).write().run("fp16");
    run.is([209, 530, 414, 106], [-0.7772, 0.2824, -3.6348, -1.7665]).warns(&["own_head"]);

    // Rows in reverse give the tied model's logits in reverse.
    let tied = Folder::of("paligemma-odd").run("fp16");
    for name in ["language_model.lm_head.weight", "lm_head.weight"] {
        let folder = Folder::of("paligemma-odd");
        let head = folder.tensors["language_model.model.embed_tokens.weight"].reversed();
        let run = folder.with(name, head).write().run("fp16");
        assert!(run.logits.iter().eq(tied.logits.iter().rev()));
        run.warns(&["own_head"]);
    }
}

/// The text model of a PaliGemma.
fn gemma() -> Folder {
    let mut folder = Folder::of("paligemma-tiny");
    folder.tensors.retain(|name, _| name.starts_with("language_model."));
    folder.config = folder.config["text_config"].clone();
    folder
        .set("model_type", json!("gemma"))
        .renamed(|name| name.trim_start_matches("language_model.").to_owned())
        .write()
}

#[test]
fn a_head_with_the_tables_values_is_tied() {
    for (model, table) in [("llama-tiny", TABLE), ("t5-tied-relu", "shared.weight")] {
        let plain = Folder::of(model);
        let head = plain.tensors[table].clone();
        let (plain, both) = (plain.run("fp16"), Folder::of(model).with(HEAD, head).write().run("fp16"));
        both.warns(&[]);
        assert_eq!((plain.logits, plain.weights_bytes), (both.logits, both.weights_bytes), "{model}");
    }
}

#[test]
fn a_tied_table_may_be_saved_under_the_heads_name() {
    let rename = |table: &'static str| move |name: &str| if name == table { HEAD.to_owned() } else { name.to_owned() };
    let run = Folder::of("llama-tiny").renamed(rename(TABLE)).write().run("fp16");
    run.is([50, 305, 415, 115], [1.0639, -0.0455, -2.8492, -2.9945]).warns(&[]);
    let run = Folder::of("t5-tied-relu").renamed(rename("shared.weight")).write().run("fp16");
    run.is([114, 202, 32, 32], [2.6987, -0.6049, -3.9385, -1.5327]).warns(&[]);
    assert_eq!(head_bytes(&run).1, 0, "the table is the head");

    let untied = Folder::of("llama-odd").without(TABLE).write();
    untied.refused(&["`model.embed_tokens.weight`", "absent"]);
}

#[test]
fn an_untied_model_without_a_head_is_refused_and_a_t5_is_tied_as_transformers_ties_it() {
    let folder = Folder::of("llama-odd").without(HEAD).write();
    folder.refused(&["`lm_head.weight`", "absent", "`tie_word_embeddings`"]);

    let tied = ([276, 276, 276, 276], [2.8611, 5.5302, 5.327, 6.2323]);
    let run = Folder::of("t5-tiny").without(HEAD).write().run("fp16");
    run.is(tied.0, tied.1).warns(&["no_head"]);
    // As transformers 5 saves it.
    let saved =
        Folder::of("t5-tiny").set("tie_word_embeddings", json!(true)).set("scale_decoder_outputs", json!(false));
    let run = saved.without(HEAD).write().run("fp16");
    run.is(tied.0, tied.1).warns(&[]);
    let saved =
        Folder::of("t5-tiny").set("tie_word_embeddings", json!(true)).set("scale_decoder_outputs", json!(false));
    let (saved, plain) = (saved.write().run("fp16"), Folder::of("t5-tiny").run("fp16"));
    assert_eq!(saved.warns(&[]).logits, plain.logits);
}

#[test]
fn an_export_holds_the_head_and_a_config_json_that_says_so() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("exported");
    let folder = Folder::of("llama-odd").set("tie_word_embeddings", json!(true)).write();
    let checkpoint = weights::open(&folder.request(), &quantbench::events::Silent).unwrap();
    let model = quantbench::models::build(&checkpoint.config).unwrap();
    let specs = (model.matrices.as_slice(), model.vectors.as_slice());
    export::export(&checkpoint, specs, nf4::ID, &output, &quantbench::events::Silent).unwrap();
    let bytes = std::fs::read(output.join("model.safetensors")).unwrap();
    let exported = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(exported.tensor(HEAD).unwrap().data(), folder.tensors[HEAD].bytes);
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], json!(false));
}
