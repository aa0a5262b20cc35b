//! Indexes that do not tell where tensors lie.

use std::collections::BTreeMap;

use crate::folder::{Folder, Tensors};

const FILES: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
const TABLE: &str = "model.embed_tokens.weight";
const RIGHT: ([u32; 4], [f32; 4]) = ([142, 78, 293, 206], [-2.6644, -2.3943, -0.5388, 1.3447]);

/// A model in two halves and the right index of them.
fn halves() -> (Folder, [Tensors; 2], BTreeMap<String, String>) {
    let folder = Folder::of("llama-odd");
    let mut first = folder.tensors.clone();
    let middle = first.keys().nth(first.len() / 2).unwrap().clone();
    let second = first.split_off(&middle);
    let place = |file: &'static str| move |name: &String| (name.clone(), file.to_owned());
    let map = first.keys().map(place(FILES[0])).chain(second.keys().map(place(FILES[1]))).collect();
    (folder, [first, second], map)
}

fn shards([first, second]: [Tensors; 2]) -> [(&'static str, Tensors); 2] {
    [(FILES[0], first), (FILES[1], second)]
}

fn other(file: &str) -> String {
    FILES.iter().find(|other| **other != file).unwrap().to_string()
}

#[test]
fn a_tensor_is_read_from_the_file_that_holds_it() {
    let (folder, tensors, map) = halves();
    folder.write_shards(&shards(tensors), &map).run("fp16").is(RIGHT.0, RIGHT.1).warns(&[]);

    let (folder, tensors, mut map) = halves();
    let wrong = other(&map[TABLE]);
    map.insert(TABLE.to_owned(), wrong);
    let run = folder.write_shards(&shards(tensors), &map).run("fp16");
    run.is(RIGHT.0, RIGHT.1).warns(&["index_disagrees"]);
    assert!(run.message("index_disagrees").contains(TABLE), "{:?}", run.warnings);
}

#[test]
fn a_name_that_no_file_holds_is_told_and_missed_only_where_it_is_needed() {
    let (folder, tensors, mut map) = halves();
    map.insert("model.extra.weight".to_owned(), FILES[0].to_owned());
    let run = folder.write_shards(&shards(tensors), &map).run("fp16");
    run.is(RIGHT.0, RIGHT.1).warns(&["index_disagrees"]);

    let (folder, mut tensors, map) = halves();
    let norm = "model.norm.weight";
    tensors.iter_mut().for_each(|half| drop(half.remove(norm)));
    let file = map[norm].clone();
    folder.write_shards(&shards(tensors), &map).refused(&[norm, "absent", &format!("gives it to `{file}`")]);
}

#[test]
fn a_shard_that_the_index_does_not_name_is_named() {
    let (folder, tensors, mut map) = halves();
    map.retain(|_, file| file == FILES[0]);
    folder.write_shards(&shards(tensors), &map).refused(&["absent", FILES[1], "is not named by"]);
}

#[test]
fn a_tensor_in_two_files_must_have_one_value_or_be_placed_by_the_index() {
    // The same values: nothing to tell.
    let (folder, mut tensors, map) = halves();
    let [first, second] = &mut tensors;
    let (name, tensor) = first.iter().next().map(|(name, tensor)| (name.clone(), tensor.clone())).unwrap();
    second.insert(name.clone(), tensor.clone());
    folder.write_shards(&shards(tensors.clone()), &map).run("fp16").is(RIGHT.0, RIGHT.1).warns(&[]);

    // transformers would take the second file's, the index says the first.
    let changed = tensor.reversed();
    let (folder, mut tensors, map) = halves();
    tensors[1].insert(name.clone(), changed.clone());
    folder.write_shards(&shards(tensors), &map).refused(&[&name, "differing values", FILES[0], FILES[1]]);

    // All say the second.
    let (folder, mut tensors, mut map) = halves();
    tensors[1].insert(name.clone(), tensor);
    tensors[0].insert(name.clone(), changed);
    map.insert(name.clone(), FILES[1].to_owned());
    let run = folder.write_shards(&shards(tensors), &map).run("fp16");
    run.is(RIGHT.0, RIGHT.1).warns(&["duplicate_tensors"]);
}
