//! Wire types of the worker protocol: what the parent and a worker process send each other, types only.
//!
//! One JSON object is one line: a [`WorkerRequest`] on the worker's standard input, and on its standard output any number of
//! [`Message::Event`] and then a [`WorkerReply`] or [`Message::Failed`]. Fields that a later version added have a default, so
//! that a worker of another build is understood.

mod failure;
mod load;
mod measured;
mod score;
mod task;

pub use failure::{Failure, InvalidResult};
pub use load::{DeviceAssignment, LoadReport, LoadRequest};
pub use measured::{FinishReport, Sample, WarmupEnd, WarmupReport};
pub use score::{Greedy, LogitsFile, ScoreReport, ScoreRequest};
pub use task::{Encode, Task, Wait};

use serde::{Deserialize, Serialize};

use crate::engine::memory::MeasuredBandwidth;
use crate::events::Event;

/// Version of these types. It rises when a worker of the version before cannot do what is asked of it; a field with a default
/// raises nothing.
pub const VERSION: u32 = 1;

/// A worker answers each request with the [`WorkerReply`] of the same name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum WorkerRequest {
    Load(Box<LoadRequest>),
    WarmUp,
    Repeat,
    Finish,
    Score(Box<ScoreRequest>),
    /// Measures the CUDA device of this number; no model is loaded for it.
    Bandwidth(usize),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum WorkerReply {
    Loaded(LoadReport),
    Warmed(WarmupReport),
    Sample(Sample),
    Finished(FinishReport),
    Scored(ScoreReport),
    Bandwidth(MeasuredBandwidth),
}

/// A line of a child process whose replies are `R`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message<R> {
    Event(Event),
    Failed(Failure),
    #[serde(untagged)]
    Reply(R),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Unit;

    #[test]
    fn messages_are_one_line_each_and_come_back() {
        let reply = |reply| Message::Reply(reply);
        let sample = Sample { step_ns: vec![1, u64::MAX], ids: vec![7], ..Sample::default() };
        let load = LoadReport { load_s: 0.1, isa: "avx2".to_owned(), ..LoadReport::default() };
        for (message, expected) in [
            (
                Message::Failed(Failure::Error { message: "two\nlines".to_owned() }),
                r#"{"Failed":{"Error":{"message":"two\nlines"}}}"#,
            ),
            (Message::Event(Event::End), r#"{"Event":{"event":"end"}}"#),
            (Message::Event(Event::Begin { label: "a".to_owned(), total: 2, unit: Unit::Runs }), r#"{"Event":"#),
            (reply(WorkerReply::Sample(sample)), r#"{"Sample":{"#),
            (reply(WorkerReply::Loaded(load)), r#"{"Loaded":{"#),
        ] {
            let line = serde_json::to_string(&message).unwrap();
            assert!(line.starts_with(expected) && !line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Message<WorkerReply>>(&line).unwrap(), message);
        }
        assert_eq!(serde_json::to_string(&WorkerRequest::WarmUp).unwrap(), r#""WarmUp""#);
    }
}
