//! The oracle: one operation at a time on candle tensors, on any device. It runs every operation of a plan.
//!
//! On the CPU everything is fp32 and a linear is its format's plain reference; on CUDA activations are fp16, sums and
//! norms fp32, and a linear is the format's device kernel. Speed is no aim here.

mod attention;
mod call;
mod experts;

use std::ops::Range;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, IndexOp, Tensor};

use self::call::{Sequence, SequenceCall};
use super::load::{LoadedTensors, stream};
use super::{EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup, recompute};
use crate::call::{ANY, Batch, KvFormat, Supported, check_scored, check_sequence};
use crate::events::Listener;
use crate::plan::{
    ActivationKind, ActivationSpec, AddRowsSpec, AddSpec, AppendSpec, ArgmaxSpec, BufferId, CacheScope, EmbedSpec,
    EncoderInputKind, FeaturesSpec, KeyValue, LastRowSpec, LinearPart, LinearSpec, MatrixId, MatrixRows, Model, Norm,
    NormKind, NormSpec, Op, PatchesSpec, Plan, Softcap, VectorId,
};
use crate::quant::Stored;
use crate::weights::spec::MatrixSpec;

/// A linear layer on candle tensors.
pub trait Linear: Send + Sync {
    /// `y = x · Wᵀ`: `x` is `[m, k]` in the session's compute dtype, `y` `[m, n]` in the same.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor>;

    /// Rows of the weight, `[tokens, k]` in its own dtype.
    fn rows(&self, tokens: &[u32]) -> candle_core::Result<Tensor>;

    fn stored_bytes(&self) -> usize;
}

/// The format's plain reference on the CPU.
struct Oracle(Box<dyn Stored>);

impl Linear for Oracle {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (m, _) = x.dims2()?;
        let (n, _) = self.0.shape();
        let y = self.0.multiply(&x.flatten_all()?.to_vec1::<f32>()?, m);
        Tensor::from_vec(y, (m, n), x.device())
    }

    fn rows(&self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        let (n, k) = self.0.shape();
        let table = Tensor::from_vec(self.0.dequantize(), (n, k), &Device::Cpu)?;
        table.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)
    }

    fn stored_bytes(&self) -> usize {
        self.0.parts().iter().map(|part| part.bytes.len()).sum()
    }
}

/// Runs a model's plan on candle tensors.
pub struct Reference {
    model: Model,
    device: Device,
    compute: DType,
    matrices: Vec<Box<dyn Linear>>,
    vectors: Vec<Tensor>,
    sequences: Vec<Sequence>,
    /// The input of [`PatchesSpec`]: `[rows, channels · patch²]`.
    patches: Option<Tensor>,
    /// `[sequences, vocab]`, of the last call.
    logits: Option<Tensor>,
    kv_format: KvFormat,
    calls: Supported,
}

/// The calls that the executor runs: its caches are in the compute dtype.
fn calls(format: KvFormat) -> Supported {
    let kv_formats: &'static [KvFormat] = match format {
        KvFormat::Fp32 => &[KvFormat::Fp32],
        KvFormat::Fp16 => &[KvFormat::Fp16],
        KvFormat::Bf16 | KvFormat::Fp8 => &[],
    };
    Supported { executor: EXECUTOR, kv_formats, most_sequences: ANY }
}

/// The name in errors.
const EXECUTOR: &str = "the reference executor";

/// Loads the oracle on the CPU.
pub fn load(setup: &Setup, events: &dyn Listener) -> Result<Loaded> {
    calls(KvFormat::Fp32).check(setup.sequences, setup.kv_format)?;
    let finish = |_: &MatrixSpec, stored: Box<dyn Stored>| Ok(Box::new(Oracle(stored)) as Box<dyn Linear>);
    let tensors = stream(setup, events, &finish)?;
    let loaded = Reference::loaded(setup, tensors, Device::Cpu, DType::F32, "candle".to_owned())?;
    Ok(recompute::wrapped(setup, loaded))
}

