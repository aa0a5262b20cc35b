//! The work of one repeat.

use serde::{Deserialize, Serialize};

use crate::protocol::{self, Encode, RunRequest};

/// The work of every repeat.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Task {
    /// Ids in the cache before the prompt, prefilled untimed.
    pub depth: Vec<u32>,
    /// The encoder's input in each repeat, inside the timed prefill.
    pub encode: Encode,
    /// Ids that the decoder starts from: the prompt after its image tokens, or an encoder-decoder model's start token. At least one.
    pub prompt: Vec<u32>,
    /// At least one.
    pub n_gen: usize,
    /// Tokens at which generation ends; empty: always exactly `n_gen`.
    pub stop_at: Vec<u32>,
    /// Warm-up runs; `None`: until the last two agree.
    pub warmup: Option<usize>,
    /// Warm-up starts no further run after this long.
    pub max_time_s: f64,
    pub wait: Wait,
    /// An untimed run before the warm-up sends each token as it comes.
    pub stream: bool,
}

/// The points at which a run waits for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Wait {
    /// Once, at its end; a token counts as soon as the host can read it.
    #[default]
    AtEnd,
    /// [`Self::AtEnd`], and each repeat is followed by a run that waits after every token.
    BothWays,
    /// After every token, as the seed did.
    EachToken,
}

impl Task {
    /// One repeat on the wire.
    pub fn run(&self, each_token: bool) -> RunRequest {
        RunRequest {
            depth: self.depth.clone(),
            encode: self.encode.clone(),
            prompt: self.prompt.clone(),
            n_gen: self.n_gen,
            proceed: false,
            stream: false,
            wait: if each_token { protocol::RunWait::EachToken } else { protocol::RunWait::AtEnd },
        }
    }
}
