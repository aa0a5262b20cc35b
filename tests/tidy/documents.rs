//! Documents that follow the code's tables, and hold nothing of a machine.

use quantbench::{models, quant, record, report, weights};

use super::{fail_on, read, root, tracked_files};

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
fn documented_tables_follow_the_code() {
    let text = ["README.md", "docs/metrics.md", "docs/outputs.md"].map(read).concat();
    let formats = quant::FORMATS.iter().map(|entry| entry.name);
    let architectures = models::ARCHITECTURES.iter().map(|entry| entry.model_type);
    let shapes = weights::builtin_models().iter().map(|shape| shape.name);
    let metrics = record::metrics::METRICS.iter().map(|metric| metric.key);
    let writers = report::WRITERS.iter().map(|writer| writer.name);
    let names = formats.chain(architectures).chain(shapes).chain(metrics).chain(writers);
    fail_on(
        names
            .filter(|name| !has_row(&text, name))
            .map(|name| format!("no row for `{name}` in README.md, docs/metrics.md or docs/outputs.md"))
            .collect(),
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
    "www.w3.org",
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
