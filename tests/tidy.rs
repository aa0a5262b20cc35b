//! Rules that a compiler does not check: layers, sizes, unsafe code, documents that follow the tables.

use std::fs;
use std::path::{Path, PathBuf};

use quantbench::{models, quant, record, report, weights};

/// A module imports nothing to its left.
const LAYERS: &[&str] = &[
    "main", "commands", "cli", "ui", "suite", "harness", "ipc", "protocol", "quality", "engine", "lower", "models",
    "plan", "call", "weights", "quant", "kernels", "os", "error",
];

/// Every layer may import these; they import each other and `error`.
const LEAVES: &[&str] = &["report", "record", "stats", "rng", "events"];

const MAX_LINES: usize = 700;

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

/// The layer that a file of `src/` belongs to; `lib.rs` is none.
fn layer_of(path: &str) -> Option<&str> {
    let name = path.strip_prefix("src/")?.split('/').next()?;
    Some(name.trim_end_matches(".rs")).filter(|name| *name != "lib")
}

/// Top-level modules that `text` names through `crate::`, groups included.
fn imports(text: &str) -> Vec<String> {
    let code: String = text.lines().map(|line| format!("{}\n", code(line))).collect();
    let after = code.match_indices("crate::").map(|(at, found)| &code[at + found.len()..]);
    after.flat_map(|rest| rest.strip_prefix('{').map_or_else(|| vec![identifier(rest)], group)).collect()
}

/// First words of the members of a group, whose opening brace is cut.
fn group(text: &str) -> Vec<String> {
    let mut depth = 1;
    let mut members = vec![String::new()];
    for c in text.chars() {
        depth += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        match (depth, c) {
            (0, _) => break,
            (1, ',') => members.push(String::new()),
            _ => members.last_mut().expect("never empty").push(c),
        }
    }
    members.iter().map(|member| identifier(member.trim())).filter(|member| !member.is_empty()).collect()
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// May `from` import `to`? Names that are neither layer nor leaf are macros and items of the crate's root.
fn may_import(from: &str, to: &str) -> bool {
    let position = |name: &str| LAYERS.iter().position(|layer| *layer == name);
    match (position(from), position(to)) {
        (Some(from), Some(to)) => from <= to,
        (None, Some(_)) => to == "error",
        _ => true,
    }
}

#[test]
fn layers_import_downwards() {
    let mut problems = Vec::new();
    for file in rust_files(&["src"]) {
        let Some(from) = layer_of(&file.path) else { continue };
        if !LAYERS.contains(&from) && !LEAVES.contains(&from) {
            problems.push(format!("{}: `{from}` is neither layer nor leaf", file.path));
        }
        let wrong = imports(&file.text).into_iter().filter(|to| !may_import(from, to));
        problems.extend(wrong.map(|to| format!("{}: `{from}` must not import `{to}`", file.path)));
    }
    fail_on(problems);
}

#[test]
fn the_layer_checker_sees_what_it_should() {
    assert_eq!(imports("use crate::engine::Session; // crate::ui"), ["engine"]);
    assert_eq!(
        imports("use crate::{harness::{self, Case}, ui};\nlet x = crate::quant::find();"),
        ["harness", "ui", "quant"]
    );
    assert_eq!(imports("use crate::{\n    a,\n    b::c,\n};"), ["a", "b"]);
    assert_eq!((layer_of("src/quant/nf4/mod.rs"), layer_of("src/cli.rs")), (Some("quant"), Some("cli")));
    assert_eq!(layer_of("src/lib.rs"), None);
    for (from, to, allowed) in [
        ("engine", "quant", true),
        ("quant", "engine", false),
        ("quant", "quant", true),
        ("kernels", "record", true),
        ("record", "engine", false),
        ("report", "error", true),
        ("report", "stats", true),
    ] {
        assert_eq!(may_import(from, to), allowed, "{from} → {to}");
    }
}

#[test]
fn files_are_short() {
    let long = |file: &SourceFile| file.text.lines().count() > MAX_LINES;
    let files = rust_files(&["src", "tests", "benches"]);
    let kernels = files_ending(&["src"], &[".cu", ".cuh"]);
    let problems = files.iter().chain(&kernels).filter(|file| long(file));
    fail_on(
        problems.map(|file| format!("{}: {} lines of {MAX_LINES}", file.path, file.text.lines().count())).collect(),
    );
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
const LOWERINGS: &[&str] = &["src/lower", "src/plan/fuse.rs", "src/engine/cpu/schedule.rs", "src/engine/reference.rs"];

/// Lines, from 1, with a pattern that leaves fields of an operation's struct out. `..` before an expression is a value's.
fn incomplete_patterns(text: &str) -> Vec<usize> {
    let text: String = text.lines().map(|line| format!("{}\n", code(line))).collect();
    let is_incomplete = |rest: &str| rest.split('}').next().is_some_and(|fields| fields.trim_end().ends_with(".."));
    let found = text.match_indices("Spec {").filter(|(at, found)| is_incomplete(&text[at + found.len()..]));
    found.map(|(at, _)| text[..at].lines().count()).collect()
}

#[test]
fn lowerings_take_operations_apart_whole() {
    let mut problems = Vec::new();
    for file in rust_files(&["src"]).iter().filter(|file| LOWERINGS.iter().any(|path| file.path.starts_with(path))) {
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

#[test]
fn contributing_names_the_tables_and_the_dependencies() {
    let text = read("CONTRIBUTING.md");
    for table in ["`FORMATS`", "`ARCHITECTURES`", "`METRICS`", "`WRITERS`"] {
        assert!(text.contains(table), "CONTRIBUTING.md does not say how to add a row to {table}");
    }
    for dependency in dependencies(&read("Cargo.toml")) {
        assert!(text.contains(&format!("`{dependency}`")), "CONTRIBUTING.md does not say why `{dependency}` is there");
    }
}

/// Names in the dependency sections of a Cargo.toml.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in manifest.lines() {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            inside = section.ends_with("dependencies");
            names.extend(section.split_once("dependencies.").map(|(_, name)| name.to_owned()));
        } else if let Some((name, _)) = line.split_once('=').filter(|_| inside) {
            names.push(name.trim().to_owned());
        }
    }
    names
}

#[test]
fn the_dependency_reader_sees_every_section() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na = \"1\"\nb-c = { version = \"1\" }\n\n[dependencies.d]\nversion = \"1\"\n\
                    [dev-dependencies]\ne = \"1\"\n[profile.dev]\nopt-level = 1";
    assert_eq!(dependencies(manifest), ["a", "b-c", "d", "e"]);
}

