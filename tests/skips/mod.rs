//! Tests that need what a machine lacks. They pass without having tested anything, so the end of each test binary says how many
//! these were and why, and so does the end of `.ci/run`, which collects it from the file that `QUANTBENCH_SKIPS` names.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;
use std::panic::Location;
use std::sync::{Mutex, PoisonError};

/// Tests that were skipped, by the reason.
static SKIPPED: Mutex<BTreeMap<String, BTreeSet<String>>> = Mutex::new(BTreeMap::new());

/// Counts the test that asks. Its thread has its name; where all run in the main thread the place of the call stands for it, in helpers
/// with `#[track_caller]` that of theirs.
#[track_caller]
pub fn skip(reason: impl Display) {
    let thread = std::thread::current();
    let test =
        thread.name().filter(|name| *name != "main").map_or_else(|| Location::caller().to_string(), str::to_owned);
    let mut skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
    if skipped.is_empty() {
        // SAFETY: the function outlives the process and does not unwind.
        unsafe { libc::atexit(say) };
    }
    let reason = reason.to_string();
    skipped.entry(reason.lines().next().unwrap_or_default().to_owned()).or_default().insert(test);
}

/// Writes to the stream itself: what macros print is captured.
extern "C" fn say() {
    let skipped = SKIPPED.lock().unwrap_or_else(PoisonError::into_inner);
    let program = std::env::args().next().unwrap_or_default();
    let program = program.rsplit('/').next().unwrap_or_default();
    let name = program.rsplit_once('-').map_or(program, |(name, _hash)| name);
    let mut text = String::new();
    for (reason, tests) in &*skipped {
        text += &format!("{name}: {} tests had nothing to run on: {reason}\n", tests.len());
    }
    let _ = std::io::stderr().write_all(format!("\n{text}").as_bytes());
    if let Some(path) = std::env::var_os("QUANTBENCH_SKIPS") {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }
}
