//! Plans as a CUDA device runs them: a decode step as the program of one launch ([`step`]), and calls of many rows as one
//! launch after the other ([`prefill`]).

mod call;
mod check;
pub mod prefill;
mod range;
pub mod step;
mod tables;

pub use call::{CallInput, CallKind, CallResult, CallShape};
pub use check::{check, check_sequences};
pub use range::scales;
pub use tables::{by_distance, call_angles, length_class, padded, padded_floats, step_angles};

use candle_core::{Result, bail};

use crate::call::{ANY, KvFormat, Supported};
use crate::kernels::cuda::launch::dimension;
use crate::kernels::cuda::matvec::{self, Epilogue, MatrixDesc, Mode, Product};
use crate::kernels::cuda::program::{self, PlannedLaunch, ProgramBuilder};
use crate::kernels::cuda::step_kernel::DeviceProperties;
use crate::plan::{ActivationKind, BiasId, CacheId, EmbedSpec, LmHead, MatrixId, Model, Op, RopeId, Softcap, VectorId};

/// The calls that the device runs.
pub const CALLS: Supported =
    Supported { executor: "the CUDA engine", kv_formats: &[KvFormat::Fp16], most_sequences: ANY };

/// A loaded model in memory that kernels reach: on a device, or in tests on the host.
pub trait Addresses {
    fn model(&self) -> &Model;

    fn properties(&self) -> DeviceProperties;

    fn matrix(&self, id: MatrixId) -> MatrixDesc;

    /// fp32, as [`padded`] has it.
    fn vector(&self, id: VectorId) -> u64;

    fn cache(&self, id: CacheId) -> CacheAt;

    /// Laid out by [`step_angles`].
    fn step_angles(&self, id: RopeId) -> u64;

    /// Laid out by [`call_angles`], up to the last row of the call.
    fn call_angles(&self, id: RopeId) -> u64;

    fn bias(&self, id: BiasId) -> BiasAt;

    fn session(&self) -> SessionAt;
}

/// Keys and values, fp16 `[sequences, g, capacity, d_pad]` each.
#[derive(Debug, Clone, Copy)]
pub struct CacheAt {
    pub keys: u64,
    pub values: u64,
    pub capacity: usize,
    /// Elements of a head, with zeros up to whole 16-byte words.
    pub d_pad: usize,
}

/// A relative bias, as [`by_distance`] lays it out.
#[derive(Debug, Clone, Copy)]
pub struct BiasAt {
    pub address: u64,
    pub reach: usize,
}

/// Memory of a session beside weights and caches.
#[derive(Debug, Clone, Copy)]
pub struct SessionAt {
    /// Four int32: token, position, step, rows of the encoder.
    pub state: u64,
    /// fp32 `[sequences, vocab]`
    pub logits: u64,
    /// fp32 zeros, as many as the widest norm has: the bias of those that have none.
    pub zeros: u64,
    /// Features of pictures, fp16 `[sequences, patches, width]`; 0 where the model reads none.
    pub features: u64,
    /// A count of 64 bits: outlier columns that were found.
    pub outlier_columns: u64,
    /// Words of 64 bits that the host reads tokens from, `[host_slots, sequences]`.
    pub host: u64,
    pub host_slots: usize,
    /// A session of several runs steps as calls of many rows; one of a single sequence runs the step's program.
    pub sequences: usize,
    /// Of a batch: [`crate::kernels::cuda::place::DevicePlace`] of each sequence, and its last token in int32.
    pub places: u64,
    pub tokens: u64,
}

/// Offsets of the position and of the encoder's rows in the state.
const POSITION_BYTES: u64 = 4;
const ENCODED_BYTES: u64 = 12;

/// Elements of a head in the cache: whole words of 16 bytes.
pub fn padded_head(d: usize) -> usize {
    d.next_multiple_of(8)
}

/// `enum Activation` of instruction.cuh.
fn activation_number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Silu => 1,
        ActivationKind::GeluTanh => 2,
        ActivationKind::Relu => 3,
    }
}

/// The width of a picture's features, where the model reads a picture.
pub fn features_width(model: &Model) -> Option<usize> {
    let plan = &model.encoder.as_ref()?.plan;
    if let Op::Features(spec) = plan.ops.last()? { Some(plan.buffers[spec.x.0].width) } else { None }
}

/// The head's matrix times one row of fp16 activations at `x`. The token goes to `token`, if one is wanted; `counters` are those that
/// launches share.
///
/// # Errors
/// If the matrix is too large for a kernel.
pub fn head(
    on: &dyn Addresses,
    head: LmHead,
    x: u64,
    out: u64,
    epilogue: Epilogue,
    token: program::TokenOutput,
    counters: u64,
) -> Result<PlannedLaunch> {
    let bias = head.bias.map_or(0, |bias| on.vector(bias));
    let activation = if head.softcap.is_some() { matvec::ACT_CAP } else { 0 };
    let epilogue = Epilogue { softcap: head.softcap.map_or(0.0, |Softcap(cap)| cap), ..epilogue };
    let product = Product { matrix: on.matrix(head.weight), first_row: 0, bias, out, activation };
    let input = matvec::InputDesc { x, scale: head.scale, ..matvec::InputDesc::default() };
    let mut planned = ProgramBuilder::single(on.properties(), Mode::Apart, vec![input], &[product], epilogue)?;
    planned.program.token_output = token;
    planned.program.counters = counters;
    Ok(planned)
}

/// The destination of a token and of its embedding; the token stands `advance` positions further on.
/// `best` and `embedding` are the step's.
fn token_output(on: &dyn Addresses, best: u64, embedding: u64, advance: usize) -> Result<program::TokenOutput> {
    // A token that was generated stands for itself, never for a part of a picture.
    let Some(EmbedSpec { table, scale, image: _, out: _ }) = on.model().decoder.embedding() else {
        bail!("a decoder without an embedding")
    };
    let (table, session) = (on.matrix(table), on.session());
    Ok(program::TokenOutput {
        best,
        state: session.state,
        host: session.host,
        table: table.weight,
        embedding,
        table_scale: scale,
        table_stride: dimension(table.stride_bytes / size_of::<half::f16>())?,
        hidden: dimension(table.k)?,
        host_slots: dimension(session.host_slots)?,
        advance: dimension(advance)?,
    })
}