/// The largest magnitude that each buffer of the decoder holds behind a prefill of `tokens` on the CPU, by the buffer's name: what a format narrower
/// than fp32 must hold. Fails where loading does.
pub fn largest_values(setup: &Setup, tokens: &[u32]) -> Result<Vec<(String, f32)>> {
    let finish = |_: &MatrixSpec, stored: Box<dyn Stored>| Ok(Box::new(Oracle(stored)) as Box<dyn Linear>);
    let tensors = stream(setup, &crate::events::Silent, &finish)?;
    let mut reference = Reference::of(setup, tensors.matrices, tensors.vectors, Device::Cpu, DType::F32)?;
    let plan = setup.model.decoder.clone();
    let buffers = reference.run(&plan, &SequenceCall::of(0..1, tokens))?;
    let largest = |values: &Tensor| values.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let of_buffer = |(buffer, values): (&crate::plan::Buffer, &Option<Tensor>)| {
        let largest = values.as_ref().map(largest).transpose()?;
        Ok((buffer.name.clone(), largest.unwrap_or(0.0)))
    };
    plan.buffers.iter().zip(&buffers.0).map(of_buffer).collect()
}

impl Reference {
    /// A session from streamed linears.
    pub fn loaded(
        setup: &Setup,
        tensors: LoadedTensors<Box<dyn Linear>>,
        device: Device,
        compute: DType,
        isa: String,
    ) -> Result<Loaded> {
        let session = Self::of(setup, tensors.matrices, tensors.vectors, device, compute)?;
        Ok(Loaded {
            session: Box::new(session),
            load: tensors.elapsed,
            quantize: tensors.quantize,
            fp16_overflow: tensors.fp16_overflow,
            isa,
        })
    }

    fn of(
        setup: &Setup,
        matrices: Vec<Box<dyn Linear>>,
        vectors: Vec<Vec<f32>>,
        device: Device,
        compute: DType,
    ) -> Result<Self> {
        let vectors = vectors.into_iter().map(|v| Tensor::new(v, &device)).collect::<Result<_, _>>()?;
        Ok(Self {
            model: setup.model.clone(),
            device,
            compute,
            matrices,
            vectors,
            sequences: vec![
                Sequence {
                    caches: vec![None; setup.model.caches.len()],
                    position: 0,
                    encoded: 0,
                    features: None,
                    last_token: 0,
                };
                setup.sequences
            ],
            patches: None,
            logits: None,
            kv_format: setup.kv_format,
            calls: calls(setup.kv_format),
        })
    }

    /// Runs a call through `plan`.
    fn run(&mut self, plan: &Plan, call: &SequenceCall) -> Result<Buffers> {
        let mut buffers = Buffers(vec![None; plan.buffers.len()]);
        for op in &plan.ops {
            self.step(op, call, &mut buffers).with_context(|| format!("reference executor at {op:?}"))?;
        }
        Ok(buffers)
    }

    fn decoder_call(&mut self, call: &SequenceCall) -> Result<()> {
        let longest = self.sequences[call.sequences.clone()].iter().map(|sequence| sequence.position).max();
        let is_longest = |sequence: &Sequence| Some(sequence.position) == longest;
        if call.rows_each > 1 && !self.sequences[call.sequences.clone()].iter().all(is_longest) {
            let each = call.rows_each;
            bail!("{EXECUTOR} cannot run {each} tokens each behind sequences of different lengths in one call");
        }
        let plan = self.model.decoder.clone();
        self.run(&plan, call)?;
        for sequence in &mut self.sequences[call.sequences.clone()] {
            sequence.position += call.rows_each;
        }
        Ok(())
    }

