//! What a run is doing: a bar where stderr is a terminal, else a line now and then.

use std::io::{self, IsTerminal};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::{is_coloured, note, print_aside};
use crate::error::size;
use crate::events::{Event, Listener, Unit};

/// Between two lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Between two drawings of a bar in which nothing else happens: its clock goes on.
const TICK: Duration = Duration::from_secs(1);

/// Shows events on stderr.
pub struct Progress {
    shown: Shown,
    phase: Arc<Mutex<Phase>>,
    /// Handle of the lines; dropping it ends them.
    lines: Option<(Sender<()>, JoinHandle<()>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Nothing,
    Lines,
    Bar,
}

/// The current phase.
struct Phase {
    label: String,
    unit: Unit,
    done: u64,
    total: u64,
    /// The estimate so far, for people.
    status: String,
    began: Instant,
    /// Time from there to where the last of `done` was done.
    done_after: Duration,
    /// When all will be done, for the bar, which draws itself.
    end: Arc<Mutex<Option<Instant>>>,
    shown: Shown,
    /// While a text is shown as it is written: whether its last line is empty.
    text_at_start: Option<bool>,
    /// Hidden where no bar is shown, and between phases.
    bar: ProgressBar,
}

impl Progress {
    pub fn new(quiet: bool) -> Self {
        Self::of(match (quiet, io::stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, true) => Shown::Bar,
            (false, false) => Shown::Lines,
        })
    }

    fn of(shown: Shown) -> Self {
        let phase = Phase {
            label: String::new(),
            unit: Unit::Runs,
            done: 0,
            total: 0,
            status: String::new(),
            began: Instant::now(),
            done_after: Duration::ZERO,
            end: Arc::default(),
            shown,
            text_at_start: None,
            bar: ProgressBar::hidden(),
        };
        let phase = Arc::new(Mutex::new(phase));
        let lines = (shown == Shown::Lines).then(|| write_lines(phase.clone()));
        Self { shown, phase, lines }
    }

    /// A line above the bar.
    fn say(&self, line: &str) {
        locked(&self.phase).bar.suspend(|| note(line));
    }
}

/// A listener that panicked elsewhere leaves a phase that is still fit to show.
fn locked<T>(phase: &Mutex<T>) -> MutexGuard<'_, T> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line every so often until the sender is dropped.
fn write_lines(phase: Arc<Mutex<Phase>>) -> (Sender<()>, JoinHandle<()>) {
    let (sender, receiver) = channel();
    let write = move || {
        while receiver.recv_timeout(LINE_EVERY) == Err(RecvTimeoutError::Timeout) {
            let phase = locked(&phase);
            // Not into a text.
            if !phase.label.is_empty() && phase.text_at_start.is_none() {
                note(&phase.line(phase.began.elapsed()));
            }
        }
    };
    (sender, std::thread::spawn(write))
}

impl Listener for Progress {
    fn on(&self, event: Event) {
        match event {
            // One that no record keeps is shown at once, however quiet the run is.
            Event::Warning { name, message } => self.say(&format!("warning: {name}: {message}")),
            Event::Hint { .. } | Event::Note { .. } if self.shown == Shown::Nothing => {}
            Event::Hint { message } => self.say(&format!("hint: {message}")),
            Event::Note { message } => self.say(&message),
            Event::Begin { label, total, unit } => locked(&self.phase).begin(label, total, unit),
            Event::Expect { total } => locked(&self.phase).expect(total),
            Event::Progress { done } => locked(&self.phase).progress(done),
            Event::Status { text } => locked(&self.phase).status(text),
            Event::End => locked(&self.phase).end(),
            // Asked for by name: quiet runs show it too.
            Event::Text { label, text } => print_aside(&locked(&self.phase).text(&label, &text)),
            Event::TextEnd => {
                let mut phase = locked(&self.phase);
                print_aside(phase.end_text());
                if !phase.label.is_empty() {
                    phase.draw_bar();
                }
            }
            // The harness makes a text of them.
            Event::Token { .. } => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        locked(&self.phase).end();
        if let Some((sender, thread)) = self.lines.take() {
            drop(sender);
            // It waits for the sender alone.
            let _ = thread.join();
        }
    }
}

impl Phase {
    fn begin(&mut self, label: String, total: u64, unit: Unit) {
        self.end();
        (self.label, self.unit, self.done, self.total) = (label, unit, 0, total);
        self.began = Instant::now();
        self.done_after = Duration::ZERO;
        self.foresee();
        self.draw_bar();
    }

    fn draw_bar(&mut self) {
        if self.shown == Shown::Bar {
            let bar = ProgressBar::with_draw_target(Some(self.total), ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style(self.unit, self.total, &self.end));
            bar.set_position(self.done);
            bar.set_message(self.label.clone());
            bar.enable_steady_tick(TICK);
            self.bar = bar;
        }
    }

