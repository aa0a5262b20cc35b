//! Layers: a module imports nothing to its left, and some modules import each other in no circle.

use super::{code, fail_on, rust_files};

/// A module imports nothing to its left.
const LAYERS: &[&str] = &[
    "main", "commands", "cli", "ui", "suite", "harness", "engines", "ipc", "protocol", "quality", "engine", "lower",
    "models", "plan", "call", "weights", "quant", "kernels", "os", "error",
];

/// Every layer may import these; they import each other and `error`.
const LEAVES: &[&str] = &["report", "record", "stats", "rng", "events"];

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

/// Other programs are written against the wire types, so nothing of this crate may be meant by one.
#[test]
fn the_protocol_imports_nothing() {
    let files = rust_files(&["src/protocol"]);
    assert!(files.len() > 2, "the wire types are elsewhere");
    let own = |to: &String| to != "protocol";
    let problems = files.iter().flat_map(|file| {
        let others = imports(&file.text).into_iter().filter(own);
        others.map(|to| format!("{}: the protocol must not import `{to}`", file.path)).collect::<Vec<_>>()
    });
    fail_on(problems.collect());
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

/// Modules whose files import each other without a circle, and never their own façade.
const WITHOUT_CIRCLES: &[&str] = &["harness", "engines", "ipc", "protocol", "suite", "os"];

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