#[test]
fn readme_tables_follow_the_code() {
    let text = read("README.md");
    let formats = quant::FORMATS.iter().map(|entry| entry.name);
    let architectures = models::ARCHITECTURES.iter().map(|entry| entry.model_type);
    let shapes = weights::builtin_models().iter().map(|shape| shape.name);
    let metrics = record::metrics::METRICS.iter().map(|metric| metric.key);
    let writers = report::WRITERS.iter().map(|writer| writer.name);
    let names = formats.chain(architectures).chain(shapes).chain(metrics).chain(writers);
    fail_on(
        names.filter(|name| !has_row(&text, name)).map(|name| format!("no row for `{name}` in README.md")).collect(),
    );
}

/// Does a table of `text` have a row whose first cell starts with `name` in backticks?
fn has_row(text: &str, name: &str) -> bool {
    text.lines().any(|line| line.starts_with(&format!("| `{name}`")))
}

#[test]
fn the_row_finder_reads_first_cells() {
    let table = "| precision | what |\n|---|---|\n| `nf4`, `4bit` | see `int8` |";
    assert!(has_row(table, "nf4") && !has_row(table, "int8") && !has_row(table, "nf"));
}

/// Hosts that text may link to.
const HOSTS: &[&str] = &[
    "github.com",
    "git-lfs.github.com",
    "huggingface.co",
    "arxiv.org",
    "doc.rust-lang.org",
    "docs.rs",
    "keepachangelog.com",
    "semver.org",
    "www.apache.org",
    "opensource.org",
    "json-schema.org",
    "localhost",
    "127.0.0.1",
];

/// Hosts after `://`; names with a placeholder or of the reserved `.example`, `.invalid` and `.test` domains are none.
fn hosts(text: &str) -> Vec<&str> {
    let after = text.match_indices("://").map(|(at, found)| &text[at + found.len()..]);
    after
        .map(|rest| &rest[..rest.find(|c: char| !c.is_ascii_alphanumeric() && !".-".contains(c)).unwrap_or(rest.len())])
        .map(|host| host.trim_end_matches('.'))
        .filter(|host| host.contains('.') && ![".example", ".invalid", ".test"].iter().any(|end| host.ends_with(end)))
        .collect()
}

#[test]
fn text_names_no_machine() {
    let mut problems = Vec::new();
    let here = format!("{}/", root().display());
    let above = root().parent().map(|folder| format!("{}/", folder.display()));
    let above = above.filter(|folder| folder.len() > 2 && !std::env::temp_dir().starts_with(folder));
    for file in tracked_files().iter().filter(|file| file.path != "Cargo.lock") {
        let unknown = hosts(&file.text).into_iter().filter(|host| !HOSTS.contains(host));
        problems.extend(unknown.map(|host| format!("{}: host `{host}`", file.path)));
        let paths = std::iter::once(&here).chain(&above).filter(|path| file.text.contains(path.as_str()));
        problems.extend(paths.map(|path| format!("{}: path `{path}` of this machine", file.path)));
    }
    fail_on(problems);
}

