//! Reasons why a process gives no result, as the parent distinguishes them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Reason why a process gives no result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Failure {
    /// What was asked for cannot be done by any precision: the whole run ends.
    BadInput {
        message: String,
        #[serde(default)]
        hint: Option<String>,
    },
    OutOfMemory {
        message: String,
        /// Bytes of the allocation that failed; 0 where unknown.
        #[serde(default)]
        wanted_bytes: u64,
        /// Bytes that were free; 0 where unknown.
        #[serde(default)]
        free_bytes: u64,
    },
    /// The engine runs, and what it computes is wrong.
    Invalid {
        message: String,
    },
    /// The process was still running at the end of its time.
    Timeout {
        message: String,
    },
    Error {
        message: String,
    },
}

impl Failure {
    /// A failure of no special kind.
    pub fn error(message: impl Into<String>) -> Self {
        Failure::Error { message: message.into() }
    }

    pub fn message(&self) -> &str {
        match self {
            Failure::BadInput { message, .. }
            | Failure::OutOfMemory { message, .. }
            | Failure::Invalid { message }
            | Failure::Timeout { message }
            | Failure::Error { message } => message,
        }
    }

    /// The same with `what` in front of the message: for a part of the work that the user did not ask for by name.
    pub fn within(mut self, what: &str) -> Self {
        let (Failure::BadInput { message, .. }
        | Failure::OutOfMemory { message, .. }
        | Failure::Invalid { message }
        | Failure::Timeout { message }
        | Failure::Error { message }) = &mut self;
        *message = format!("{what}: {message}");
        self
    }
}
