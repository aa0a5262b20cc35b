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
pub mod load;
pub mod memory;
pub mod needs;
mod recompute;
pub mod reference;
mod routing;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;

use crate::call::{self, Batch, CacheScope, KvFormat};
use crate::events::Listener;
use crate::kernels::isa::Isa;
use crate::plan::Model;
use crate::quant::FormatId;
pub use crate::quant::OutlierColumns;
use crate::weights::Source;
use crate::weights::policy::Formats;

/// A loaded model with its key/value cache, of as many sequences as it was loaded for. Every call continues each sequence where its
/// cache ends. Sequences are equally long, but where [`Self::prefill_one`] made them differ.
pub trait Session {
    /// Tokens that the cache holds of the longest sequence.
    fn position(&self) -> usize;

    /// Forgets all that the cache holds from `position` on. `position` ≤ [`Self::position`].
    fn rewind(&mut self, position: usize);

    /// Runs the encoder, where the model has one, over the prompts or pictures of all sequences; the decoder calls behind it read the result.
    fn encode(&mut self, input: EncoderInput) -> Result<()>;

    /// Runs `tokens` (at least one a sequence, one for each row of `batch`) in one call and writes the greedy next token of each
    /// sequence to `next`, once the host can read them.
    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()>;

    /// [`Self::prefill_batch`] of one sequence: its next token.
    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        let mut next = [0];
        let position = self.position();
        self.prefill_batch(Batch::one(position..position + tokens.len()), tokens, &mut next)?;
        Ok(next[0])
    }

    /// Runs the encoder over the `input` of one sequence alone, where there is one, and `tokens` behind what its cache holds. The other sequences
    /// stay as they are, so that sequences may have prompts of different lengths; decode steps run all of them on. Returns its next token.
    fn prefill_one(&mut self, sequence: usize, input: Option<EncoderInput>, tokens: &[u32]) -> Result<u32> {
        call::check_sequence(sequence, 1)?;
        input.map_or(Ok(()), |input| self.encode(input))?;
        self.prefill(tokens)
    }

    /// `n` further greedy steps after a prefill or an earlier decode; each feeds the tokens before it. `on_tokens` is called
    /// once a step with a token for each sequence, as soon as the host can read them. End-of-sequence tokens are not special.
    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()>;

    /// [`Self::decode_batch`] of one sequence.
    fn decode(&mut self, n: usize, on_token: &mut dyn FnMut(u32)) -> Result<()> {
        self.decode_batch(n, &mut |tokens| tokens.iter().for_each(|token| on_token(*token)))
    }

    /// Runs `tokens` of the only sequence in one call as [`Self::prefill`] does and hands out the logits of every row in turn, fp32 `[vocab]`: what
    /// the model expected after each token. The caller's memory stays free of `[rows, vocab]`.
    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()>;

    /// Logits from which the last tokens were chosen, fp32 `[sequences, vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;

    /// Waits until the device has done all that was asked.
    fn synchronize(&mut self) -> Result<()>;

    /// Nanoseconds of each decode step since the last prefill by the device's own clock, for comparison with the host's; empty
    /// where the device has none.
    fn device_step_ns(&mut self) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// The device's memory pool; `None` on the CPU, whose memory the process accounts for.
    fn pool(&self) -> Option<&dyn memory::MemoryPool> {
        None
    }

    fn footprint(&self) -> Footprint;

    /// Zero for formats without outlier columns.
    fn outlier_columns(&mut self) -> Result<OutlierColumns>;

    /// Decode steps at `position` beside what their arithmetic and their memory take alone. All else of the session stays as it is but
    /// what the cache holds from `position` on. `None` where an engine cannot separate the two.
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
    /// The name in records and on the command line.
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

    /// Returns whether it has anything to run at this precision.
    pub fn runs(self, precision: FormatId) -> bool {
        self == Engine::Quantbench || precision == candle::PRECISION
    }
}

