//! The GPUs that the driver reports. No context is made on any of them.

use crate::error::BadInput;
use crate::kernels::cuda::attributes::{self, Attributes};
use crate::kernels::cuda::libraries::{LIBRARIES, Place};
use crate::kernels::cuda::probe;
use crate::report::doctor::{CudaLibrary, GpuDevice};

/// Fails with why the device cannot be used.
pub fn check(ordinal: usize) -> Result<(), BadInput> {
    probe(ordinal).map(|_| ()).map_err(unclear)
}

fn unclear(error: anyhow::Error) -> BadInput {
    match error.downcast::<BadInput>() {
        Ok(problem) => problem,
        Err(other) => BadInput::new(format!("{other:#}")),
    }
}

/// Every device that can be used. Fails with why the first one cannot.
pub fn devices() -> Result<Vec<GpuDevice>, BadInput> {
    let first = device(0).map_err(unclear)?;
    let others = (1..attributes::count()).filter_map(|ordinal| device(ordinal).ok());
    Ok(std::iter::once(first).chain(others).collect())
}

/// The CUDA libraries, and where each was found.
pub fn libraries() -> Vec<CudaLibrary> {
    let found_in = |place: Place| place.name().to_owned();
    let library = LIBRARIES.into_iter();
    library.map(|one| CudaLibrary { file: one.file().to_owned(), found_in: one.place().map(found_in) }).collect()
}

fn device(ordinal: usize) -> anyhow::Result<GpuDevice> {
    let facts = probe(ordinal)?;
    let Attributes { sm_clock_khz, memory_clock_khz, bus_bits, pool, shared } = attributes::of(ordinal);
    let mhz = |khz: Option<i32>| khz.filter(|&khz| khz > 0).map(|khz| f64::from(khz) / 1e3);
    Ok(GpuDevice {
        name: facts.name,
        compute_capability: format!("{}.{}", facts.compute_capability.0, facts.compute_capability.1),
        cuda: facts.cuda,
        total_bytes: facts.total_bytes,
        sm_clock_mhz: mhz(sm_clock_khz),
        memory_clock_mhz: mhz(memory_clock_khz),
        bus_bits: bus_bits.and_then(|bits| u32::try_from(bits).ok()),
        pool,
        shared,
    })
}
