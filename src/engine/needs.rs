//! The memory that a session will hold, from its model and lengths alone: no weights are read and no device is asked. Whoever
//! must know whether a model fits asks here.

use super::{Device, Engine, candle};
use crate::call::KvFormat;
use crate::lower::prompt::{self, CPU_CALLS, CUDA_CALLS};
use crate::plan::{
    BufferId, CacheScope, CacheSpec, LinearPart, LinearSpec, Model, NormSpec, Op, Plan, Rope, RopeByLength, Rows,
};
use crate::quant::FormatId;
use crate::weights::policy::Formats;

/// Bytes that a process takes of a GPU beside its own allocations: the driver's context, the kernels and cuBLAS. An H200 with driver 580
/// takes 0.5 to 0.6 GiB.
pub const CONTEXT_BYTES: u64 = 640 << 20;

/// Bytes that a session holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Weights in their stored formats.
    pub weights_bytes: u64,
    /// Keys and values in the format that the engine holds them in.
    pub kv_cache_bytes: u64,
    /// Activations, attention scores and tables of the longest call.
    pub scratch_bytes: u64,
    /// Memory of a GPU for the process itself.
    pub context_bytes: u64,
}

impl Needs {
    /// The bytes that the session allocates.
    pub fn session_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.kv_cache_bytes).saturating_add(self.scratch_bytes)
    }

    /// The bytes that the device must have free.
    pub fn bytes(&self) -> u64 {
        self.session_bytes().saturating_add(self.context_bytes)
    }
}

/// Sequences of a workload, and the tokens and rows of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// At least one.
    pub sequences: usize,
    /// Filled into the cache by one call before the prompt's.
    pub depth: usize,
    pub prompt: usize,
    pub gen_tokens: usize,
    /// Rows of the encoder; 0 without one.
    pub encoder: usize,
}

impl Lengths {
    fn capacity(&self) -> usize {
        self.depth.saturating_add(self.prompt).saturating_add(self.gen_tokens)
    }

    /// The calls of many rows that the decoder gets: their rows, and the positions that their last row sees. Our engines cut them.
    fn calls(&self) -> [(usize, usize); 2] {
        [(self.depth, self.depth), (self.prompt, self.depth.saturating_add(self.prompt))]
    }
}

/// The engine, the formats and the device that hold a model.
#[derive(Clone, Copy)]
pub struct Holding<'a> {
    pub engine: Engine,
    pub formats: &'a Formats,
    pub device: Device,
}

impl Holding<'_> {
    /// The format of keys and values; candle has them as it has its activations.
    fn kv_format(&self, model: &Model) -> KvFormat {
        match self.engine {
            Engine::Candle => candle::kv_format(model.architecture),
            Engine::Quantbench => self.device.kv_format(),
        }
    }
}

/// The bytes that a session of `model` will hold.
pub fn needs(model: &Model, holding: Holding, lengths: &Lengths) -> Needs {
    let is_cuda = matches!(holding.device, Device::Cuda(_));
    Needs {
        weights_bytes: weights_bytes(model, holding),
        kv_cache_bytes: cache_bytes(model, holding, lengths),
        scratch_bytes: match (holding.engine, holding.device) {
            (Engine::Candle, _) => candle_scratch_bytes(model, lengths, holding.kv_format(model).bytes()),
            (Engine::Quantbench, Device::Cpu) => cpu_scratch_bytes(model, lengths, holding.formats.precision()),
            (Engine::Quantbench, Device::Cuda(_)) => cuda_scratch_bytes(model, lengths, holding.formats),
        },
        context_bytes: if is_cuda { CONTEXT_BYTES } else { 0 },
    }
}

/// Bytes of all weights at a precision, as stored; vectors count as fp16.
pub fn stored_bytes(model: &Model, formats: &Formats) -> u64 {
    let matrices = model.matrices.iter().map(|spec| formats.stored_bytes(spec));
    matrices.sum::<u64>() + model.vector_bytes() as u64
}

fn weights_bytes(model: &Model, holding: Holding) -> u64 {
    match holding.engine {
        Engine::Quantbench => stored_bytes(model, holding.formats),
        Engine::Candle => model.parameters() as u64 * candle::dtype(model.architecture).size_in_bytes() as u64,
    }
}