    fn hide_bar(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }

    /// What a piece of a text adds to the terminal: a head before the first one, and nothing that a terminal would obey.
    fn text(&mut self, label: &str, piece: &str) -> String {
        let head = if self.text_at_start.is_none() { head(label) } else { String::new() };
        self.hide_bar();
        let piece: String = piece.chars().filter(|c| !c.is_control() || ['\n', '\t'].contains(c)).collect();
        let at_start = piece.chars().last().map_or(self.text_at_start.unwrap_or(true), |last| last == '\n');
        self.text_at_start = Some(at_start);
        head + &piece
    }

    /// What ends the last line of a text.
    fn end_text(&mut self) -> &'static str {
        match self.text_at_start.take() {
            None => "",
            Some(true) => "\n",
            Some(false) => "\n\n",
        }
    }

    fn expect(&mut self, total: u64) {
        self.total = total.max(self.done);
        self.bar.set_length(self.total);
        self.foresee();
    }

    fn foresee(&self) {
        *locked(&self.end) = self.whole().map(|whole| self.began + whole);
    }

    /// All of it takes as long as what is done took, in proportion; `None` before anything is done, and where one thing is all.
    fn whole(&self) -> Option<Duration> {
        let is_known = self.total > 1 && self.done > 0;
        is_known.then(|| self.done_after.mul_f64(self.total as f64 / self.done as f64))
    }

    /// More than was expected was expected wrongly.
    fn progress(&mut self, done: u64) {
        (self.done, self.done_after) = (done, self.began.elapsed());
        self.expect(self.total);
        self.bar.set_position(done);
    }

    fn status(&mut self, text: String) {
        self.bar.set_prefix(if text.is_empty() { text.clone() } else { format!(" {text}") });
        self.status = text;
    }

    fn end(&mut self) {
        self.hide_bar();
        self.label.clear();
        self.status.clear();
    }

    /// `measure: 12 of about 24 runs, about 20 s left: fp16 71.7, nf4 214 tokens/s`.
    fn line(&self, elapsed: Duration) -> String {
        let of = match self.unit {
            Unit::Bytes => format!(": {} of {}", size(self.done), size(self.total)),
            Unit::Runs if self.total > 1 => format!(": {} of about {} runs", self.done, self.total),
            Unit::Runs => String::new(),
        };
        let time = match self.whole() {
            Some(whole) => format!(", about {}", left(whole.saturating_sub(elapsed))),
            None => format!(", {:.0} s so far", elapsed.as_secs_f64()),
        };
        let status = if self.status.is_empty() { String::new() } else { format!(": {}", self.status) };
        format!("{}{of}{time}{status}", self.label)
    }
}

/// Whose text follows.
fn head(label: &str) -> String {
    if is_coloured(io::stderr().is_terminal()) { format!("\x1b[1m{label}\x1b[0m\n") } else { format!("{label}\n") }
}

/// `20 s left`, or whole minutes; never nothing, since it goes on.
fn left(time: Duration) -> String {
    match time.as_secs_f64().ceil().max(1.0) {
        seconds if seconds < 120.0 => format!("{seconds:.0} s left"),
        seconds => format!("{:.0} minutes left", seconds / 60.0),
    }
}

