//! Lowers a model before anything of it is loaded, to refuse by name what the device cannot run.

use anyhow::{Result, bail};

use super::prefill;
use super::step::{StepMemory, StepProgram, fused};
use super::{Addresses, BiasAt, CacheAt, CallInput, CallKind, CallShape, SessionAt, padded_head};
use crate::call::Batch;
use crate::kernels::cuda::arena::Layout;
use crate::kernels::cuda::launch::MemoryPlanner;
use crate::kernels::cuda::matvec::MatrixDesc;
use crate::kernels::cuda::step_kernel::DeviceProperties;
use crate::plan::{BiasId, CacheId, MatrixId, Model, RopeId, VectorId};
use crate::quant::dense;

/// Lowers a decode step, a prompt and an encoder call of one row each.
///
/// # Errors
/// If one of them holds an operation that the device has no code for.
pub fn check(model: &Model, properties: DeviceProperties) -> Result<()> {
    let on = Nowhere { model, properties };
    let fused = fused(&on)?;
    // No two buffers overlap, and none is at 0.
    let mut next = 0;
    let memory = StepMemory::of(&on, &fused).map(|_| {
        next += BUFFER_BYTES;
        next
    });
    StepProgram::new(&on, &fused, &memory)?;
    // A mixture's prompt is steps.
    let prompt = model.experts().is_none().then_some(CallKind::Prompt);
    let kinds = model.encoder.iter().map(|_| CallKind::Encoder).chain(prompt);
    for kind in kinds {
        let shape = CallShape { kind, first: 0, batch: Batch::step(0), encoded: 1 };
        let input = CallInput::Tokens(vec![0; 2]);
        Layout::of(|arena| {
            let region = arena.take::<u8>(input.bytes())?;
            prefill::run(&on, shape, &MemoryPlanner, arena, region).map(|_| ())
        })?;
    }
    Ok(())
}

/// Refuses batches that no call computes.
///
/// # Errors
/// If the model is a mixture of experts: which of them a token goes through is known to a step of one sequence alone.
pub fn check_sequences(model: &Model, sequences: usize) -> Result<()> {
    if sequences > 1 && model.experts().is_some() {
        let executor = super::CALLS.executor;
        bail!("{executor} cannot run a batch of {sequences} sequences of a mixture of experts; it runs 1");
    }
    Ok(())
}

/// A model without memory: all its matrices are fp16, and every address is the same.
struct Nowhere<'a> {
    model: &'a Model,
    properties: DeviceProperties,
}

/// More than any buffer of a step has.
const BUFFER_BYTES: u64 = 1 << 40;
/// Any aligned address.
const ADDRESS: u64 = 1 << 20;
const CAPACITY: usize = 1;

impl Addresses for Nowhere<'_> {
    fn model(&self) -> &Model {
        self.model
    }

    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn matrix(&self, id: MatrixId) -> MatrixDesc {
        let spec = &self.model.matrices[id.0];
        dense::cuda::desc((spec.n, spec.k), size_of::<half::f16>(), ADDRESS)
    }

    fn vector(&self, _: VectorId) -> u64 {
        ADDRESS
    }

    fn cache(&self, id: CacheId) -> CacheAt {
        let d_pad = padded_head(self.model.caches[id.0].head_dim);
        CacheAt { keys: ADDRESS, values: ADDRESS, capacity: CAPACITY, d_pad }
    }

    fn step_angles(&self, _: RopeId) -> u64 {
        ADDRESS
    }

    fn call_angles(&self, _: RopeId) -> u64 {
        ADDRESS
    }

    fn bias(&self, _: BiasId) -> BiasAt {
        BiasAt { address: ADDRESS, reach: CAPACITY }
    }

    fn session(&self) -> SessionAt {
        let features = super::features_width(self.model).map_or(0, |_| ADDRESS);
        let (state, logits, zeros, outlier_columns, host) = (ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS);
        let (places, tokens) = (ADDRESS, ADDRESS);
        // The heads of a batch are lowered too.
        SessionAt { state, logits, zeros, features, outlier_columns, host, host_slots: 1, sequences: 2, places, tokens }
    }
}