/// Keys and values of both sides. On a GPU a head's lie in whole words of 16 bytes; on a CPU a cache holds no more than its window.
fn cache_bytes(model: &Model, holding: Holding, lengths: &Lengths) -> u64 {
    let head_granule = if matches!(holding.device, Device::Cuda(_)) { 8 } else { 1 };
    let is_ring = (holding.engine, holding.device) == (Engine::Quantbench, Device::Cpu);
    let of_cache = |cache: CacheSpec| {
        let all = if cache.scope == CacheScope::Decoder { lengths.capacity() } else { lengths.encoder };
        let capacity = cache.window.filter(|_| is_ring).map_or(all, |window| window.min(all));
        let head_dim = cache.head_dim.next_multiple_of(head_granule);
        product(&[2, lengths.sequences, cache.kv_heads, head_dim, capacity, cache.format.bytes()])
    };
    model.cache_specs(holding.kv_format(model)).map(of_cache).fold(0, u64::saturating_add)
}

/// Regions of fp32 as the engine lays them out: each side's for its longest call.
fn cpu_scratch_bytes(model: &Model, lengths: &Lengths, precision: FormatId) -> u64 {
    let (longest, sequences) =
        (lengths.calls().map(|(rows, _)| rows).into_iter().max().unwrap_or(0), lengths.sequences);
    // A call has the same rows of each sequence, and a decode step one.
    let rows = longest.min((cpu_rows_of_call(model) / sequences).max(1)).saturating_mul(sequences);
    let bytes = |plan: &Plan, rows: usize| {
        let codes = if precision.finds_outliers { code_bytes(plan, rows) } else { 0 };
        slot_bytes(plan, rows, sequences).saturating_add(codes)
    };
    let encoded = lengths.encoder.saturating_mul(sequences);
    let encoder = model.encoder.as_ref().map_or(0, |encoder| bytes(&encoder.plan, encoded));
    bytes(&model.decoder, rows).saturating_add(encoder).saturating_add(mixture_bytes(model, rows))
}

/// Rows of a call of the decoder on a CPU at most: longer prompts are cut, and at the same places at every precision.
pub fn cpu_rows_of_call(model: &Model) -> usize {
    let plan = &model.decoder;
    prompt::rows_of_call(model, CPU_CALLS, |rows| {
        slot_bytes(plan, rows, 1).saturating_add(code_bytes(plan, rows)).saturating_add(mixture_bytes(model, rows))
    })
}

/// Activations of the widest product as LLM.int8 reads them: fp32 through fp16, and codes.
fn code_bytes(plan: &Plan, rows: usize) -> u64 {
    let widest = plan.buffers.iter().filter(|buffer| buffer.rows == Rows::Tokens).map(|buffer| buffer.width).max();
    product(&[size_of::<f32>() + size_of::<i8>(), widest.unwrap_or(0), rows])
}

/// Bytes that the CPU engine holds of a mixture of experts in a call of `rows` rows; all layers use the same memory.
fn mixture_bytes(model: &Model, rows: usize) -> u64 {
    let of_op = |op: &Op| {
        let Op::Experts(spec) = op else { return 0 };
        let Some(down) = spec.experts.first().map(|expert| &model.matrices[expert.down.weight.0]) else { return 0 };
        // Of each choice what the expert reads, gate, up and their product, and of each row the product of a down and what is
        // brought together.
        let choices = product(&[size_of::<f32>(), rows, spec.top_k, 3 * down.k + down.n]);
        choices.saturating_add(product(&[size_of::<f32>(), 2, rows, down.n]))
    };
    model.decoder.ops.iter().map(of_op).max().unwrap_or(0)
}

/// Buffers of a call of `rows` rows of `sequences` sequences in fp32, those that never live at once in one place.
fn slot_bytes(plan: &Plan, rows: usize, sequences: usize) -> u64 {
    let slots = plan.storage().slots;
    let of_slot = |slot: &crate::plan::Slot| {
        product(&[size_of::<f32>(), slot.width, if slot.rows == Rows::Tokens { rows } else { sequences }])
    };
    slots.iter().map(of_slot).fold(0, u64::saturating_add)
}

