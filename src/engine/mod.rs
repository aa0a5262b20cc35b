//! Sessions: a loaded model that prefills and decodes. Executors run a model's plans: the reference on candle tensors,
//! and the CPU engine with our own threaded kernels. Beside them stand candle-transformers' own models.

#![deny(clippy::wildcard_enum_match_arm)]

pub mod candle;
pub mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
pub mod fake;
mod load;
pub mod memory;
pub mod needs;
mod recompute;
pub mod reference;

use std::time::Duration;

use anyhow::Result;

use crate::events::Listener;
use crate::kernels::isa::Isa;
use crate::plan::Model;
use crate::quant::FormatId;
pub use crate::quant::OutlierColumns;
use crate::weights::Source;
use crate::weights::policy::Formats;

/// A loaded model with its key/value cache. Every call continues where the cache ends.
pub trait Session {
    /// Tokens that the cache holds.
    fn position(&self) -> usize;

    /// Forgets all that the cache holds from `position` on. `position` ≤ [`Self::position`].
    fn rewind(&mut self, position: usize);

    /// Runs the encoder, where the model has one, over a prompt or a picture; the decoder calls behind it read the result.
    fn encode(&mut self, input: EncoderInput) -> Result<()>;

    /// Runs `tokens` (at least one) in one call and returns the greedy next token, once the host can read it.
    fn prefill(&mut self, tokens: &[u32]) -> Result<u32>;

    /// `n` further greedy steps after [`Self::prefill`] or an earlier `decode`; each feeds the token before it.
    /// `on_token` is called once a step, as soon as the host can read its token. End-of-sequence tokens are not special.
    fn decode(&mut self, n: usize, on_token: &mut dyn FnMut(u32)) -> Result<()>;

    /// Runs `tokens` in one call as [`Self::prefill`] does and hands out the logits of every row in turn, fp32 `[vocab]`: what
    /// the model expected after each token. The caller's memory stays free of `[rows, vocab]`.
    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()>;

    /// Logits from which the last token was chosen, fp32 `[vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;

    /// Waits until the device has done all that was asked.
    fn synchronize(&mut self) -> Result<()>;

    /// Nanoseconds of each decode step since the last prefill by the device's own clock, for comparison with the host's; empty
    /// where the device has none.
    fn device_step_ns(&mut self) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// The device's memory pool; `None` on the CPU, whose memory the process accounts for.
    fn pool(&self) -> Option<&dyn memory::Pool> {
        None
    }

    fn footprint(&self) -> Footprint;

    /// Zero for formats without outlier columns.
    fn outlier_columns(&mut self) -> Result<OutlierColumns>;

    /// Decode steps at `position` beside what their arithmetic and their memory take alone. All else of the session stays as it is but
    /// what the cache holds from `position` on. `None` where an engine cannot tell the two apart.
    fn alone(&mut self, _position: usize) -> Result<Option<Alone>> {
        Ok(None)
    }
}

/// Nanoseconds of decode steps and of their parts alone, one of each a round.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Alone {
    /// The real step.
    pub step_ns: Vec<u64>,
    /// The same arithmetic on matrices that stay in the cache.
    pub arithmetic_ns: Vec<u64>,
    /// Reading what the step reads, without arithmetic.
    pub memory_ns: Vec<u64>,
}

impl Alone {
    /// The rounds of both.
    pub fn and(mut self, later: Self) -> Self {
        self.step_ns.extend(later.step_ns);
        self.arithmetic_ns.extend(later.arithmetic_ns);
        self.memory_ns.extend(later.memory_ns);
        self
    }
}

/// Whose code runs a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Engine {
    /// Plans on our own executors.
    #[default]
    Quantbench,
    /// candle-transformers' models.
    Candle,
}

/// Every engine that can be asked for.
pub static ENGINES: [Engine; 2] = [Engine::Quantbench, Engine::Candle];

impl Engine {
    /// As records and the command line spell it.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Quantbench => "quantbench",
            Engine::Candle => "candle",
        }
    }

    pub fn version(self) -> &'static str {
        match self {
            Engine::Quantbench => env!("CARGO_PKG_VERSION"),
            Engine::Candle => candle::VERSION,
        }
    }

    /// Whether it has anything to run at this precision.
    pub fn runs(self, precision: FormatId) -> bool {
        self == Engine::Quantbench || precision == candle::PRECISION
    }
}

/// What an encoder reads.
#[derive(Debug, Clone, Copy)]
pub enum EncoderInput<'a> {
    Tokens(&'a [u32]),
    /// Normalised pixels, `[3, size, size]`.
    Pixels(&'a [f32]),
}

/// Exact bytes that a session holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Footprint {
    /// Weights in their stored formats: codes and statistics, no padding.
    pub weights_bytes: u64,
    /// Weights as they lie in memory, padding and repacking included.
    pub weights_resident_bytes: u64,
    pub kv_cache_bytes: u64,
    /// Activations and scratch.
    pub scratch_bytes: u64,
    /// Bytes of weights that one decode step reads.
    pub weight_bytes_per_token: u64,
    /// Bytes of keys and values for one position.
    pub kv_bytes_per_position: u64,
    /// Bytes of the encoder's keys and values that every decode step reads, whatever its position.
    pub cross_kv_bytes: u64,
}

/// What to load a session from.
pub struct Setup<'a> {
    pub model: &'a Model,
    pub source: &'a dyn Source,
    /// The precision, and what it holds each role in.
    pub formats: &'a Formats,
    pub device: Device,
    /// Workers of the CPU engine, at least 1.
    pub threads: usize,
    /// Tokens that the decoder's key/value cache must hold: depth + prompt + generated.
    pub capacity: usize,
    /// Tokens or patches that the encoder must hold; 0 without one.
    pub encoder_capacity: usize,
    /// A decode step on CUDA is replayed as one graph; its kernels are launched one by one otherwise.
    pub cuda_graph: bool,
}

/// A device that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(usize),
}

/// A session and how it came to be.
pub struct Loaded {
    pub session: Box<dyn Session>,
    /// First byte read to weights usable.
    pub load: Duration,
    /// Time spent quantizing and repacking, summed over threads and divided by them.
    pub quantize: Duration,
    /// Finite checkpoint values that became infinite in fp16.
    pub fp16_overflow: u64,
    /// Instruction set of the kernels, or the CUDA architecture.
    pub isa: String,
}

/// Loads a session on the asked device.
pub fn load(setup: &Setup, events: &dyn Listener) -> Result<Loaded> {
    match setup.device {
        Device::Cpu => cpu::load(setup, Isa::detect(), events),
        Device::Cuda(ordinal) => cuda::load(setup, ordinal, events),
    }
}
