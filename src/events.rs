//! Progress and warnings, which every layer may emit and only [`crate::ui`] shows.

/// Something worth telling while a command runs.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A phase with a known amount of work began; `unit` is `"bytes"` or `"runs"`.
    Begin { label: String, total: u64, unit: Unit },
    /// So much of the current phase is done.
    Progress { done: u64 },
    /// The current phase ended.
    End,
    /// Something that the reader of the result must know.
    Warning { message: String },
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

/// Drops every event: tests and quiet runs.
pub struct Silent;

impl Listener for Silent {
    fn on(&self, _event: Event) {}
}
