//! The only writer to the terminal: results on stdout, progress and errors on stderr.

mod progress;

pub use progress::Progress;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use clap::ColorChoice;
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

use crate::error;
use crate::os::interrupt;
use crate::report::{self, Terminal};

/// What `--color` says.
static COLOR: OnceLock<ColorChoice> = OnceLock::new();

/// Decides about colour for the rest of the program.
pub fn set_color(choice: ColorChoice) {
    // The first one counts: there is one command line.
    let _ = COLOR.set(choice);
}

/// Decides if a stream is coloured: as `--color` says, else where it is a terminal that has colours and `NO_COLOR` is not set.
fn is_coloured(is_terminal: bool) -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    match COLOR.get() {
        Some(ColorChoice::Always) => true,
        Some(ColorChoice::Never) => false,
        Some(ColorChoice::Auto) | None => {
            is_terminal && set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
        }
    }
}

/// Columns and colour of stdout, for what people read there.
pub fn terminal() -> Terminal {
    terminal_of(&io::stdout())
}

/// The same of stderr, for what stands beside a result that a program reads.
pub fn terminal_aside() -> Terminal {
    terminal_of(&io::stderr())
}

#[cfg(unix)]
use std::os::fd::AsFd as Handle;
#[cfg(windows)]
use std::os::windows::io::AsHandle as Handle;

fn terminal_of<S: IsTerminal + Handle>(stream: &S) -> Terminal {
    let is_terminal = stream.is_terminal();
    let typed = || std::env::var("COLUMNS").ok()?.parse::<usize>().ok().filter(|columns| *columns > 0);
    let seen = || terminal_size::terminal_size_of(stream).map(|(width, _)| usize::from(width.0));
    let columns = if is_terminal { typed().or_else(seen) } else { None };
    Terminal { columns, colour: is_coloured(is_terminal) }
}

/// Writes a result to stdout. A reader that closed its end has seen what it wanted: that is no error.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("writing the result to stdout"),
    }
}

/// As [`print()`], for what nobody has elsewhere: where stdout takes nothing, stderr gets it.
pub fn print_measured(text: &str) -> Result<()> {
    let printed = print(text);
    if printed.is_err() {
        print_aside(text);
    }
    printed
}

/// Lets the first Ctrl-C end the run behind the repeat that runs, and the second one at once.
pub fn end_on_interrupt() {
    // Where signals cannot be caught, the first one ends the program.
    let Ok(mut signals) = Signals::new([SIGINT]) else { return };
    std::thread::spawn(move || {
        for (at, _) in signals.forever().enumerate() {
            if at > 0 {
                std::process::exit(INTERRUPTED.into());
            }
            interrupt::request();
            note("stopping behind this run: what was measured is kept; Ctrl-C again ends at once");
        }
    });
}

/// The exit code of a run that the user ended, as shells have it.
pub const INTERRUPTED: u8 = 130;

/// Whether stdout is a terminal: what it shows is read by a person at once.
pub fn shows_people() -> bool {
    io::stdout().is_terminal()
}

