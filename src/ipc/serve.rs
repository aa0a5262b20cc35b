//! The child's side: requests in, messages out.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failure::failure_of;
use super::lines;
use crate::error::BadInput;
use crate::events::{Event, Listener};
use crate::protocol::{EngineReply, EngineRequest, Hello, Message, SOCKET_VARIABLE};

/// Answers requests from standard input until the parent closes the pipe. Nothing else may write to standard output. Fails on a
/// line that no parent writes; `subcommand` names the child there.
pub fn serve<Q: DeserializeOwned + Send + 'static, R: Serialize>(
    subcommand: &'static str,
    answer: impl FnMut(Q, &dyn Listener) -> Result<R>,
) -> Result<()> {
    let requests = requests(BufReader::new(std::io::stdin()), subcommand);
    answer_all(requests, &Output(Mutex::new(std::io::stdout())), answer)
}

/// Answers requests as an engine until the parent closes the connection. Fails without a socket, which a parent names.
pub fn serve_engine(
    subcommand: &'static str,
    hello: Hello,
    answer: impl FnMut(EngineRequest, &dyn Listener) -> Result<EngineReply>,
) -> Result<()> {
    let path = std::env::var_os(SOCKET_VARIABLE).ok_or_else(|| {
        BadInput::new(format!(
            "`quantbench {subcommand}` is started by quantbench itself, which sets {SOCKET_VARIABLE}"
        ))
    })?;
    let stream = UnixStream::connect(path).context("connecting to the parent")?;
    let requests = requests(BufReader::new(stream.try_clone()?), subcommand);
    let output = Output(Mutex::new(stream));
    output.send(&Message::Reply(EngineReply::Hello(hello)));
    answer_all(requests, &output, answer)
}

fn answer_all<Q, R: Serialize, W: Write + Send>(
    requests: Receiver<Result<Q>>,
    output: &Output<W>,
    mut answer: impl FnMut(Q, &dyn Listener) -> Result<R>,
) -> Result<()> {
    for request in requests {
        let reply = answer(request?, output);
        output.send(&reply.map_or_else(|error| Message::Failed(failure_of(&error)), Message::Reply));
    }
    Ok(())
}

/// Requests line by line, read by a thread of their own. When the parent is gone, so is this process, even in the middle of an
/// answer. The thread sleeps in a read.
fn requests<Q: DeserializeOwned + Send + 'static>(
    input: impl BufRead + Send + 'static,
    subcommand: &'static str,
) -> Receiver<Result<Q>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in input.lines().map_while(Result::ok) {
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

/// The way to the parent, as a listener whose events it relays.
struct Output<W>(Mutex<W>);

impl<W: Write> Output<W> {
    fn send<R: Serialize>(&self, message: &Message<R, Event>) {
        let mut out = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A parent that no longer reads has closed the other way as well, which ends this process.
        // What is no JSON becomes a line that it refuses.
        let _ = lines::send(&mut *out, message).or_else(|_| out.write_all(b"\n"));
    }
}

impl<W: Write + Send> Listener for Output<W> {
    fn on(&self, event: Event) {
        self.send(&Message::<(), Event>::Event(event));
    }
}