/// Input of an encoder: that of each sequence, one behind the other and equally long.
#[derive(Debug, Clone, Copy)]
pub enum EncoderInput<'a> {
    Tokens(&'a [u32]),
    /// Normalised pixels, `[3, size, size]`.
    Pixels(&'a [f32]),
}

impl EncoderInput<'_> {
    /// Tokens or pixels of each of `sequences` sequences.
    ///
    /// # Errors
    /// If they are not equally many.
    pub fn of_each(&self, sequences: usize) -> Result<usize> {
        let (len, what) = match self {
            EncoderInput::Tokens(tokens) => (tokens.len(), "tokens"),
            EncoderInput::Pixels(pixels) => (pixels.len(), "pixel values"),
        };
        if sequences == 0 || !len.is_multiple_of(sequences) {
            anyhow::bail!("{len} {what} are no equal parts of {sequences} sequences");
        }
        Ok(len / sequences)
    }
}

/// Exact bytes that a session holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Footprint {
    /// Weights in their stored formats: codes and statistics, no padding.
    pub weights_bytes: u64,
    /// Weights as they lie in memory, padding and repacking included.
    pub weights_resident_bytes: u64,
    pub kv_cache_bytes: u64,
    /// Activations and scratch.
    pub scratch_bytes: u64,
    /// Bytes of weights that one decode step of all sequences reads.
    pub weight_bytes_per_token: u64,
    /// Bytes of keys and values for one position of one sequence, in caches that every step reads whole.
    pub kv_bytes_per_position: u64,
    /// The same in caches of which a step reads a window alone, by window.
    #[serde(default)]
    pub windowed_kv: Vec<WindowedKv>,
    /// Bytes of the encoder's keys and values of one sequence that every decode step reads, whatever its position.
    pub cross_kv_bytes: u64,
}

/// Caches with one sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WindowedKv {
    /// The most positions that a step reads.
    pub window: u64,
    /// Bytes of keys and values for one position.
    pub bytes_per_position: u64,
}

impl WindowedKv {
    /// Bytes that `steps` steps read, the first of which sees `before + 1` positions.
    fn bytes_of_steps(self, before: u64, steps: u64) -> u64 {
        let growing = self.window.saturating_sub(before).min(steps);
        let positions = growing * before + growing * (growing + 1) / 2 + (steps - growing) * self.window;
        self.bytes_per_position * positions
    }
}

impl Footprint {
    /// The bytes of keys and values that a step of `model` reads, where its encoder holds `encoded` rows; all else is 0.
    fn of_caches(model: &Model, format: KvFormat, encoded: usize) -> Self {
        let decoder = || model.cache_specs(format).filter(|cache| cache.scope == CacheScope::Decoder);
        let bytes = |window: Option<usize>| {
            let caches = decoder().filter(|cache| cache.window == window);
            caches.map(|cache| cache.bytes_per_position() as u64).sum()
        };
        let windows: BTreeSet<usize> = decoder().filter_map(|cache| cache.window).collect();
        let windowed = |window: usize| WindowedKv { window: window as u64, bytes_per_position: bytes(Some(window)) };
        Self {
            kv_bytes_per_position: bytes(None),
            windowed_kv: windows.into_iter().map(windowed).collect(),
            cross_kv_bytes: (model.cross_bytes_per_position(format) * encoded) as u64,
            ..Self::default()
        }
    }

    /// Mean bytes of keys and values of one sequence that the decode steps of `n_gen` tokens read, behind `before` tokens: the first token is the
    /// prompt's, and step `i` sees `i` further positions.
    pub fn kv_bytes_per_step(&self, before: u64, n_gen: u64) -> u64 {
        let whole = self.kv_bytes_per_position * (2 * before + n_gen) / 2;
        let steps = n_gen.saturating_sub(1).max(1);
        let windowed: u64 = self.windowed_kv.iter().map(|caches| caches.bytes_of_steps(before, steps)).sum();
        whole + windowed / steps + self.cross_kv_bytes
    }

