//! A message a line, on whatever connects a parent with its child.

use std::io::{self, BufRead, ErrorKind, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::events::Event;
use crate::protocol::{Failure, Message};

pub fn send(out: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// The next reply or failure, after handing on the events before it. A line has at most `most_bytes`; of one that is no message
/// `unreadable` makes a failure. An error means that the other side is gone, or took too long.
pub fn receive<R: DeserializeOwned>(
    input: &mut impl BufRead,
    most_bytes: u64,
    mut on_event: impl FnMut(Event),
    unreadable: impl FnOnce(&str) -> Failure,
) -> io::Result<Result<R, Failure>> {
    loop {
        let mut line = Vec::new();
        if input.by_ref().take(most_bytes).read_until(b'\n', &mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        match serde_json::from_slice(&line) {
            Ok(Message::<R, Event>::Event(event)) => on_event(event),
            Ok(Message::Failed(failure)) => return Ok(Err(failure)),
            Ok(Message::Reply(reply)) => return Ok(Ok(reply)),
            Err(_) => return Ok(Err(unreadable(String::from_utf8_lossy(&line).trim()))),
        }
    }
}
