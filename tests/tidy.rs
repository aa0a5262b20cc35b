//! Rules that a compiler does not check: layers, sizes, unsafe code, documents that follow the tables.

#[path = "tidy/documents.rs"]
mod documents;
#[path = "tidy/layers.rs"]
mod layers;
#[path = "tidy/names.rs"]
mod names;

use std::fs;
use std::path::{Path, PathBuf};

const MAX_LINES: usize = 500;

/// Longer files, and why they are.
const LONG: &[(&str, &str)] = &[
    ("src/plan/op.rs", "every operation with what it reads, writes and computes, in one place"),
    ("tests/cli.rs", "one snapshot of exit code and streams after the other"),
    ("tests/models.rs", "every executor against the same golden runs"),
    ("tests/suite.rs", "one case of a suite's life after the other"),
];

/// Lines above an `unsafe` in which its `SAFETY` comment has to begin.
const SAFETY_LINES: usize = 10;

struct SourceFile {
    /// Relative to the checkout, with `/`.
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Text files under `folder`, sorted by path.
fn files(folder: &str) -> Vec<SourceFile> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            match path.is_dir() {
                true => folders.push(path),
                false => found.extend(text_file(&path)),
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn text_file(path: &PathBuf) -> Option<SourceFile> {
    let text = fs::read_to_string(path).ok()?;
    let path = path.strip_prefix(root()).ok()?.components().map(|part| part.as_os_str().to_string_lossy());
    Some(SourceFile { path: path.collect::<Vec<_>>().join("/"), text })
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// All that is committed and made of text, by the folders that a checkout has.
fn tracked_files() -> Vec<SourceFile> {
    let folders = ["src", "tests", "docs", "configs", "deploy", "scripts", "benches", ".ci", ".cargo"];
    let top = fs::read_dir(root()).unwrap().flatten().map(|entry| entry.path()).filter(|path| path.is_file());
    let top = top.filter_map(|path| text_file(&path));
    folders.iter().flat_map(|folder| files(folder)).chain(top).collect()
}

fn rust_files(folders: &[&str]) -> Vec<SourceFile> {
    folders.iter().flat_map(|folder| files(folder)).filter(|file| file.path.ends_with(".rs")).collect()
}

/// `line` without its comment. A `//` in a string cuts too much, which hides nothing that these rules look for.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or(line)
}

fn fail_on(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn files_are_short() {
    let files = rust_files(&["src", "tests", "benches"]).into_iter().chain(files_ending(&["src"], &[".cu", ".cuh"]));
    let mut problems = Vec::new();
    for SourceFile { path, text } in files {
        let (lines, is_listed) = (text.lines().count(), LONG.iter().any(|(long, _)| *long == path));
        match (lines > MAX_LINES, is_listed) {
            (true, false) => problems.push(format!("{path}: {lines} lines of {MAX_LINES}")),
            (false, true) => problems.push(format!("{path}: short enough to leave the list")),
            _ => {}
        }
    }
    fail_on(problems);
}

fn files_ending(folders: &[&str], ends: &[&str]) -> Vec<SourceFile> {
    let all = folders.iter().flat_map(|folder| files(folder));
    all.filter(|file| ends.iter().any(|end| file.path.ends_with(end))).collect()
}

/// A host's twin of the kernels' file is all that they need to run without a GPU; the other one holds jumps to CUDA's libraries.
#[test]
fn assembly_sits_in_two_files() {
    let is_asm = |word: &str| ["asm", "global_asm", "naked_asm"].contains(&word);
    let says_asm = |line: &str| code(line).split(|c: char| !c.is_alphanumeric() && c != '_').any(is_asm);
    let sources = files_ending(&["src"], &[".cu", ".cuh", ".rs"]);
    let with: Vec<_> = sources.iter().filter(|file| file.text.lines().any(says_asm)).map(|file| &file.path).collect();
    assert_eq!(with, ["src/kernels/cuda/device.cuh", "src/kernels/cuda/functions.rs"]);
}

/// Where operations become an executor's own.
const LOWERINGS: &[&str] = &["src/lower", "src/plan/fuse.rs", "src/engine/cpu/schedule.rs", "src/engine/reference"];

/// Lines, from 1, with a pattern that leaves fields of an operation's struct out. `..` before an expression is a value's.
fn incomplete_patterns(text: &str) -> Vec<usize> {
    let text: String = text.lines().map(|line| format!("{}\n", code(line))).collect();
    let is_incomplete = |rest: &str| rest.split('}').next().is_some_and(|fields| fields.trim_end().ends_with(".."));
    let found = text.match_indices("Spec {").filter(|(at, found)| is_incomplete(&text[at + found.len()..]));
    found.map(|(at, _)| text[..at].lines().count()).collect()
}

#[test]
fn lowerings_take_operations_apart_whole() {
    let files = rust_files(&["src"]);
    let is_there = |path: &&&str| files.iter().any(|file| file.path.starts_with(**path));
    let gone = LOWERINGS.iter().filter(|path| !is_there(path)).map(|path| format!("nothing lies at {path}"));
    let mut problems: Vec<String> = gone.collect();
    for file in files.iter().filter(|file| LOWERINGS.iter().any(|path| file.path.starts_with(path))) {
        let lines = incomplete_patterns(&file.text);
        problems.extend(
            lines.iter().map(|line| format!("{}:{line}: an operation taken apart without all fields", file.path)),
        );
    }
    fail_on(problems);
}

#[test]
fn the_pattern_checker_sees_what_it_should() {
    assert_eq!(incomplete_patterns("Op::Norm(NormSpec { x, .. }) => x,"), [1]);
    assert_eq!(incomplete_patterns("a\nlet &AttentionSpec {\n    q,\n    bias: _,\n    ..\n} = spec;"), [2]);
    assert!(incomplete_patterns("let AddSpec { a, b, out } = spec; // AddSpec { .. }").is_empty());
    assert!(incomplete_patterns("AttentionSpec { scale, ..AttentionSpec::over(q, cache, out) }").is_empty());
}

fn may_be_unsafe(path: &str) -> bool {
    path.trim_end_matches(".rs").split('/').any(|part| part == "cpu" || part == "cuda")
}

/// Lines, from 1, that use `unsafe` without a reason above. A block or an `impl` needs `// SAFETY:`, a public function a
/// `# Safety` section. Functions of a trait's `impl` have their contract at the trait, private ones at their only callers.
fn unexplained(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let explained = |at: usize| {
        let above = &lines[at.saturating_sub(SAFETY_LINES)..=at];
        above.iter().any(|line| line.contains("SAFETY:") || line.contains("# Safety"))
    };
    let uses = |line: &str| code(line).split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
    let is_use = |line: &str| uses(line) && (!code(line).contains("unsafe fn") || code(line).contains("pub unsafe fn"));
    (0..lines.len()).filter(|&at| is_use(lines[at]) && !explained(at)).map(|at| at + 1).collect()
}

#[test]
fn unsafe_code_is_confined_and_explained() {
    let mut problems = Vec::new();
    for file in rust_files(&["src"]) {
        let uses = file
            .text
            .lines()
            .any(|line| code(line).split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe"));
        if uses && !may_be_unsafe(&file.path) {
            problems.push(format!("{}: `unsafe` outside files and folders named `cpu` or `cuda`", file.path));
        }
        problems.extend(
            unexplained(&file.text).iter().map(|line| format!("{}:{line}: `unsafe` without reason", file.path)),
        );
    }
    fail_on(problems);
}

#[test]
fn the_unsafe_checker_sees_what_it_should() {
    assert!(may_be_unsafe("src/kernels/cpu/pool.rs") && may_be_unsafe("src/quant/nf4/cuda.rs"));
    assert!(!may_be_unsafe("src/engine/gpu.rs") && !may_be_unsafe("src/quant/cpus.rs"));
    assert_eq!(unexplained("let a = 1;\nunsafe { f() }"), [2]);
    assert!(unexplained("// SAFETY: checked above.\nunsafe { f() }").is_empty());
    assert!(unexplained("/// # Safety\n/// `x` is valid.\npub unsafe fn f() {}").is_empty());
    assert!(
        unexplained("// nothing unsafe here\ntype F = unsafe fn(u32);\nunsafe fn g() {}\nlet unsafely = 1;").is_empty()
    );
    assert_eq!(unexplained("\n\npub unsafe fn f() {}"), [3]);
    let far = format!("// SAFETY: long ago\n{}unsafe {{ f() }}", "x();\n".repeat(SAFETY_LINES + 1));
    assert_eq!(unexplained(&far), [SAFETY_LINES + 3]);
}

/// Macros and marks of unfinished work, spelled so that this file does not hold them.
const UNFINISHED: &[&str] =
    &[concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!("), concat!("TO", "DO")];

#[test]
fn nothing_is_unfinished() {
    let mut problems = Vec::new();
    for file in rust_files(&["src", "tests", "benches"]) {
        for (index, line) in file.text.lines().enumerate() {
            let found = UNFINISHED.iter().filter(|mark| line.contains(**mark));
            problems.extend(found.map(|mark| format!("{}:{}: `{mark}`", file.path, index + 1)));
        }
    }
    fail_on(problems);
}
