//! The work of one repeat.

use serde::{Deserialize, Serialize};

use crate::protocol::{self, Encode, RunRequest};

/// The work of every repeat. Ids of several sequences lie one behind the other, equally many of each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Sequences that are generated at once, at least one.
    pub sequences: usize,
    /// Ids in the cache before the prompt, prefilled untimed.
    pub depth: Vec<u32>,
    /// The encoder's input in each repeat, inside the timed prefill.
    pub encode: Encode,
    /// Ids that the decoder starts from: the prompt after its image tokens, or an encoder-decoder model's start token. At least one.
    pub prompt: Vec<u32>,
    /// Tokens of each sequence, at least one.
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

impl Default for Task {
    /// Nothing, of one sequence.
    fn default() -> Self {
        Self {
            sequences: 1,
            depth: Vec::new(),
            encode: Encode::Nothing,
            prompt: Vec::new(),
            n_gen: 0,
            stop_at: Vec::new(),
            warmup: None,
            max_time_s: 0.0,
            wait: Wait::AtEnd,
            stream: false,
        }
    }
}

impl Task {
    /// Ids of each sequence before the prompt.
    pub fn n_depth(&self) -> usize {
        self.depth.len() / self.sequences
    }

    /// Positions of each sequence before the first decode step.
    pub fn n_before(&self) -> usize {
        self.n_depth() + self.prompt.len() / self.sequences
    }

    /// Tokens that the cache of each sequence must hold.
    pub fn capacity(&self) -> usize {
        self.n_before() + self.n_gen
    }

    /// The ids that the first sequence's encoder and decoder read.
    pub fn of_first(&self) -> (Encode, &[u32]) {
        let encode = match &self.encode {
            Encode::Tokens(tokens) => Encode::Tokens(tokens[..tokens.len() / self.sequences].to_vec()),
            other => other.clone(),
        };
        (encode, &self.prompt[..self.prompt.len() / self.sequences])
    }

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
