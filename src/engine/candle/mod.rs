//! candle-transformers' own models behind [`Session`]: a second oracle, and what a Rust user would otherwise have.
//!
//! The models are candle's, unchanged; configs come from the plan and tensors from the same sources that our own engine
//! reads. Where candle computes something else than transformers does, `family` and `feed` say what is done about it.
//! Keys and values are appended by copying and cross-attention's are computed anew in every step: that is candle's way,
//! and part of what is measured.

mod causal;
mod config;
mod family;
mod feed;

use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;

use self::config::Config;
use self::family::CandleFamily;
use self::feed::CandleFeed;
use super::{EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup};
use crate::call::{Batch, KvFormat, Supported};
use crate::error::{BadInput, OutOfMemory};
use crate::events::{Event, Listener};
use crate::plan::Model;
use crate::quant::{self, FormatId};

/// The version of candle-transformers; a test compares it with Cargo.lock.
pub const VERSION: &str = "0.11.1";

/// The only precision that has a candle row: what candle holds besides are GGUF's formats.
pub const PRECISION: FormatId = quant::BASELINE;

/// Checks that candle-transformers computes what `model` needs. `config` is its config.json.
pub fn check(model: &Model, config: &Value) -> Result<(), BadInput> {
    Config::new(model, config).map(|_| ())
}

/// Returns whether candle's file of this architecture runs in fp32 although fp16 is asked for: its Phi rotates by fp32 angles, which
/// candle refuses for activations of any other dtype.
pub fn runs_in_fp32(architecture: &str) -> bool {
    architecture == "phi"
}

/// The dtype that it runs in.
pub fn dtype(architecture: &str) -> DType {
    if runs_in_fp32(architecture) { DType::F32 } else { DType::F16 }
}

/// The format of its keys and values.
pub fn kv_format(architecture: &str) -> KvFormat {
    if runs_in_fp32(architecture) { KvFormat::Fp32 } else { KvFormat::Fp16 }
}

/// The calls that candle's models run in `dtype`, which is that of their caches too.
fn calls(dtype: DType) -> Supported {
    let kv_formats: &[KvFormat] = if dtype == DType::F32 { &[KvFormat::Fp32] } else { &[KvFormat::Fp16] };
    Supported { executor: "candle's engine", kv_formats, most_sequences: 1 }
}

/// Loads candle's model of `setup.model` in `dtype`. Fails with [`BadInput`] on what candle-transformers does not compute.
pub fn load(setup: &Setup, config: &Value, dtype: DType, events: &dyn Listener) -> Result<Loaded> {
    let start = Instant::now();
    calls(dtype).check(setup.sequences, setup.kv_format)?;
    let config = Config::new(setup.model, config)?;
    let device = match setup.device {
        super::Device::Cpu => Device::Cpu,
        super::Device::Cuda(ordinal) => {
            Device::new_cuda(ordinal).with_context(|| format!("opening CUDA device {ordinal}"))?
        }
    };
    let feed = CandleFeed::new(setup, config.rules(setup.model), events);
    let tally = feed.tally();
    let tensors = VarBuilder::from_backend(Box::new(feed), dtype, device.clone());
    let fresh = CandleFamily::new(&config, tensors).map_err(out_of_memory).context("loading candle's model")?;
    events.on(Event::End);
    let mut session = CandleSession {
        fresh,
        now: None,
        mark: None,
        history: Vec::new(),
        computed: 0,
        most: 0,
        encoded: None,
        next: None,
        logits: None,
        footprint: footprint(setup, dtype, tally.bytes()),
        dtype,
        device,
    };
    session.synchronize()?;
    Ok(Loaded {
        session: Box::new(session),
        load: start.elapsed(),
        quantize: std::time::Duration::ZERO,
        fp16_overflow: tally.overflow(),
        isa: "candle".to_owned(),
    })
}

/// Counts the bytes that a step must read as our own engine does, so that candle's share of the bandwidth compares with ours.
fn footprint(setup: &Setup, dtype: DType, weights_bytes: u64) -> Footprint {
    let element_bytes = dtype.size_in_bytes();
    let matrix_bytes: Vec<usize> = setup.model.matrices.iter().map(|spec| spec.n * spec.k * element_bytes).collect();
    Footprint {
        weights_bytes,
        weights_resident_bytes: weights_bytes,
        weight_bytes_per_token: setup.model.weight_bytes_per_token(&matrix_bytes) as u64,
        ..Footprint::of_caches(setup.model, setup.kv_format, setup.encoder_capacity)
    }
}

