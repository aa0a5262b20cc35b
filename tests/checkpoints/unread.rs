//! Tensors of a file that the model does not read are named, once.

use serde_json::{Value, json};

use crate::folder::{Folder, Tensor, quantbench};

const LLAMA_ODD: ([u32; 4], [f32; 4]) = ([142, 78, 293, 206], [-2.6644, -2.3943, -0.5388, 1.3447]);

fn with_each(model: &str, names: impl IntoIterator<Item = String>, shape: &[usize]) -> Folder {
    names.into_iter().fold(Folder::of(model), |folder, name| folder.with(&name, Tensor::half(shape))).write()
}

#[test]
fn what_is_not_read_is_named_with_count_and_size() {
    let biases = |parts: &'static [&'static str], end: &'static str| {
        let of =
            move |layer: usize| parts.iter().map(move |part| format!("model.layers.{layer}.self_attn.{part}.{end}"));
        (0..2).flat_map(of)
    };
    for (folder, expected) in [
        (
            with_each("llama-odd", biases(&["q_norm", "k_norm"], "weight"), &[20]),
            "4 tensors of the checkpoint (160 bytes)",
        ),
        (with_each("llama-odd", biases(&["q_proj"], "bias"), &[100]), "2 tensors of the checkpoint (400 bytes)"),
        (
            with_each("llama-odd", ["model.layers.2.mlp.up_proj.weight".to_owned()], &[202, 100]),
            "1 tensor of the checkpoint (39.5 KiB)",
        ),
        (with_each("llama-odd", ["score.weight".to_owned()], &[2, 100]), "`score.weight`"),
        (with_each("llama-odd", ["lm_head.bias".to_owned()], &[515]), "`lm_head.bias`"),
    ] {
        let run = folder.run("fp16");
        run.is(LLAMA_ODD.0, LLAMA_ODD.1).warns(&["unread_tensors"]);
        let message = run.message("unread_tensors");
        assert!(message.contains(expected), "{message}");
    }
    let many = with_each("llama-odd", (0..9).map(|i| format!("model.layers.{i}.extra.weight")), &[1]).run("fp16");
    assert!(
        many.message("unread_tensors").contains("`model.layers.2.extra.weight` and 6 others"),
        "{:?}",
        many.warnings
    );
}

#[test]
fn fewer_layers_than_the_file_has_are_told() {
    let run = Folder::of("llama-odd").set("num_hidden_layers", json!(1)).write().run("fp16");
    assert!(run.warns(&["unread_tensors"]).message("unread_tensors").contains("9 tensors"), "{:?}", run.warnings);
}

#[test]
fn tables_that_are_computed_are_harmless() {
    for (model, names) in [
        ("llama-odd", &["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"][..]),
        ("phi-odd", &["model.layers.1.self_attn.rotary_emb.cos_cached", "model.layers.1.attn.masked_bias"]),
        ("paligemma-odd", &["vision_tower.vision_model.embeddings.position_ids"]),
        ("t5-odd", &["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]),
    ] {
        let folder = with_each(model, names.iter().map(|name| (*name).to_owned()), &[10]);
        folder.run("fp16").warns(&[]);
    }
}

#[test]
fn a_second_table_with_other_values_is_told() {
    let t5 = Folder::of("t5-tied-relu");
    let table = t5.tensors["shared.weight"].reversed();
    let run = t5.with("decoder.embed_tokens.weight", table).write().run("fp16");
    assert!(run.warns(&["unread_tensors"]).message("unread_tensors").contains("`decoder.embed_tokens.weight`"));
}

/// Golden checkpoints are read to the last tensor.
#[test]
fn nothing_of_the_golden_checkpoints_is_unread() {
    let mut n_tensors = 0;
    for (kind, precision) in [("models", "fp16"), ("bnb", "")] {
        let folder = crate::folder::golden(kind, "");
        for name in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
            let folder = Folder::of_kind(kind, &name);
            let own = name.splitn(3, '-').nth(2).unwrap_or_default();
            let run = folder.try_run(if precision.is_empty() { own } else { precision }, true).unwrap();
            run.warns(&[]);
            n_tensors += folder.tensors.len();
        }
    }
    assert!(n_tensors > 1000, "{n_tensors}");
}

#[test]
fn the_warning_stands_in_the_record_of_every_precision_and_on_the_terminal_where_there_is_none() {
    let folder = with_each("llama-odd", ["score.weight".to_owned()], &[2, 100]);
    let output = quantbench(&folder, &["--max-new-tokens", "2", "--warmup", "0", "--repeats", "1", "--format", "json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let records = document["records"].as_array().unwrap();
    assert_eq!(records.len(), 3);
    for record in records {
        let warnings = record["warnings"].as_array().unwrap();
        let told = warnings.iter().filter(|warning| warning.as_str().unwrap().starts_with("unread_tensors: 1 tensor"));
        assert_eq!(told.count(), 1, "{warnings:?}");
    }
    for args in [&["export", "--precision", "nf4", "--output", "new"][..], &["--dry-run"]] {
        let output = quantbench(&folder, args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && said.contains("1 tensor of the checkpoint"), "{said}");
    }
}
