//! Wire types of the engine protocol: what the parent and an engine's process send each other, types only.
//!
//! An engine connects to the Unix socket whose path is in [`SOCKET_VARIABLE`] and says [`Hello`]. From then on one JSON object is
//! one line: a [`EngineRequest`] from the parent; from the engine any number of [`Message::Event`] and then the [`EngineReply`] of the same
//! kind or [`Message::Failed`]. Arrays are safetensors files in the private directory that [`Load`] names. Nothing here imports
//! from this crate, so that `docs/engine-protocol.md` and its JSON schema say all.

mod failure;
mod load;
mod run;

pub use failure::Failure;
pub use load::{HeldModel, HeldPart, Load, LoadReply};
pub use run::{
    BandwidthReport, BandwidthRequest, Encode, Finish, Finished, Logits, MemoryReport, MemoryRequest, RowsReply,
    RunReport, RunRequest, RunWait, Score,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Version of these types. It rises when an engine of the version before cannot do what is asked of it; a field with a default
/// raises nothing.
pub const VERSION: u32 = 2;

/// The environment variable with the path of the socket.
pub const SOCKET_VARIABLE: &str = "QUANTBENCH_SOCKET";

/// What an engine can do beyond `load`, `run` and `finish`. Unknown words are ignored.
pub mod capability {
    /// Answers `logits`.
    pub const LOGITS: &str = "logits";
    /// Answers `score`.
    pub const SCORE: &str = "score";
    /// Answers `memory`.
    pub const MEMORY: &str = "memory";
    /// Runs behind a depth.
    pub const DEPTH: &str = "depth";
    /// Decodes on where a run ended (`proceed`).
    pub const PROCEED: &str = "proceed";
    /// Runs an encoder over tokens.
    pub const ENCODE_TOKENS: &str = "encode_tokens";
    /// Runs an encoder over a picture.
    pub const ENCODE_PICTURE: &str = "encode_picture";
    /// Waits for the device after every token where `wait` says so.
    pub const WAIT: &str = "wait";
    /// Generates several sequences at once.
    pub const BATCH: &str = "batch";
}

/// The first line of an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Hello {
    /// Version of the protocol that the engine speaks.
    pub protocol: u32,
    /// Name of the engine, as rows show it.
    pub engine: String,
    /// Version of the engine.
    pub version: String,
    /// What it can do beyond `load`, `run` and `finish`.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

/// A request of the parent. The engine answers each with the [`EngineReply`] of the same kind, or with [`Message::Failed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineRequest {
    Load(Box<Load>),
    Run(RunRequest),
    Logits(Logits),
    Score(Score),
    Memory(MemoryRequest),
    Finish(Finish),
    /// To quantbench's own worker alone: the bandwidth of a CUDA device, without a model.
    Bandwidth(BandwidthRequest),
}

impl EngineRequest {
    /// Its name on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            EngineRequest::Load(_) => "load",
            EngineRequest::Run(_) => "run",
            EngineRequest::Logits(_) => "logits",
            EngineRequest::Score(_) => "score",
            EngineRequest::Memory(_) => "memory",
            EngineRequest::Finish(_) => "finish",
            EngineRequest::Bandwidth(_) => "bandwidth",
        }
    }
}

/// An answer of an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineReply {
    Hello(Hello),
    Load(Box<LoadReply>),
    Run(RunReport),
    Logits(RowsReply),
    Score(RowsReply),
    Memory(MemoryReport),
    Finish(Finished),
    Bandwidth(BandwidthReport),
}

impl EngineReply {
    /// Its name on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            EngineReply::Hello(_) => "hello",
            EngineReply::Load(_) => "load",
            EngineReply::Run(_) => "run",
            EngineReply::Logits(_) => "logits",
            EngineReply::Score(_) => "score",
            EngineReply::Memory(_) => "memory",
            EngineReply::Finish(_) => "finish",
            EngineReply::Bandwidth(_) => "bandwidth",
        }
    }
}

/// A line of a process whose replies are `R` and whose events are `E`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Message<R, E> {
    /// Progress. Engines need not tell any.
    Event(E),
    /// The request was not done.
    Failed(Failure),
    #[serde(untagged)]
    Reply(R),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_each_and_come_back() {
        let report = RunReport { token_ns: vec![1, u64::MAX], ids: vec![7], ..RunReport::default() };
        let hello = Hello { protocol: 2, engine: "a".to_owned(), version: "1".to_owned(), capabilities: Vec::new() };
        for (message, expected) in [
            (
                Message::Failed(Failure::Error { message: "two\nlines".to_owned() }),
                r#"{"failed":{"kind":"error","message":"two\nlines"}}"#,
            ),
            (Message::Event(3), r#"{"event":3}"#),
            (Message::Reply(EngineReply::Run(report)), r#"{"run":{"#),
            (Message::Reply(EngineReply::Hello(hello)), r#"{"hello":{"protocol":2,"engine":"a","version":"1""#),
        ] {
            let line = serde_json::to_string(&message).unwrap();
            assert!(line.starts_with(expected) && !line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Message<EngineReply, u64>>(&line).unwrap(), message);
        }
        let finish = serde_json::to_string(&EngineRequest::Finish(Finish::default())).unwrap();
        assert!(finish.starts_with(r#"{"finish":{"#), "{finish}");
        let shortest: EngineRequest = serde_json::from_str(r#"{"run":{"prompt":[1],"n_gen":2}}"#).unwrap();
        assert_eq!(shortest, EngineRequest::Run(RunRequest { prompt: vec![1], n_gen: 2, ..RunRequest::default() }));
    }
}
