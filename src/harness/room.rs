//! Memory that variants need and that is free, and so whether their workers load together or one after the other.

use anyhow::Result;

use super::case::{Case, Variant};
use super::load::LoadReport;
use super::measured::{FinishReport, Sample, WarmupReport};
use super::prompt::TokenizedWorkload;
use super::schedule::{RunOrder, WorkerHandle};
use crate::engine::needs::{self, Holding, Lengths, Needs};
use crate::engine::{Device, Engine};
use crate::error::OutOfMemory;
use crate::events::Listener;
use crate::kernels::nvml::Gpu;
use crate::os::memory::ProcessMemory;
use crate::plan::Model;
use crate::protocol::Failure;
use crate::weights::policy::Formats;

/// Host memory of a worker beside its session: code, stacks, tables.
const WORKER_BYTES: u64 = 64 << 20;

/// Memory that loading may use beyond the final size, for one worker at a time.
const LOADING_BYTES: u64 = 256 << 20;

/// Host memory of another engine before it loads: an interpreter with torch holds as much.
const OTHER_ENGINE_BYTES: u64 = 768 << 20;

/// Memory of a device that the variants of a case need, and memory that is free there.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryBudget {
    pub device: Device,
    /// Needs of each variant.
    pub needs: Vec<Needs>,
    /// `None` where unknown.
    pub free_bytes: Option<u64>,
}

impl MemoryBudget {
    /// Needs and free memory now.
    pub fn new(case: &Case, (model, workload): (&Model, &TokenizedWorkload), device: Device) -> Result<Self> {
        let of_variant = |variant: &Variant| needs(case, variant, (model, workload), device);
        let needs = case.variants().iter().map(of_variant).collect::<Result<_>>()?;
        let free_bytes = match device {
            Device::Cuda(_) => free_bytes(device),
            // The limit of a process is not one for all workers together.
            Device::Cpu => ProcessMemory::default().available_bytes(),
        };
        Ok(Self { device, needs, free_bytes })
    }

    /// In turn where the workers do not fit together into what is free.
    pub fn order(&self) -> RunOrder {
        let fits = self.free_bytes.is_none_or(|free| self.together_bytes() <= free);
        if self.needs.len() > 1 && !fits { RunOrder::InTurn } else { RunOrder::Interleaved }
    }

    /// Bytes of all workers at once, while the last of them loads.
    pub fn together_bytes(&self) -> u64 {
        let own_bytes = match self.device {
            // A context is part of the needs.
            Device::Cuda(_) => 0,
            Device::Cpu => WORKER_BYTES,
        };
        let workers = self.needs.iter().map(|needs| needs.bytes().saturating_add(own_bytes));
        workers.fold(LOADING_BYTES, u64::saturating_add)
    }
}

/// Memory that the worker of a variant will hold.
pub fn needs(
    case: &Case,
    variant: &Variant,
    (model, workload): (&Model, &TokenizedWorkload),
    device: Device,
) -> Result<Needs> {
    Ok(needs_of(case, variant, model, &lengths(workload), device))
}

/// The same for other lengths.
pub fn needs_of(case: &Case, variant: &Variant, model: &Model, lengths: &Lengths, device: Device) -> Needs {
    let formats = Formats::new(variant.format(), case.format_options);
    // Of another engine only this much is known: it reads the 16-bit weights and holds a cache.
    let engine = variant.own_engine().unwrap_or(Engine::Quantbench);
    let holding = Holding { engine, formats: &formats, device };
    let needs = needs::needs(model, holding, lengths);
    let beside = if variant.own_engine().is_none() && device == Device::Cpu { OTHER_ENGINE_BYTES } else { 0 };
    Needs { context_bytes: needs.context_bytes + beside, ..needs }
}

/// Free bytes of the memory that a worker's weights and cache are in. Asks the driver without a context, which would take some of it.
pub fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(ordinal) => Gpu::open(ordinal)?.free_bytes(),
        Device::Cpu => ProcessMemory::default().room_bytes(),
    }
}

pub fn lengths(workload: &TokenizedWorkload) -> Lengths {
    let task = &workload.task;
    Lengths {
        sequences: task.sequences,
        depth: task.n_depth(),
        prompt: task.n_before() - task.n_depth(),
        gen_tokens: task.n_gen,
        encoder: workload.n_encoder,
    }
}

/// A worker that is never started: it refuses every request.
pub struct NeverStarted {
    pub label: String,
    pub failure: Failure,
}

impl NeverStarted {
    /// It needs more than is free.
    pub fn too_large(label: String, wanted_bytes: u64, free_bytes: u64) -> Self {
        let message = OutOfMemory { wanted_bytes, free_bytes }.to_string();
        Self { label, failure: Failure::OutOfMemory { message, wanted_bytes, free_bytes } }
    }

    fn refuse<T>(&self) -> Result<T, Failure> {
        Err(self.failure.clone())
    }
}

impl WorkerHandle for NeverStarted {
    fn label(&self) -> &str {
        &self.label
    }

    fn load(&mut self, _events: &dyn Listener) -> Result<LoadReport, Failure> {
        self.refuse()
    }

    fn warm_up(&mut self, _events: &dyn Listener) -> Result<WarmupReport, Failure> {
        self.refuse()
    }

    fn repeat(&mut self, _events: &dyn Listener) -> Result<Sample, Failure> {
        self.refuse()
    }

    fn finish(&mut self, _events: &dyn Listener) -> Result<FinishReport, Failure> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn check(device: Device, weights: &[u64], free_bytes: Option<u64>, order: RunOrder) {
        let context_bytes = if device == Device::Cpu { 0 } else { needs::CONTEXT_BYTES };
        let needs = weights.iter().map(|&weights_bytes| Needs { weights_bytes, context_bytes, ..Needs::default() });
        let room = MemoryBudget { device, needs: needs.collect(), free_bytes };
        assert_eq!(room.order(), order, "{room:?}");
    }

    #[test]
    fn workers_load_together_only_where_they_fit_together() {
        use RunOrder::{InTurn, Interleaved};
        for device in [Device::Cpu, Device::Cuda(0)] {
            check(device, &[2 * GIB, GIB], Some(100 * GIB), Interleaved);
            check(device, &[2 * GIB, GIB], Some(3 * GIB), InTurn);
            check(device, &[200 * GIB], Some(GIB), Interleaved);
            check(device, &[2 * GIB, GIB], None, Interleaved);
            check(device, &[u64::MAX, GIB], Some(3 * GIB), InTurn);
        }
        // A card with 4.8 GiB free: int8 of 2.87 GiB and nf4 of 1.75 GiB would fit without their contexts.
        let sizes = [2_870 * GIB / 1000, 1_750 * GIB / 1000];
        check(Device::Cuda(0), &sizes, Some(4_800 * GIB / 1000), InTurn);
        check(Device::Cpu, &sizes, Some(5_200 * GIB / 1000), Interleaved);
    }

    #[test]
    fn what_is_too_large_is_refused_with_both_sizes() {
        let worker = NeverStarted::too_large("fp16".to_owned(), 3 * GIB, GIB);
        let message = "out of memory: wanted 3.00 GiB, 1.00 GiB free".to_owned();
        let expected = Failure::OutOfMemory { message, wanted_bytes: 3 * GIB, free_bytes: GIB };
        assert_eq!(worker.refuse::<()>(), Err(expected));
    }
}