/// Writes a line about what happens to stderr.
pub fn note(line: &str) {
    // A closed stderr leaves nowhere to report the error.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Writes an error, what caused it, and what to do about it to stderr.
pub fn print_error(error: &anyhow::Error) {
    // A closed stderr leaves nowhere to report the error.
    let words: Vec<String> = std::env::args().collect();
    let mut text = error_text(error, &words);
    if is_coloured(io::stderr().is_terminal()) {
        text = with_coloured_labels(&text);
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Writes to stderr what belongs beside a result that a program reads.
pub fn print_aside(text: &str) {
    // A closed stderr leaves nowhere to report the error.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// `words` are the command line.
fn error_text(error: &anyhow::Error, words: &[String]) -> String {
    let mut text = String::new();
    for (index, cause) in error.chain().enumerate() {
        let label = if index == 0 { "error" } else { "  caused by" };
        text += &format!("{label}: {}\n", error::without_backtrace(&cause.to_string()));
    }
    if let Some(hint) = error::hint(error) {
        text += &format!("\nhint: {}\n", with_own_options(&hint, words));
    }
    text
}

/// `error:` in red and `hint:` in green.
fn with_coloured_labels(text: &str) -> String {
    let coloured = |line: &str| match (line.strip_prefix("error:"), line.strip_prefix("hint:")) {
        (Some(rest), _) => format!("\x1b[1;31merror:\x1b[0m{rest}\n"),
        (_, Some(rest)) => format!("\x1b[1;32mhint:\x1b[0m{rest}\n"),
        _ => format!("{line}\n"),
    };
    text.lines().map(coloured).collect()
}

/// How a command in a hint begins and ends that measures another model's shape instead.
const SHAPE_COMMAND: (&str, &str) = ("quantbench --model-id ", " --weights random");

/// A hint that ends with such a command, with all the options that were typed in it: whoever pastes it wants the same otherwise.
fn with_own_options(hint: &str, words: &[String]) -> String {
    let own = || {
        let at = hint.rfind(SHAPE_COMMAND.0)?;
        let id = hint[at + SHAPE_COMMAND.0.len()..].strip_suffix(SHAPE_COMMAND.1)?;
        Some(format!("{}{}", &hint[..at], shape_command(id, words)?))
    };
    own().unwrap_or_else(|| hint.to_owned())
}

/// The command line with another model; `None` where it names none.
fn shape_command(id: &str, words: &[String]) -> Option<String> {
    let mut command = vec![words.first()?.clone()];
    let mut rest = words[1..].iter();
    let mut names_model = false;
    while let Some(word) = rest.next() {
        let (option, has_value) = word.split_once('=').map_or((word.as_str(), false), |(option, _)| (option, true));
        // A commit is one of a repository.
        if !["--model-id", "--model", "-m", "--weights", "--revision"].contains(&option) {
            command.push(word.clone());
            continue;
        }
        if !has_value {
            rest.next();
        }
        if ["--model-id", "--model", "-m"].contains(&option) {
            names_model = true;
            command.extend(["--model-id".to_owned(), id.to_owned()]);
        }
    }
    command.extend(["--weights", "random"].map(str::to_owned));
    names_model.then(|| command.iter().map(|word| report::quote(word)).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;
    use crate::error::BadInput;

    #[test]
    fn an_error_shows_causes_and_hint() {
        let cause = io::Error::new(ErrorKind::NotFound, "no such file");
        let plain = anyhow::Error::new(cause).context("reading `a.json`");
        assert_eq!(error_text(&plain, &[]), "error: reading `a.json`\n  caused by: no such file\n");

        let bad: Result<(), _> = Err(BadInput::new("`--repeats 0`: at least 1 is needed").hint("drop the option"));
        let error = bad.context("reading the command line").unwrap_err();
        let expected = "error: reading the command line\n  caused by: `--repeats 0`: at least 1 is needed\n\n\
                        hint: drop the option\n";
        assert_eq!(error_text(&error, &[]), expected);
    }

    #[test]
    fn a_command_in_a_hint_keeps_the_options_that_were_typed() {
        let hint = "check the network, or: quantbench --model-id microsoft/phi-2 --weights random";
        for (typed, command) in [
            (
                "./qb --model-id Microsoft/phi-2 --precision 4bit --max-new-tokens 64",
                "./qb --model-id microsoft/phi-2 --precision 4bit --max-new-tokens 64 --weights random",
            ),
            (
                "qb run --model-id=x/y --revision main -q --dry-run",
                "qb run --model-id microsoft/phi-2 -q --dry-run --weights random",
            ),
            ("qb -m x/y -p 8", "qb --model-id microsoft/phi-2 -p 8 --weights random"),
            ("qb suite s.toml", "quantbench --model-id microsoft/phi-2 --weights random"),
        ] {
            let words: Vec<String> = typed.split(' ').map(str::to_owned).collect();
            assert_eq!(with_own_options(hint, &words), format!("check the network, or: {command}"), "{typed}");
        }
        assert_eq!(with_own_options("look again", &["qb".to_owned()]), "look again");
    }
}