    fn encode_of(&mut self, which: Range<usize>, input: EncoderInput) -> Result<()> {
        let Some(encoder) = self.model.encoder.clone() else { bail!("this model has no encoder") };
        let each = input.of_each(which.len())?;
        let (rows_each, tokens) = match (encoder.input, input) {
            (EncoderInputKind::Tokens, EncoderInput::Tokens(tokens)) => (each, tokens),
            (EncoderInputKind::Picture(picture), EncoderInput::Pixels(pixels)) => {
                let patches = pixels.chunks(each.max(1)).map(|pixels| picture.patch_rows(pixels));
                let patches = patches.collect::<candle_core::Result<Vec<_>>>()?.concat();
                let rows = which.len() * picture.patches();
                let width = patches.len() / rows;
                self.patches = Some(Tensor::from_vec(patches, (rows, width), &self.device)?);
                (picture.patches(), &[][..])
            }
            _ => bail!("this model's encoder reads another kind of input"),
        };
        self.sequences[which.clone()].iter_mut().for_each(|sequence| sequence.encoded = rows_each);
        self.run(&encoder.plan, &SequenceCall { sequences: which, rows_each, tokens })?;
        Ok(())
    }

    fn last_tokens(&self) -> Vec<u32> {
        self.sequences.iter().map(|sequence| sequence.last_token).collect()
    }

    fn step(&mut self, op: &Op, call: &SequenceCall, buffers: &mut Buffers) -> candle_core::Result<()> {
        match op {
            Op::Embed(spec) => {
                let EmbedSpec { table, scale, image, out } = *spec;
                buffers.set(out, self.embed(call, table, scale, image)?);
            }
            Op::Patches(PatchesSpec { out }) => {
                let patches = self.patches.as_ref().ok_or_else(|| missing("a picture"))?;
                buffers.set(*out, patches.to_dtype(self.compute)?);
            }
            Op::AddRows(AddRowsSpec { x, table }) => {
                let rows = buffers.get(*x)?;
                let ids: Vec<u32> = (0..rows.dim(0)?).map(|row| (row % call.rows_each) as u32).collect();
                let table = self.matrices[table.0].rows(&ids)?.to_dtype(self.compute)?;
                buffers.set(*x, (rows + table)?);
            }
            Op::Features(FeaturesSpec { x }) => {
                let features = buffers.get(*x)?;
                for (at, sequence) in call.sequences.clone().enumerate() {
                    let own = features.narrow(0, at * call.rows_each, call.rows_each)?;
                    self.sequences[sequence].features = Some(own);
                }
            }
            Op::Norm(NormSpec { norm, x, out }) => buffers.set(*out, self.norm(*norm, &buffers.get(*x)?)?),
            Op::Linear(LinearSpec { x, parts }) => {
                let x = buffers.get(*x)?.contiguous()?;
                for part in parts {
                    buffers.set(part.out, self.linear(part, &x)?);
                }
            }
            Op::Append(AppendSpec { kv: KeyValue { k, v }, cache }) => {
                let (k, v) = (buffers.get(*k)?, buffers.get(*v)?);
                for (at, sequence) in call.sequences.clone().enumerate() {
                    let own = |x: &Tensor| x.narrow(0, at * call.rows_each, call.rows_each);
                    self.append(sequence, *cache, &own(&k)?, &own(&v)?)?;
                }
            }
            Op::Attention(spec) => {
                let out = self.attention(spec, call, buffers)?;
                buffers.set(spec.out, out);
            }
            Op::Activation(ActivationSpec { kind, gate, up, out }) => {
                let y = activate(*kind, &buffers.get(*gate)?)?;
                let y = match up {
                    Some(up) => (y * buffers.get(*up)?)?,
                    None => y,
                };
                buffers.set(*out, y);
            }
            Op::Experts(spec) => {
                let out = self.experts(spec, &buffers.get(spec.x)?, &buffers.get(spec.scores)?)?;
                buffers.set(spec.out, out);
            }
            // An fp32 linear (T5's `wo`) makes the residual fp32 from there on, as in transformers.
            Op::Add(AddSpec { a, b, out }) => {
                let (a, b) = (buffers.get(*a)?, buffers.get(*b)?);
                let dtype = if a.dtype() == b.dtype() { a.dtype() } else { DType::F32 };
                buffers.set(*out, (a.to_dtype(dtype)? + b.to_dtype(dtype)?)?);
            }
            Op::LastRow(LastRowSpec { x, out, scale }) => {
                let x = buffers.get(*x)?;
                let last = |at: usize| x.narrow(0, (at + 1) * call.rows_each - 1, 1);
                let rows: Vec<Tensor> = (0..call.sequences.len()).map(last).collect::<candle_core::Result<_>>()?;
                buffers.set(*out, (Tensor::cat(&rows, 0)? * *scale as f64)?);
            }
            Op::Argmax(ArgmaxSpec { logits, softcap }) => {
                let logits = capped(buffers.get(*logits)?.to_dtype(DType::F32)?, *softcap)?;
                for (sequence, logits) in call.sequences.clone().zip(logits.to_vec2::<f32>()?) {
                    self.sequences[sequence].last_token = first_largest(&logits);
                }
                self.logits = Some(logits);
            }
        }
        Ok(())
    }

