//! The child's side: requests from standard input, messages to standard output.

use std::io::{BufRead, Write};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::events::{Event, Listener};
use crate::protocol::{Failure, Message};

/// Answers requests until the parent closes the pipe. Nothing else may write to standard output. Fails on a line that no parent
/// writes; `subcommand` names the child there.
pub fn serve<Q: DeserializeOwned + Send + 'static, R: Serialize>(
    subcommand: &'static str,
    mut answer: impl FnMut(Q, &dyn Listener) -> Result<R>,
) -> Result<()> {
    let output = Output(Mutex::new(std::io::stdout()));
    for request in requests(subcommand) {
        let reply = answer(request?, &output);
        output.send(&reply.map_or_else(|error| Message::Failed(Failure::of(&error)), Message::Reply));
    }
    Ok(())
}

/// Requests line by line, read by a thread of their own. When the parent is gone, so is this process, even in the middle of an
/// answer. The thread sleeps in a read.
fn requests<Q: DeserializeOwned + Send + 'static>(subcommand: &'static str) -> Receiver<Result<Q>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let request = serde_json::from_str(&line)
                .with_context(|| format!("the input of `quantbench {subcommand}` comes from quantbench itself"));
            let is_last = request.is_err();
            if sender.send(request).is_err() || is_last {
                return;
            }
        }
        std::process::exit(0);
    });
    receiver
}

/// Standard output as a listener whose events the parent relays.
struct Output(Mutex<std::io::Stdout>);

impl Output {
    fn send<R: Serialize>(&self, message: &Message<R>) {
        let mut line = serde_json::to_string(message).unwrap_or_default();
        line.push('\n');
        let mut out = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A parent that no longer reads has closed the other pipe as well, which ends this process.
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }
}

impl Listener for Output {
    fn on(&self, event: Event) {
        self.send(&Message::<()>::Event(event));
    }
}