    /// Bytes of keys and values for one position in caches that hold every position, whatever their window.
    fn kv_bytes_per_held_position(&self) -> u64 {
        self.kv_bytes_per_position + self.windowed_kv.iter().map(|caches| caches.bytes_per_position).sum::<u64>()
    }
}

/// The model, the weights and the limits of a session.
pub struct Setup<'a> {
    pub model: &'a Model,
    pub source: &'a dyn Source,
    /// The precision, and what it holds each role in.
    pub formats: &'a Formats,
    pub device: Device,
    /// Workers of the CPU engine, at least 1.
    pub threads: usize,
    /// Sequences that a call runs at once.
    pub sequences: usize,
    /// The format of keys and values: [`Device::kv_format`] where nothing else is asked.
    pub kv_format: KvFormat,
    /// Tokens of each sequence that the decoder's key/value cache must hold: depth + prompt + generated.
    pub capacity: usize,
    /// Tokens or patches of each sequence that the encoder must hold; 0 without one.
    pub encoder_capacity: usize,
    /// A decode step on CUDA is replayed as one graph; its kernels are launched one by one otherwise.
    pub cuda_graph: bool,
}

/// A device that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Device {
    Cpu,
    Cuda(usize),
}

impl Device {
    /// Its spelling in messages between processes: `cpu`, `cuda:0`.
    pub fn name(self) -> String {
        match self {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
        }
    }

    /// The device of this [`Self::name`].
    pub fn named(name: &str) -> Option<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Some(Device::Cpu),
            Some(("cuda", ordinal)) => ordinal.parse().ok().map(Device::Cuda),
            _ => None,
        }
    }

    /// The format in which our own engines hold keys and values.
    pub fn kv_format(self) -> KvFormat {
        match self {
            Device::Cpu => KvFormat::Fp32,
            Device::Cuda(_) => KvFormat::Fp16,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A step reads no more of a windowed cache than the window, whatever the depth.
    #[test]
    fn bytes_of_a_step_are_the_mean_over_the_run() {
        let plain = Footprint { kv_bytes_per_position: 10, cross_kv_bytes: 7, ..Footprint::default() };
        assert_eq!(plain.kv_bytes_per_step(100, 5), 10 * (100 + 101 + 102 + 103 + 104) / 5 + 5 + 7);
        let of_window = |window: u64, bytes_per_position: u64| WindowedKv { window, bytes_per_position };
        let windowed = Footprint { windowed_kv: vec![of_window(102, 12)], ..Footprint::default() };
        // Steps behind 100 tokens see 101, 102, then 102 twice more.
        assert_eq!(windowed.kv_bytes_per_step(100, 5), 12 * (101 + 3 * 102) / 4);
        assert_eq!(windowed.kv_bytes_per_step(5000, 64), 12 * 102);
        assert_eq!(windowed.kv_bytes_per_step(10, 5), 12 * (11 + 12 + 13 + 14) / 4);
        let both = Footprint { kv_bytes_per_position: 10, ..windowed };
        assert_eq!(both.kv_bytes_per_step(5000, 64), 10 * 5032 + 12 * 102);
        // gemma-3-1b: 22 layers of 26 have a window of 512; one key/value head of 256.
        let shape = crate::weights::builtin::by_name("gemma-3-1b").expect("a built-in shape");
        let gemma = crate::models::build(&shape.config()).unwrap();
        let position = 2 * 256 * 4;
        let bytes = Footprint::of_caches(&gemma, KvFormat::Fp32, 0).kv_bytes_per_step(8192, 64);
        assert_eq!(bytes, position * (4 * (8192 + 32) + 22 * 512));
        // Layers of two windows, each by its own.
        let mixed = Footprint { windowed_kv: vec![of_window(8, 3), of_window(102, 12)], ..Footprint::default() };
        assert_eq!(mixed.kv_bytes_per_step(100, 5), (3 * 4 * 8 + 12 * (101 + 3 * 102)) / 4);
        assert_eq!(mixed.kv_bytes_per_held_position(), 15);
    }
}