/// `end` is when all will be done, where that is known.
fn style(unit: Unit, total: u64, end: &Arc<Mutex<Option<Instant>>>) -> ProgressStyle {
    // Narrow terminals have room for a short one.
    let bar = if super::terminal_aside().columns.is_some_and(|columns| columns < 80) { "{bar:6}" } else { "{bar:20}" };
    let template = match unit {
        Unit::Bytes => format!("{{msg}} [{bar}] {{binary_bytes}}/{{binary_total_bytes}}{{left}}{{prefix}}"),
        Unit::Runs if total > 1 => format!("{{msg}} [{bar}] {{pos}}/{{len}}{{left}}{{prefix}}"),
        // One thing is done or not.
        Unit::Runs => "{msg} {spinner} {elapsed}{prefix}".to_owned(),
    };
    let end = end.clone();
    let write_left = move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
        let Some(end) = *locked(&end) else { return };
        // A drawing that fails is drawn again.
        let _ = write!(out, ", {}", left(end.saturating_duration_since(Instant::now())));
    };
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar()) // The tests draw all templates.
        .with_key("left", write_left)
        .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(label: &str, unit: Unit, done: u64, total: u64) -> Phase {
        let (label, bar, began) = (label.to_owned(), ProgressBar::hidden(), Instant::now());
        let (done_after, end) = (Duration::from_secs(20), Arc::default());
        let (status, shown) = (String::new(), Shown::Lines);
        Phase { label, unit, done, total, status, began, done_after, end, shown, text_at_start: None, bar }
    }

    #[test]
    fn a_line_says_how_much_is_left() {
        let after = |phase: &Phase| phase.line(Duration::from_secs(20));
        let mut measure = phase("measure", Unit::Runs, 12, 24);
        assert_eq!(after(&measure), "measure: 12 of about 24 runs, about 20 s left");
        measure.status("fp16 71.7 tokens/s".to_owned());
        assert_eq!(after(&measure), "measure: 12 of about 24 runs, about 20 s left: fp16 71.7 tokens/s");
        assert_eq!(after(&phase("warm up fp16", Unit::Runs, 0, 1)), "warm up fp16, 20 s so far");
        let load = phase("load nf4", Unit::Bytes, 1 << 30, 3 << 30);
        assert_eq!(after(&load), "load nf4: 1.00 GiB of 3.00 GiB, about 40 s left");
        assert_eq!(after(&phase("measure", Unit::Runs, 0, 24)), "measure: 0 of about 24 runs, 20 s so far");
    }

    #[test]
    fn no_more_is_done_than_all() {
        let mut phase = phase("measure", Unit::Runs, 0, 18);
        phase.progress(20);
        assert_eq!((phase.done, phase.total), (20, 20));
        phase.expect(10);
        assert_eq!((phase.done, phase.total), (20, 20));
        phase.expect(30);
        phase.done_after = Duration::from_secs(20);
        assert_eq!(phase.whole(), Some(Duration::from_secs(30)));
        // Nothing more is done: the time that is left falls, and does not rise.
        assert_eq!(phase.line(Duration::from_secs(22)), "measure: 20 of about 30 runs, about 8 s left");
        assert_eq!(phase.line(Duration::from_secs(99)), "measure: 20 of about 30 runs, about 1 s left");
        phase.expect(400);
        assert_eq!(phase.line(Duration::from_secs(22)), "measure: 20 of about 400 runs, about 6 minutes left");
    }

    #[test]
    fn templates_are_valid() {
        for (unit, total) in [(Unit::Bytes, 9), (Unit::Runs, 9), (Unit::Runs, 1)] {
            let drawn = ProgressBar::hidden();
            let style = style(unit, total, &Arc::default());
            drawn.set_style(style.clone());
            drawn.finish_and_clear();
            // A template that is wrong gives the default style, which has another bar.
            assert!(format!("{:?}", style.get_tick_str(0)).len() > 2);
        }
    }

    #[test]
    fn events_move_the_phase_in_whatever_order_they_come() {
        let progress = Progress::of(Shown::Lines);
        let seen = || {
            let phase = locked(&progress.phase);
            (phase.label.clone(), phase.done, phase.total)
        };
        let begin = |total| progress.on(Event::Begin { label: "runs".into(), total, unit: Unit::Runs });
        // Before anything has begun.
        progress.on(Event::End);
        progress.on(Event::Progress { done: 3 });
        begin(8);
        assert_eq!(seen(), ("runs".to_owned(), 0, 8));
        progress.on(Event::Progress { done: 5 });
        progress.on(Event::Expect { total: 12 });
        progress.on(Event::Status { text: "fp16 71.7 tokens/s".into() });
        progress.on(Event::Warning { name: "hot".into(), message: "too hot".into() });
        assert_eq!(
            (seen(), locked(&progress.phase).status.as_str()),
            (("runs".to_owned(), 5, 12), "fp16 71.7 tokens/s")
        );
        begin(0);
        assert_eq!((seen(), locked(&progress.phase).status.as_str()), (("runs".to_owned(), 0, 0), ""));
        progress.on(Event::End);
        progress.on(Event::End);
        assert_eq!(seen().0, "", "no line between phases");
    }

    #[test]
    fn a_text_has_a_head_and_ends_its_line_and_commands_no_terminal() {
        let mut phase = phase("warm up fp16", Unit::Runs, 0, 1);
        let mut say = |piece: &str| phase.text("fp16", piece);
        assert_eq!(say("Paris"), "fp16\nParis");
        assert_eq!(say(""), "");
        assert_eq!(say(", \x1b[2J\x07it\r\n\tis"), ", [2Jit\n\tis");
        assert_eq!(phase.end_text(), "\n\n");
        assert_eq!(phase.end_text(), "");
        assert_eq!(phase.text("nf4", "Rome\n") + phase.end_text(), "nf4\nRome\n\n");
    }

    #[test]
    fn a_quiet_run_has_neither_bar_nor_lines() {
        let progress = Progress::of(Shown::Nothing);
        progress.on(Event::Begin { label: "runs".into(), total: 8, unit: Unit::Runs });
        assert!(progress.lines.is_none() && locked(&progress.phase).bar.length().is_none());
    }
}