/// candle's caches can only grow or be emptied. Going back to where a prompt began takes the state that was kept there;
/// anywhere else, the tokens up to there are fed again.
struct CandleSession {
    /// With empty caches.
    fresh: CandleFamily,
    /// `None`: as `fresh`.
    now: Option<CandleFamily>,
    /// The state where the last prompt behind others began.
    mark: Option<(usize, CandleFamily)>,
    /// Every token up to the position.
    history: Vec<u32>,
    /// Tokens of the history that `now` holds.
    computed: usize,
    /// Most positions that the caches ever held.
    most: usize,
    encoded: Option<Tensor>,
    /// The token that was chosen last, `[1]`, on the device.
    next: Option<Tensor>,
    /// `[vocab]`
    logits: Option<Tensor>,
    footprint: Footprint,
    dtype: DType,
    device: Device,
}

impl CandleSession {
    /// One call over `tokens`, behind whatever a rewind left to be fed again.
    fn call(&mut self, tokens: &[u32]) -> Result<()> {
        while self.computed < self.history.len() {
            let token = self.history[self.computed];
            self.forward(&[token], &Tensor::new(&[token], &self.device)?)?;
        }
        self.forward(tokens, &Tensor::new(tokens, &self.device)?)?;
        self.history.extend_from_slice(tokens);
        Ok(())
    }

    /// `ids` are the `tokens` on the device, `[t]`.
    fn forward(&mut self, tokens: &[u32], ids: &Tensor) -> Result<()> {
        let family = self.now.get_or_insert_with(|| self.fresh.clone());
        family.check(tokens, self.computed)?;
        let logits = family.forward(&ids.unsqueeze(0)?, self.computed, self.encoded.as_ref()).map_err(out_of_memory)?;
        let logits = logits.flatten_all()?;
        self.next = Some(logits.argmax_keepdim(D::Minus1)?);
        self.logits = Some(logits);
        self.computed += tokens.len();
        self.most = self.most.max(self.computed);
        Ok(())
    }

    /// The chosen token on the host.
    fn token(&self) -> Result<u32> {
        let next = self.next.as_ref().context("no token was chosen yet")?;
        Ok(next.to_vec1::<u32>().map_err(out_of_memory)?[0])
    }
}

impl Session for CandleSession {
    fn position(&self) -> usize {
        self.history.len()
    }

    fn rewind(&mut self, position: usize) {
        self.history.truncate(position);
        if position >= self.computed {
            return;
        }
        match self.mark.as_ref().filter(|(at, _)| *at <= position) {
            Some((at, family)) => (self.now, self.computed) = (Some(family.clone()), *at),
            None => (self.now, self.computed) = (None, 0),
        }
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        let family = self.now.get_or_insert_with(|| self.fresh.clone());
        self.encoded = Some(family.encode(input, self.dtype, &self.device).map_err(out_of_memory)?);
        Ok(())
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        if tokens.is_empty() {
            bail!("a call needs at least one token");
        }
        calls(self.dtype).check_batch(batch, tokens.len(), (1, self.position()))?;
        let is_marked = self.mark.as_ref().is_some_and(|(at, _)| *at == self.computed);
        if self.computed > 0 && self.computed == self.history.len() && !is_marked {
            self.mark = self.now.clone().map(|family| (self.computed, family));
        }
        self.call(tokens)?;
        next.fill(self.token()?);
        Ok(())
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        for _ in 0..n {
            let ids = self.next.clone().context("decode needs a prefill before it")?;
            let token = self.token()?;
            self.forward(&[token], &ids)?;
            self.history.push(token);
            on_tokens(&[self.token()?]);
        }
        Ok(())
    }

    /// candle's models hand out the last row alone, so that the rows are computed one by one.
    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        for (row, token) in tokens.iter().enumerate() {
            self.call(&[*token])?;
            on_row(row, &self.logits()?);
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let logits = self.logits.as_ref().context("no logits before the first call")?;
        Ok(logits.to_dtype(DType::F32)?.to_vec1()?)
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    fn footprint(&self) -> Footprint {
        let kv_cache_bytes = self.footprint.kv_bytes_per_held_position() * self.most as u64;
        Footprint { kv_cache_bytes, ..self.footprint.clone() }
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        Ok(OutlierColumns::default())
    }
}

/// The driver's refusal of memory as the error that makes an `oom` record.
fn out_of_memory(error: candle_core::Error) -> anyhow::Error {
    match format!("{error:?}").contains("OUT_OF_MEMORY") {
        true => OutOfMemory { wanted_bytes: 0, free_bytes: 0 }.into(),
        false => error.into(),
    }
}