    /// `y = x · W[rows]ᵀ + bias`
    fn linear(&self, part: &LinearPart, x: &Tensor) -> candle_core::Result<Tensor> {
        let LinearPart { weight, rows, bias, out: _ } = *part;
        let y = self.matrices[weight.0].forward(x)?;
        let y = match rows {
            Some(MatrixRows { start, len }) => y.narrow(1, start, len)?,
            None => y,
        };
        self.biased(y, bias)
    }

    fn biased(&self, y: Tensor, bias: Option<VectorId>) -> candle_core::Result<Tensor> {
        match bias {
            Some(bias) => y.broadcast_add(&self.vectors[bias.0].to_dtype(self.compute)?),
            None => Ok(y),
        }
    }

    fn embed(
        &self,
        call: &SequenceCall,
        table: MatrixId,
        scale: f32,
        image: Option<u32>,
    ) -> candle_core::Result<Tensor> {
        let rows = (self.matrices[table.0].rows(call.tokens)?.to_dtype(self.compute)? * scale as f64)?;
        if !call.tokens.iter().any(|&token| Some(token) == image) {
            return Ok(rows);
        }
        let mut picked = Vec::new();
        for (at, tokens) in call.tokens.chunks(call.rows_each).enumerate() {
            let features = self.sequences[call.sequences.start + at].features.as_ref();
            let features = features.ok_or_else(|| missing("image features"))?;
            let mut next = 0;
            for (own, &token) in tokens.iter().enumerate() {
                picked.push(match Some(token) == image {
                    true => features.narrow(0, next, 1)?,
                    false => rows.narrow(0, at * call.rows_each + own, 1)?,
                });
                next += usize::from(Some(token) == image);
            }
        }
        Tensor::cat(&picked, 0)
    }

    /// Row by row in fp32, back in the compute dtype.
    fn norm(&self, Norm { kind, weight, epsilon }: Norm, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let centred = match kind {
            NormKind::Rms => x,
            NormKind::Layer { .. } => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed =
            centred.broadcast_div(&(variance + epsilon as f64)?.sqrt()?)?.broadcast_mul(&self.vectors[weight.0])?;
        let normed = match kind {
            NormKind::Rms => normed,
            NormKind::Layer { bias } => normed.broadcast_add(&self.vectors[bias.0])?,
        };
        normed.to_dtype(self.compute)
    }
}

/// The buffers of one call.
struct Buffers(Vec<Option<Tensor>>);

impl Buffers {
    fn get(&self, id: BufferId) -> candle_core::Result<Tensor> {
        self.0[id.0].clone().ok_or_else(|| missing("a buffer"))
    }

