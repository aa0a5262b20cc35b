//! Progress and warnings, which every layer may emit and only [`crate::ui`] shows.

use std::sync::Mutex;

/// Progress or a warning while a command runs.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A phase with a known amount of work began.
    Begin { label: String, total: u64, unit: Unit },
    /// The work of the current phase is now expected to be this much.
    Expect { total: u64 },
    /// Work of the current phase that is done so far.
    Progress { done: u64 },
    /// Interim results, for people.
    Status { text: String },
    /// The current phase ended.
    End,
    /// A worker generated this token of the text that is shown while it is written; `label` names the variant.
    Token { label: String, id: u32 },
    /// The next piece of that text, which the parent makes of the tokens.
    Text { label: String, text: String },
    /// That text ended.
    TextEnd,
    /// A warning about the result; `name` is its spelling in records and filters.
    Warning { name: String, message: String },
    /// A suggestion to the reader; no record keeps it.
    Hint { message: String },
    /// The next step, for people; no record keeps it.
    Note { message: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    Bytes,
    Runs,
}

/// Receives events. Called from any thread; must return quickly.
pub trait Listener: Send + Sync {
    fn on(&self, event: Event);
}

/// Collects warnings for a record and relays every other event.
pub struct Collector<'a> {
    rest: &'a dyn Listener,
    warnings: Mutex<Vec<(String, String)>>,
}

impl<'a> Collector<'a> {
    pub fn new(rest: &'a dyn Listener) -> Self {
        Self { rest, warnings: Mutex::default() }
    }

    /// Name and message of each warning, in order, each once.
    pub fn warnings(self) -> Vec<(String, String)> {
        // A thread that panicked while it held the lock left whole entries.
        self.warnings.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Listener for Collector<'_> {
    fn on(&self, event: Event) {
        let Event::Warning { name, message } = event else { return self.rest.on(event) };
        let mut warnings = self.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let warning = (name, message);
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
}

/// Relays every event but warnings: for work that another process has done and warned of before.
pub struct WithoutWarnings<'a>(pub &'a dyn Listener);

impl Listener for WithoutWarnings<'_> {
    fn on(&self, event: Event) {
        if !matches!(event, Event::Warning { .. }) {
            self.0.on(event);
        }
    }
}

/// Drops every event: tests and quiet runs.
pub struct Silent;

impl Listener for Silent {
    fn on(&self, _event: Event) {}
}