/// candle's models hold the scores of all heads, twice, and copy the caches as they grow.
fn candle_scratch_bytes(model: &Model, lengths: &Lengths, element_bytes: usize) -> u64 {
    let scores = |plan: &Plan, (rows, seen): (usize, usize)| {
        let heads = attention_heads(model, plan).max().unwrap_or(0);
        product(&[2, element_bytes, heads, rows, seen])
    };
    let decoder =
        lengths.calls().map(|call| scores(&model.decoder, call).saturating_add(slot_bytes(&model.decoder, call.0, 1)));
    let encoder = model.encoder.as_ref().map(|encoder| {
        scores(&encoder.plan, (lengths.encoder, lengths.encoder)).saturating_add(slot_bytes(
            &encoder.plan,
            lengths.encoder,
            1,
        ))
    });
    decoder.into_iter().chain(encoder).max().unwrap_or(0)
}

/// Rows of a call of the decoder on a GPU at most: longer prompts are cut.
pub fn cuda_rows_of_call(model: &Model, formats: &Formats) -> usize {
    prompt::rows_of_call(model, CUDA_CALLS, |rows| CudaCall { model, plan: &model.decoder, rows, formats }.bytes())
}

/// The memory of the longest call, which is one for all calls, and the tables that last.
fn cuda_scratch_bytes(model: &Model, lengths: &Lengths, formats: &Formats) -> u64 {
    let bytes = |plan: &Plan, rows: usize| CudaCall { model, plan, rows, formats }.bytes();
    let most = cuda_rows_of_call(model, formats);
    let of_all = |rows: usize| rows.saturating_mul(lengths.sequences);
    let decoder = lengths.calls().map(|(rows, _)| bytes(&model.decoder, of_all(rows).min(most)));
    let encoder = model.encoder.as_ref().map(|encoder| bytes(&encoder.plan, of_all(lengths.encoder)));
    let longest = decoder.into_iter().chain(encoder).max().unwrap_or(0);
    let reach = lengths.capacity().max(lengths.encoder);
    // Steps and calls have tables of their own where frequencies change with each position.
    let tables = |rope: &Rope| if matches!(rope.by_length, Some(RopeByLength::DynamicNtk { .. })) { 2 } else { 1 };
    let angles = |rope| product(&[size_of::<f32>(), tables(rope), rope.rotary_dim, lengths.capacity()]);
    let angles = model.ropes.iter().map(angles);
    let biases = model.biases.iter().map(|bias| product(&[size_of::<f32>(), model.matrices[bias.table.0].k, 2, reach]));
    let logits = product(&[size_of::<f32>(), lengths.sequences, model.vocab]);
    angles.chain(biases).chain([logits]).fold(longest, u64::saturating_add)
}

/// Query heads of each attention of a plan.
fn attention_heads<'a>(model: &'a Model, plan: &'a Plan) -> impl Iterator<Item = usize> + 'a {
    plan.ops.iter().filter_map(|op| {
        let Op::Attention(attention) = op else { return None };
        Some(plan.buffers[attention.q.0].width / model.caches[attention.cache.0].head_dim)
    })
}

/// A call of many rows on a GPU: buffers from the operation that writes them to the last that reads them, and what operations take
/// beside them.
struct CudaCall<'a> {
    model: &'a Model,
    plan: &'a Plan,
    rows: usize,
    formats: &'a Formats,
}