    fn set(&mut self, id: BufferId, value: Tensor) {
        self.0[id.0] = Some(value);
    }
}

fn missing(what: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{what} is read before it is written"))
}

fn activate(kind: ActivationKind, gate: &Tensor) -> candle_core::Result<Tensor> {
    match kind {
        ActivationKind::Silu => gate.silu(),
        ActivationKind::GeluTanh => gate.gelu(),
        ActivationKind::Relu => gate.relu(),
    }
}

/// `cap · tanh(x / cap)`, where there is a cap.
fn capped(x: Tensor, softcap: Option<Softcap>) -> candle_core::Result<Tensor> {
    match softcap {
        Some(Softcap(cap)) => (x / cap as f64)?.tanh()? * cap as f64,
        None => Ok(x),
    }
}

/// The lowest index among the largest values, as torch.argmax gives it on a CPU.
fn first_largest(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (1..logits.len()).fold(0, better) as u32
}

impl Session for Reference {
    fn position(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.position).max().unwrap_or(0)
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.position(), "cannot rewind from {} to {position}", self.position());
        for sequence in self.sequences.iter_mut().filter(|sequence| sequence.position > position) {
            let specs = self.model.caches.iter();
            for (_, cache) in specs.zip(&mut sequence.caches).filter(|(spec, _)| spec.scope == CacheScope::Decoder) {
                *cache = match cache.take() {
                    Some((k, v)) if position > 0 => match (k.i((.., ..position)), v.i((.., ..position))) {
                        (Ok(k), Ok(v)) => Some((k, v)),
                        _ => None,
                    },
                    _ => None,
                };
            }
            sequence.position = position;
        }
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        self.encode_of(0..self.sequences.len(), input)
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        if tokens.is_empty() {
            bail!("a prefill needs at least one token");
        }
        let n = self.sequences.len();
        self.calls.check_batch(batch, tokens.len(), (n, self.position()))?;
        self.decoder_call(&SequenceCall::of(0..n, tokens))?;
        next.copy_from_slice(&self.last_tokens());
        Ok(())
    }

    fn prefill_one(&mut self, sequence: usize, input: Option<EncoderInput>, tokens: &[u32]) -> Result<u32> {
        if tokens.is_empty() {
            bail!("a prefill needs at least one token");
        }
        let which = check_sequence(sequence, self.sequences.len())?;
        input.map_or(Ok(()), |input| self.encode_of(which.clone(), input))?;
        self.decoder_call(&SequenceCall::of(which, tokens))?;
        Ok(self.sequences[sequence].last_token)
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let plan = self.model.decoder.clone();
        let head = plan.head().context("this plan has no head")?;
        let body = Plan { ops: plan.ops[..head.body_len].to_vec(), buffers: plan.buffers.clone() };
        check_scored(self.sequences.len())?;
        let x = (self.run(&body, &SequenceCall::of(0..1, tokens))?.get(head.x)? * head.scale as f64)?;
        self.sequences[0].position += tokens.len();
        for row in 0..tokens.len() {
            let logits = self.matrices[head.weight.0].forward(&x.narrow(0, row, 1)?.contiguous()?)?;
            let logits = self.biased(logits, head.bias)?.to_dtype(DType::F32)?.flatten_all()?;
            on_row(row, &capped(logits, head.softcap)?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        for _ in 0..n {
            self.decoder_call(&SequenceCall::of(0..self.sequences.len(), &self.last_tokens()))?;
            on_tokens(&self.last_tokens());
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let logits = self.logits.as_ref().context("no token was run yet")?;
        Ok(logits.flatten_all()?.to_vec1::<f32>()?)
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    fn pool(&self) -> Option<&dyn super::memory::MemoryPool> {
        super::memory::of(&self.device)
    }

    fn footprint(&self) -> Footprint {
        let stored: Vec<usize> = self.matrices.iter().map(|m| m.stored_bytes()).collect();
        let caches = Footprint::of_caches(&self.model, self.kv_format, self.sequences[0].encoded);
        let positions: usize = self.sequences.iter().map(|sequence| sequence.position).sum();
        let weights_bytes = (stored.iter().sum::<usize>() + self.model.vector_bytes()) as u64;
        Footprint {
            weights_bytes,
            weights_resident_bytes: weights_bytes,
            kv_cache_bytes: caches.kv_bytes_per_held_position() * positions as u64,
            scratch_bytes: 0,
            weight_bytes_per_token: self.model.weight_bytes_per_step(&stored, self.sequences.len()) as u64,
            ..caches
        }
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        Ok(OutlierColumns::default())
    }
}