#[test]
fn the_host_finder_reads_urls() {
    let text = "see https://arxiv.org/abs/1, http://127.0.0.1:{port}/x, http://hub.example/a and `scheme://name`.";
    assert_eq!(hosts(text), ["arxiv.org", "127.0.0.1"]);
}

/// Modules whose files import each other without a circle, and never their own façade.
const WITHOUT_CIRCLES: &[&str] = &["harness", "ipc", "protocol", "suite", "os"];

/// Every path of `use` items, with groups taken apart: `use a::{b, c::d};` gives `a::b` and `a::c::d`. Tests are left out.
fn used_paths(text: &str) -> Vec<String> {
    let tests = ["\n#[cfg(test)]", "\n#[cfg(all(test"].iter().filter_map(|start| text.find(start)).min();
    let text = &text[..tests.unwrap_or(text.len())];
    let code: String = text.lines().map(|line| format!("{}\n", code(line))).collect();
    let items = code.split(';').filter_map(|item| item.rsplit_once("use ").map(|(_, tree)| tree));
    items.flat_map(|tree| leaves("", tree.trim())).collect()
}

fn leaves(prefix: &str, tree: &str) -> Vec<String> {
    let Some((head, inside)) = tree.split_once('{') else {
        return vec![format!("{prefix}{}", tree.split(" as ").next().unwrap_or(tree).trim())];
    };
    let inside = inside.trim_end().trim_end_matches('}');
    let (mut depth, mut start, mut members) = (0, 0, Vec::new());
    for (at, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                members.push(&inside[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    members.push(&inside[start..]);
    let members = members.iter().map(|member| member.trim()).filter(|member| !member.is_empty());
    members.flat_map(|member| leaves(&format!("{prefix}{head}"), member)).collect()
}

/// `harness/watch/mod.rs` is `harness::watch`.
fn module_of(path: &str) -> String {
    let path = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    path.replace('/', "::")
}

/// The module of `modules` that a path in the module `from` means; the longest one that is a prefix of it.
fn resolve(from: &str, path: &str, modules: &[String]) -> Option<String> {
    let (mut base, mut rest): (Vec<&str>, Vec<&str>) = (from.split("::").collect(), path.split("::").collect());
    match rest.first() {
        Some(&"crate") => base.clear(),
        Some(&("super" | "self")) => {}
        _ => return None,
    }
    while matches!(rest.first(), Some(&("super" | "self" | "crate"))) {
        if rest.remove(0) == "super" {
            base.pop();
        }
    }
    let full = [base, rest].concat();
    (1..=full.len()).rev().map(|n| full[..n].join("::")).find(|module| modules.contains(module))
}

#[test]
fn some_modules_have_no_circles() {
    let files = rust_files(&["src"]);
    let modules: Vec<String> = files.iter().map(|file| module_of(&file.path)).collect();
    let inside = |name: &str, module: &str| module == name || module.starts_with(&format!("{name}::"));
    let mut problems = Vec::new();
    for name in WITHOUT_CIRCLES {
        // Façades only declare and re-export, so that an import of one is a circle with everything in it.
        let mut edges: Vec<(String, Vec<String>)> = Vec::new();
        for (file, from) in files.iter().zip(&modules).filter(|(_, module)| inside(name, module)) {
            let to: Vec<String> =
                used_paths(&file.text).iter().filter_map(|path| resolve(from, path, &modules)).collect();
            if to.iter().any(|to| to == name && from != name) {
                problems.push(format!("{}: imports the façade `{name}` of its own folder", file.path));
            }
            edges.push((from.clone(), to.into_iter().filter(|to| inside(name, to) && to != from).collect()));
        }
        // Modules whose imports are all gone go, until none is left; what stays is in a circle or above one.
        while let Some(at) = edges.iter().position(|(_, to)| to.is_empty()) {
            let (gone, _) = edges.remove(at);
            edges.iter_mut().for_each(|(_, to)| to.retain(|to| *to != gone));
        }
        problems.extend(edges.iter().map(|(from, to)| format!("a circle: {from} imports {}", to.join(", "))));
    }
    fail_on(problems);
}

#[test]
fn use_trees_are_taken_apart() {
    let text = "use super::{a, b::{c, d as e}};\npub use self::f::G;\n#[cfg(test)]\npub mod tests { use super::h; }";
    assert_eq!(used_paths(text), ["super::a", "super::b::c", "super::b::d", "self::f::G"]);
    let modules = ["x", "x::a", "x::b", "y"].map(str::to_owned);
    let resolved = |path: &str| resolve("x::a", path, &modules);
    assert_eq!(resolved("super::b::C").as_deref(), Some("x::b"));
    assert_eq!(resolved("super::Case").as_deref(), Some("x"));
    assert_eq!(resolved("crate::y::z").as_deref(), Some("y"));
    assert_eq!(resolved("std::fs"), None);
}
