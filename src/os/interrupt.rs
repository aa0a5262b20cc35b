//! Interruption by the user: Ctrl-C ends a run and keeps what was measured.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Asks for the end. Whoever measures stops behind the repeat that runs.
pub fn request() {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// True once the end was asked for.
pub fn is_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