impl CudaCall<'_> {
    /// The most that is held at once.
    fn bytes(&self) -> u64 {
        if self.rows == 0 {
            return 0;
        }
        // The head is a launch of its own for one row.
        let n_ops = self.plan.head().map_or(self.plan.ops.len(), |head| head.body_len);
        let (lives, widths) = (self.plan.lifetimes(), self.bytes_a_row());
        let of_op = |(index, op): (usize, &Op)| {
            let lives = lives.iter().zip(&widths).filter(|(life, _)| (life.first..=life.last).contains(&index));
            let held = lives.map(|(_, width)| product(&[*width, self.rows])).fold(0, u64::saturating_add);
            held.saturating_add(self.beside(op))
        };
        self.plan.ops[..n_ops].iter().enumerate().map(of_op).max().unwrap_or(0)
    }

    /// Bytes a row of each buffer: fp32 where a residual lives, fp16 elsewhere.
    fn bytes_a_row(&self) -> Vec<usize> {
        let mut element_bytes = vec![size_of::<half::f16>(); self.plan.buffers.len()];
        for op in &self.plan.ops {
            let residuals = match op {
                Op::Embed(spec) => vec![spec.out],
                Op::AddRows(spec) => vec![spec.x],
                Op::Norm(spec) => vec![spec.x],
                Op::Add(spec) => vec![spec.a, spec.out],
                Op::Patches(_) | Op::Features(_) | Op::Linear(_) | Op::Append(_) | Op::Attention(_) => Vec::new(),
                Op::Activation(_) | Op::Experts(_) | Op::LastRow(_) | Op::Argmax(_) => Vec::new(),
            };
            residuals.into_iter().for_each(|buffer| element_bytes[buffer.0] = size_of::<f32>());
        }
        self.plan.buffers.iter().zip(element_bytes).map(|(buffer, bytes)| buffer.width * bytes).collect()
    }

    /// Bytes that an operation takes while it runs.
    fn beside(&self, op: &Op) -> u64 {
        let halves = |width: usize| product(&[size_of::<half::f16>(), self.rows, width]);
        match op {
            // A residual is cast for its matrices.
            Op::Linear(spec) if self.is_residual(spec.x) => {
                halves(self.plan.buffers[spec.x.0].width).saturating_add(self.beside_product(spec))
            }
            Op::Linear(spec) => self.beside_product(spec),
            // A product becomes fp32.
            Op::Norm(NormSpec { x, .. }) if !self.is_residual(*x) => halves(self.plan.buffers[x.0].width),
            Op::Embed(_) | Op::Patches(_) | Op::AddRows(_) | Op::Features(_) | Op::Norm(_) | Op::Append(_) => 0,
            Op::Attention(_) | Op::Activation(_) | Op::Experts(_) | Op::Add(_) => 0,
            Op::LastRow(_) | Op::Argmax(_) => 0,
        }
    }

    fn beside_product(&self, spec: &LinearSpec) -> u64 {
        let of_part = |part: &LinearPart| {
            let matrix = &self.model.matrices[part.weight.0];
            // Products of a matrix that is cut are made together.
            let whole = if part.rows.is_some() { product(&[size_of::<half::f16>(), self.rows, matrix.n]) } else { 0 };
            whole.saturating_add((self.formats.of(matrix).id().prefill_bytes)(self.rows, (matrix.n, matrix.k)))
        };
        spec.parts.iter().map(of_part).max().unwrap_or(0)
    }

    fn is_residual(&self, buffer: BufferId) -> bool {
        self.plan.ops.iter().any(|op| matches!(op, Op::Add(spec) if spec.a == buffer))
    }
}

