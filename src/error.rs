//! The errors that code chooses by; everything else is an `anyhow::Error` with context.
//!
//! A message says what, where, what was seen and what is allowed, in lower case without a full stop, with the user's own
//! words in backticks. A hint says what to do next. [`crate::ui`] prints them, and the command ends with [`EXIT_CODE`].

use std::fmt;

/// What the user typed, or a file they named, cannot be used: exit code 2.
#[derive(Debug)]
pub struct BadInput {
    message: String,
    hint: Option<String>,
}

impl BadInput {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: without_backtrace(&message.into()).to_owned(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BadInput {}

/// A model did not fit: the case becomes a record with status `oom` and the others go on.
#[derive(Debug, Clone, Copy)]
pub struct OutOfMemory {
    /// Bytes of the allocation that failed, or that the case is known to need; 0 where unknown.
    pub wanted_bytes: u64,
    /// Bytes that were free then; 0 where unknown.
    pub free_bytes: u64,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes: u64| match bytes as f64 / (1u64 << 20) as f64 {
            mib if mib < 1000.0 => format!("{mib:.1} MiB"),
            mib => format!("{:.2} GiB", mib / 1024.0),
        };
        f.write_str("out of memory")?;
        match (self.wanted_bytes, self.free_bytes) {
            (0, 0) => Ok(()),
            (wanted, 0) => write!(f, ": wanted {}", size(wanted)),
            (0, free) => write!(f, ": {} free", size(free)),
            (wanted, free) => write!(f, ": wanted {}, {} free", size(wanted), size(free)),
        }
    }
}

impl std::error::Error for OutOfMemory {}

/// `text` up to the first backtrace. candle writes one into its messages where `RUST_BACKTRACE` asks for it, and it names the
/// folders of the build, which no record may hold.
pub fn without_backtrace(text: &str) -> &str {
    text.split_once("\n   0: ").map_or(text, |(message, _)| message)
}

/// Exit code of a command that fails with an error: usage or set-up. A failed case is a record, and its command ends with 1.
pub const EXIT_CODE: u8 = 2;

/// The hint of the innermost [`BadInput`] in the chain, if it has one.
pub fn hint(error: &anyhow::Error) -> Option<String> {
    error.downcast_ref::<BadInput>().and_then(BadInput::hint_text).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_sizes_are_not_told() {
        for (wanted_bytes, free_bytes, said) in [
            (0, 0, "out of memory"),
            (3 << 30, 0, "out of memory: wanted 3.00 GiB"),
            (0, 5 << 20, "out of memory: 5.0 MiB free"),
            (3 << 20, 1 << 30, "out of memory: wanted 3.0 MiB, 1.00 GiB free"),
        ] {
            assert_eq!(OutOfMemory { wanted_bytes, free_bytes }.to_string(), said);
        }
    }

    #[test]
    fn backtraces_are_cut() {
        let candle = candle_core::Error::Msg("no `model_type`".into());
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let error = candle_core::Error::WithBacktrace { inner: Box::new(candle), backtrace };
        assert!(error.to_string().lines().count() > 1);
        assert_eq!(without_backtrace(&error.to_string()), "no `model_type`");
        assert_eq!(BadInput::new(format!("config.json: {error}")).to_string(), "config.json: no `model_type`");
        assert_eq!(without_backtrace("two\nlines"), "two\nlines");
    }
}
