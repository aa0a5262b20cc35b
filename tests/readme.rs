//! The commands of README.md and docs/: each is one that the binary takes, and those of the README run, on a tiny model.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clap::Parser;
use quantbench::cli::Cli;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Pages with commands.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let docs = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    docs.chain([root().join("README.md"), root().join("CONTRIBUTING.md")]).collect()
}

/// Commands that begin with `quantbench` in the shell blocks of a page, in order, without comments.
fn commands(page: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(page).unwrap();
    let blocks = text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
    let lines = blocks.flat_map(|block| block.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>());
    lines.filter(|line| line.starts_with("quantbench ") && !line.contains('$')).map(|line| words(&line)).collect()
}

/// As a shell reads them, up to a comment, a pipe or what follows the command.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#' | '|' | '&' | '>' | ';') if word.is_none() => break,
            (None, ' ') => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[test]
fn every_command_is_one() {
    let mut n = 0;
    for page in pages() {
        for words in commands(&page) {
            n += 1;
            match Cli::try_parse_from(&words) {
                Ok(_) => {}
                // `--help` and `--version` end a command well.
                Err(error) if error.exit_code() == 0 => {}
                Err(error) => panic!("{}: {}\n{error}", page.display(), words.join(" ")),
            }
        }
    }
    assert!(n > 30, "{n} commands");
}

/// A model of another kind takes the place of one that is not here, and short runs that of long ones.
fn run(folder: &Path, words: &[String]) -> Output {
    let takes_counts = !measures_nothing(words);
    let local = |word: &String| match word.as_str() {
        "HuggingFaceTB/SmolLM2-135M-Instruct" | "microsoft/phi-2" => "./my-model".to_owned(),
        _ => word.clone(),
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.args(words[1..].iter().map(local));
    let has = |option: &str| words.iter().any(|word| word == option);
    if takes_counts {
        command.args(["--device", "cpu", "--threads", "1"]);
        if !has("quality") {
            // What is shown while it is written is written in a run before the repeats.
            command.args(["--warmup", if has("--stream") { "1" } else { "0" }]);
        }
        if !has("-r") && !has("quality") {
            command.args(["--repeats", "6"]);
        }
        if !has("-n") && !has("quality") {
            command.args(["--max-new-tokens", "2"]);
        }
        if has("--quality") {
            command.args(["--quality-tokens", "40"]);
        }
    }
    command.current_dir(folder).stdin(Stdio::null()).output().unwrap()
}

fn measures_nothing(words: &[String]) -> bool {
    let others = ["compare", "history", "report", "import", "export", "doctor", "suite", "man", "completions"];
    words.get(1).is_some_and(|word| others.contains(&word.as_str()) || word == "-h" || word == "--help")
}

#[test]
fn the_commands_of_the_readme_run() {
    let place = tempfile::tempdir().unwrap();
    let model = place.path().join("my-model");
    fs::create_dir(&model).unwrap();
    for file in fs::read_dir(root().join("tests/golden/models/llama-tiny")).unwrap().flatten() {
        fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    fs::copy(root().join("tests/golden/import/llama-bench.jsonl"), place.path().join("llama-bench.jsonl")).unwrap();
    let mut n = 0;
    // A suite measures models of real size: tests/suite.rs runs one.
    let commands = commands(&root().join("README.md")).into_iter().filter(|words| words[1] != "suite");
    for words in commands {
        let output = run(place.path(), &words);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        // Two runs of the same build may differ by chance.
        let judges = ["compare", "history"].contains(&words[1].as_str());
        let passes = output.status.success() || (judges && output.status.code() == Some(3));
        assert!(passes, "{}: {:?}\n{stdout}\n{stderr}", words.join(" "), output.status.code());
        n += 1;
    }
    assert!(n >= 12, "{n} commands");
    for file in
        ["result.json", "result.html", "report.html", "trend.html", "theirs.json", "my-model-nf4/model.safetensors"]
    {
        assert!(place.path().join(file).is_file(), "no `{file}`");
    }
}

#[test]
fn words_are_a_shells() {
    assert_eq!(words("quantbench -m x --prompt \"a b\" # c"), ["quantbench", "-m", "x", "--prompt", "a b"]);
    assert_eq!(words("quantbench report 'it is' > out | less"), ["quantbench", "report", "it is"]);
    assert_eq!(
        words("quantbench --fail-on decode_tps:-5%,x#y ''"),
        ["quantbench", "--fail-on", "decode_tps:-5%,x#y", ""]
    );
}