/// The product in 64 bits, at most `u64::MAX`.
fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1u64, |product, factor| product.saturating_mul(*factor as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{FormatOptions, fp16, int8, nf4};
    use crate::weights::builtin_models;

    fn model(name: &str) -> Model {
        let shape = builtin_models().iter().find(|shape| shape.name == name).expect("a built-in shape");
        crate::models::build(&shape.config()).unwrap()
    }

    fn of(name: &str, precision: FormatId, device: Device, lengths: Lengths) -> Needs {
        let formats = Formats::new(precision, FormatOptions::default());
        needs(&model(name), Holding { engine: Engine::Quantbench, formats: &formats, device }, &lengths)
    }

    /// A window of 128 of 1024 positions is an eighth of them on a CPU.
    #[test]
    fn a_window_bounds_the_cache() {
        let lengths = Lengths { sequences: 1, depth: 1000, prompt: 8, gen_tokens: 16, encoder: 0 };
        let formats = Formats::new(fp16::ID, FormatOptions::default());
        let mut windowed = model("llama-3.2-1b");
        let bytes = |model: &Model, device| {
            cache_bytes(model, Holding { engine: Engine::Quantbench, formats: &formats, device }, &lengths)
        };
        let whole = [Device::Cpu, Device::Cuda(0)].map(|device| bytes(&windowed, device));
        windowed.caches.iter_mut().for_each(|cache| cache.window = Some(128));
        assert_eq!([Device::Cpu, Device::Cuda(0)].map(|device| bytes(&windowed, device)), [whole[0] / 8, whole[1]]);
    }

    /// llama-3.2-1b has 16 layers of 8 key/value heads of 64: 2 · 16 · 8 · 64 values a position.
    #[test]
    fn a_cache_counts_at_the_dtype_that_it_has() {
        let lengths = Lengths { sequences: 1, depth: 1000, prompt: 8, gen_tokens: 16, encoder: 0 };
        let values = 2 * 16 * 8 * 64 * 1024;
        assert_eq!(of("llama-3.2-1b", fp16::ID, Device::Cpu, lengths).kv_cache_bytes, 4 * values);
        assert_eq!(of("llama-3.2-1b", fp16::ID, Device::Cuda(0), lengths).kv_cache_bytes, 2 * values);
        // Heads of 20 values lie in 24 on a GPU.
        let mut odd = model("llama-3.2-1b");
        odd.caches.iter_mut().for_each(|cache| cache.head_dim = 20);
        let formats = Formats::new(fp16::ID, FormatOptions::default());
        let cuda = Holding { engine: Engine::Quantbench, formats: &formats, device: Device::Cuda(0) };
        assert_eq!(cache_bytes(&odd, cuda, &lengths), 2 * 16 * 8 * 24 * 1024 * 2);
    }

    /// A cache that is filled with 120000 rows is filled in calls of 4096, or as many as hold no more than 448 MiB.
    #[test]
    fn a_long_prompt_holds_what_a_call_of_it_does() {
        let lengths = |depth: usize| Lengths { sequences: 1, depth, prompt: 8, gen_tokens: 64, encoder: 0 };
        let scratch = |name: &str, precision: FormatId, depth: usize| {
            of(name, precision, Device::Cuda(0), lengths(depth)).scratch_bytes
        };
        let angles = |positions: u64| 4 * 64 * positions;
        for precision in [fp16::ID, int8::ID, nf4::ID] {
            for name in ["llama-3.2-1b", "phi-2"] {
                let (long, longer) = (scratch(name, precision, 40_000), scratch(name, precision, 120_000));
                assert!(longer - long <= angles(80_000), "{name} {precision}: {long} {longer}");
                assert!(longer < CUDA_CALLS.bytes + angles(120_072) + (4 << 20), "{name} {precision}: {longer}");
            }
        }
        // One row of each residual (fp32) and the widest pair of activations (fp16).
        let activations = 4096 * (4 * 2048 + 2 * 2 * 8192) as u64;
        let fp16 = scratch("llama-3.2-1b", fp16::ID, 120_000);
        assert!((activations..2 * activations + angles(120_072)).contains(&fp16), "{fp16}");
        let needs = of("llama-3.2-1b", fp16::ID, Device::Cuda(0), lengths(120_000));
        // fp16 keys and values of 16 layers, 8 heads of 64.
        assert_eq!(needs.kv_cache_bytes, 2 * 2 * 16 * 8 * 64 * 120_072);
        assert!(scratch("llama-3.2-1b", fp16::ID, 0) < 64 << 20);
    }

    /// The widest product of llama-3.2-1b is [8192, 2048]: int8 makes 8192 sums and 2048 codes a row and may gather all columns in fp16, nf4 the whole matrix in fp16 for
    /// more than 32 rows. Its products of two parts are of one matrix at a time.
    #[test]
    fn what_a_product_takes_beside_its_operands_is_counted() {
        let lengths = Lengths { sequences: 1, depth: 0, prompt: 256, gen_tokens: 64, encoder: 0 };
        let scratch = |precision| of("llama-3.2-1b", precision, Device::Cuda(0), lengths).scratch_bytes;
        let plain = scratch(fp16::ID);
        assert_eq!(scratch(int8::ID) - plain, 256 * (4 * 8192 + 2048) + 2 * 2048 * (256 + 8192));
        assert_eq!(scratch(nf4::ID) - plain, 2 * 8192 * 2048);
    }

    #[test]
    fn every_precision_of_every_shape_has_needs() {
        let lengths = Lengths { sequences: 1, depth: 0, prompt: 128, gen_tokens: 64, encoder: 256 };
        for shape in builtin_models() {
            for entry in crate::quant::FORMATS {
                for device in [Device::Cpu, Device::Cuda(0)] {
                    let needs = of(shape.name, *entry, device, lengths);
                    assert!(
                        needs.weights_bytes > 0 && needs.kv_cache_bytes > 0 && needs.scratch_bytes > 0,
                        "{needs:?}"
                    );
                    assert_eq!(needs.context_bytes > 0, device != Device::Cpu, "{} {}", shape.name, entry.name);
                }
            }
        }
    }

    #[test]
    fn lengths_beyond_any_memory_are_no_overflow() {
        let lengths =
            Lengths { sequences: 1, depth: usize::MAX / 2, prompt: usize::MAX / 2, gen_tokens: 9, encoder: 0 };
        assert_eq!(of("phi-2", nf4::ID, Device::Cuda(0), lengths).bytes(), u64::MAX);
    }
}
