//! Names: formats are named in their folders alone, and a type name means one thing.

use std::collections::{BTreeMap, BTreeSet};

use quantbench::quant::{FORMATS, INTERNAL_FORMATS, STORED_FORMATS};

use super::{SourceFile, code, fail_on, rust_files};

/// What treats every format alike, by the properties of its row in `FORMATS`.
const WITHOUT_FORMATS: &[&str] = &[
    "src/commands",
    "src/engine",
    "src/harness",
    "src/kernels",
    "src/lower",
    "src/models",
    "src/plan",
    "src/quality",
    "src/suite",
];

/// A file's code in front of its tests; nothing of a file of tests.
fn production(file: &SourceFile) -> &str {
    let tests = ["mod tests", "pub mod tests"].map(|module| file.text.find(&format!("#[cfg(test)]\n{module}")));
    match file.path.ends_with("tests.rs") {
        true => "",
        false => &file.text[..tests.into_iter().flatten().min().unwrap_or(file.text.len())],
    }
}

/// Lines, from 1, that spell a format's name as text or as the path of its folder.
fn naming_formats(text: &str) -> Vec<usize> {
    let all = FORMATS.iter().chain(INTERNAL_FORMATS).chain(STORED_FORMATS.iter());
    let names: BTreeSet<&str> = all.map(|format| format.name).collect();
    let folders: BTreeSet<&str> = names.iter().map(|name| name.split('-').next().unwrap_or(name)).collect();
    let is_named = |line: &str| {
        let is_text = line.split('"').skip(1).step_by(2).any(|text| names.contains(text));
        let words = || line.split(|c: char| !c.is_alphanumeric() && c != '_');
        let is_import = line.trim_start().starts_with("use ") && words().any(|word| folders.contains(word));
        is_text || is_import || folders.iter().any(|folder| line.contains(&format!("{folder}::")))
    };
    text.lines().enumerate().filter(|(_, line)| is_named(code(line))).map(|(at, _)| at + 1).collect()
}

#[test]
fn formats_are_named_in_their_folders_alone() {
    let mut problems = Vec::new();
    for file in rust_files(WITHOUT_FORMATS) {
        let lines = naming_formats(production(&file));
        problems.extend(lines.iter().map(|line| format!("{}:{line}: names a format", file.path)));
    }
    fail_on(problems);
}

#[test]
fn the_format_checker_sees_what_it_should() {
    assert_eq!(naming_formats("a\nif precision == \"nf4\" {"), [2]);
    assert_eq!(naming_formats("use crate::quant::{FormatId, int8};\nlet x = nf4::NO_DOUBLE_QUANT;"), [1, 2]);
    assert!(naming_formats("// \"nf4\"\nfp16_overflow += 1; int8: int8(facts)\nlet x = \"not nf4 alone\";").is_empty());
}

/// Type names with several meanings that are one role: what siblings call the same, and what a record calls as its maker does.
const SHARED: &[(&str, &str)] = &[
    ("Arena", "where an executor's intermediate values lie"),
    ("Case", "what is measured, and its records"),
    ("Config", "what a model's file reads of config.json"),
    ("DeviceFacts", "a device as it is found, and as records have it"),
    ("Pool", "threads of the CPU engine; in a record, as in its readers' tools, a device's memory"),
    ("SelfCheck", "a check of the kernels, and as records have it"),
];

/// Types that code outside of their file can name, by name.
fn visible_types(files: &[SourceFile]) -> BTreeMap<&str, Vec<&str>> {
    let mut types: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for file in files {
        for line in production(file).lines().filter(|line| line.starts_with("pub")) {
            let behind = line.trim_start_matches(|c| c != ' ').trim_start();
            let Some((kind, rest)) = behind.split_once(' ') else { continue };
            if ["struct", "enum", "trait", "type", "union"].contains(&kind) {
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                types.entry(&rest[..end]).or_default().push(&file.path);
            }
        }
    }
    types
}

#[test]
fn a_type_name_means_one_thing() {
    let files = rust_files(&["src"]);
    let types = visible_types(&files);
    let shared: BTreeSet<&str> = SHARED.iter().map(|(name, _)| *name).collect();
    let several: BTreeSet<&str> = types.iter().filter(|(_, paths)| paths.len() > 1).map(|(name, _)| *name).collect();
    let new =
        several.difference(&shared).map(|name| format!("`{name}` means several things: {}", types[name].join(", ")));
    let gone = shared.difference(&several).map(|name| format!("`{name}` means one thing and has to leave the list"));
    fail_on(new.chain(gone).collect());
}

#[test]
fn the_type_checker_sees_what_it_should() {
    let file = |path: &str, text: &str| SourceFile { path: path.to_owned(), text: text.to_owned() };
    let files = [
        file("a.rs", "pub struct Job<T> {\n}\nstruct Private;\n    pub type Inner = u8;"),
        file("b.rs", "pub(super) enum Job {}\npub fn job() {}\n#[cfg(test)]\nmod tests {\npub struct Case;"),
    ];
    assert_eq!(visible_types(&files), BTreeMap::from([("Job", vec!["a.rs", "b.rs"])]));
}
