//! The only writer to the terminal: results on stdout, progress and errors on stderr.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::Mutex;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error;
use crate::events::{Event, Listener, Unit};
use crate::report;

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

/// Whether stdout is a terminal: what it shows is read by a person at once.
pub fn shows_people() -> bool {
    io::stdout().is_terminal()
}

/// Writes a line about what happens to stderr.
pub fn note(line: &str) {
    // Where stderr is closed there is nobody left to tell.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Writes an error, what caused it, and what to do about it to stderr.
pub fn print_error(error: &anyhow::Error) {
    // Where stderr is closed there is nobody left to tell.
    let words: Vec<String> = std::env::args().collect();
    let _ = io::stderr().write_all(error_text(error, &words).as_bytes());
}

/// Writes to stderr what belongs beside a result that a program reads.
pub fn print_aside(text: &str) {
    // Where stderr is closed there is nobody left to tell.
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
        if !["--model-id", "--weights", "--revision"].contains(&option) {
            command.push(word.clone());
            continue;
        }
        if !has_value {
            rest.next();
        }
        if option == "--model-id" {
            names_model = true;
            command.extend(["--model-id".to_owned(), id.to_owned()]);
        }
    }
    command.extend(["--weights", "random"].map(str::to_owned));
    names_model.then(|| command.iter().map(|word| report::quote(word)).collect::<Vec<_>>().join(" "))
}

/// Shows events as a progress bar on stderr; silent where stderr is no terminal.
pub struct Progress {
    shown: bool,
    bar: Mutex<ProgressBar>,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        Self { shown: !quiet && io::stderr().is_terminal(), bar: Mutex::new(ProgressBar::hidden()) }
    }

    /// A line above the bar.
    fn warn(&self, line: &str) {
        let bar = self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        bar.suspend(|| note(line));
    }

    fn begin(label: String, total: u64, unit: Unit) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
        bar.set_style(style(unit));
        bar.set_message(label);
        bar
    }
}

impl Listener for Progress {
    fn on(&self, event: Event) {
        // One that no record keeps is shown at once, however quiet the run is.
        if let Event::Warning { name, message } = event {
            return self.warn(&format!("warning: {name}: {message}"));
        }
        if !self.shown {
            return;
        }
        // A listener that panicked elsewhere leaves a bar that is still fit to draw.
        let mut bar = self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match event {
            Event::Begin { label, total, unit } => {
                bar.finish_and_clear();
                *bar = Self::begin(label, total, unit);
            }
            Event::Progress { done } => bar.set_position(done),
            Event::End => bar.finish_and_clear(),
            Event::Warning { .. } => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.on(Event::End);
    }
}

fn style(unit: Unit) -> ProgressStyle {
    let template = match unit {
        Unit::Bytes => "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
        Unit::Runs => "{msg} [{bar:30}] {pos}/{len}",
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar()) // The tests draw both templates.
        .progress_chars("=> ")
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
            ("qb suite s.toml", "quantbench --model-id microsoft/phi-2 --weights random"),
        ] {
            let words: Vec<String> = typed.split(' ').map(str::to_owned).collect();
            assert_eq!(with_own_options(hint, &words), format!("check the network, or: {command}"), "{typed}");
        }
        assert_eq!(with_own_options("look again", &["qb".to_owned()]), "look again");
    }

    #[test]
    fn templates_are_valid() {
        for unit in [Unit::Bytes, Unit::Runs] {
            Progress::begin("load".into(), 1, unit).finish_and_clear();
            assert!(!format!("{:?}", style(unit).get_tick_str(0)).is_empty());
        }
    }

    #[test]
    fn events_move_the_bar_in_whatever_order_they_come() {
        let progress = Progress { shown: true, bar: Mutex::new(ProgressBar::hidden()) };
        let bar = || progress.bar.lock().unwrap().clone();
        let begin = |total| progress.on(Event::Begin { label: "runs".into(), total, unit: Unit::Runs });
        // Before anything has begun.
        progress.on(Event::End);
        progress.on(Event::Progress { done: 3 });
        begin(8);
        let first = bar();
        assert_eq!((first.message().as_str(), first.length(), first.position()), ("runs", Some(8), 0));
        progress.on(Event::Progress { done: 5 });
        progress.on(Event::Warning { name: "hot".into(), message: "too hot".into() });
        assert_eq!((first.position(), first.is_finished()), (5, false));
        begin(0);
        assert_eq!((first.is_finished(), bar().length(), bar().position()), (true, Some(0), 0));
        progress.on(Event::End);
        progress.on(Event::End);
        assert!(bar().is_finished());
    }

    #[test]
    fn a_quiet_run_has_no_bar() {
        let progress = Progress { shown: false, bar: Mutex::new(ProgressBar::hidden()) };
        progress.on(Event::Begin { label: "runs".into(), total: 8, unit: Unit::Runs });
        assert_eq!(progress.bar.lock().unwrap().length(), None);
    }
}
