//! The step kernel: constants that instruction.cuh and pipeline.cuh share with the planner, what a format's kernel needs, and the device
//! properties that a launch depends on.

use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{CudaDevice, Result};

use super::attributes;
use super::launch::Fatbin;
use super::memory::driver_error;

/// Bytes of a row that a warp takes at once: rows are padded to whole chunks.
pub const CHUNK_BYTES: usize = 128;
pub(super) const TILE_ROWS: usize = 8;
/// As in instruction.cuh.
const THREADS: usize = 512;
const LANES: usize = 32;
pub(super) const WARPS: usize = THREADS / LANES;
const PRODUCER_WARPS: usize = 4;
/// As in producer_pipeline.cuh.
const MAX_STAGES: usize = 5;
/// Shared memory of a block on Hopper, and the part of it that is left for static variables.
const HOPPER_SHARED_BYTES: usize = 227 << 10;
pub const HOPPER_STATIC_BYTES: usize = 8 << 10;
/// What a kernel with `HAS_EXPERTS` has beside it: the scores of experts, and those that were chosen.
pub const EXPERTS_STATIC_BYTES: usize = 5 << 10;

/// The builds of a format's kernels, as `build.rs` makes them of one source.
pub struct StepFatbins {
    pub plain: Fatbin,
    /// With clock stamps, as [`super::trace`] reads them.
    pub traced: Fatbin,
    /// With `HAS_FEATURES` of instruction.cuh.
    pub featured: Fatbin,
    /// With `HAS_EXPERTS` too.
    pub experts: Fatbin,
}

/// The builds of the source `$stem.cu`.
#[macro_export]
macro_rules! step_fatbins {
    ($stem:literal) => {
        $crate::kernels::cuda::step_kernel::StepFatbins {
            plain: $crate::fatbin!($stem),
            traced: $crate::fatbin!($stem, "_traced"),
            featured: $crate::fatbin!($stem, "_featured"),
            experts: $crate::fatbin!($stem, "_experts"),
        }
    };
}

/// What a program needs of its kernel beyond the plain build. Each build can do what those before it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum StepFeatures {
    Plain,
    Featured,
    Experts,
}

impl StepFeatures {
    pub(super) fn fatbin(self, of: &StepFatbins) -> &Fatbin {
        match self {
            Self::Plain => &of.plain,
            Self::Featured => &of.featured,
            Self::Experts => &of.experts,
        }
    }

    /// Bytes of static shared memory beside [`HOPPER_STATIC_BYTES`].
    pub(super) fn static_bytes(self) -> usize {
        if self == Self::Experts { EXPERTS_STATIC_BYTES } else { 0 }
    }
}

/// A kernel that runs programs. Each reads fp16 and fp32 matrices, and those of one format.
pub struct StepKernel {
    pub fatbins: &'static StepFatbins,
    pub name: &'static str,
    /// Whether tables of its format share the memory with the pipelines.
    pub has_tables: bool,
    /// Words that a lane copies for a step beside the weights: `SideData::WORDS`.
    pub side_data_words: usize,
    /// Bytes of a row's partial result.
    pub partial_bytes: usize,
    /// Size of a converted element of x, in eighths of a byte.
    pub converted_eighths: usize,
}

/// The decoder that reads a matvec's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDecoder {
    Half,
    Float,
    /// The decoder of the kernel's format.
    Format,
}

/// Properties of a device that a launch depends on.
#[derive(Debug, Clone, Copy)]
pub struct DeviceProperties {
    pub multiprocessors: usize,
    /// Bytes that memory gives in a microsecond; 0 where the driver does not report it.
    pub bytes_per_us: usize,
    /// Major and minor.
    pub compute_capability: (i32, i32),
}

impl DeviceProperties {
    pub fn of(device: &CudaDevice) -> Result<Self> {
        use sys::CUdevice_attribute_enum as attribute;
        let stream = device.cuda_stream();
        let ask = |attribute| stream.context().attribute(attribute).map_err(driver_error);
        Ok(Self {
            multiprocessors: usize::try_from(ask(attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?).unwrap_or(1),
            bytes_per_us: attributes::of(stream.context().ordinal()).bytes_per_us().unwrap_or(0),
            compute_capability: (
                ask(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                ask(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
        })
    }

    /// Whether producer warps copy the weights, as `PipelineFor` of step.cuh says.
    fn has_producer_warps(self, kernel: &StepKernel) -> bool {
        self.compute_capability.0 == 9 && kernel.side_data_words == 0
    }

    pub(super) fn threads(self, kernel: &StepKernel) -> usize {
        THREADS + if self.has_producer_warps(kernel) { PRODUCER_WARPS * LANES } else { 0 }
    }

    /// Stages of a warp's pipeline and the bytes of each, as in pipeline.cuh, beside `data_bytes` of an instruction. Chips newer than 9.x run
    /// the code of 8.9.
    pub(super) fn pipeline(self, kernel: &StepKernel, data_bytes: usize) -> (usize, usize) {
        // `STAGES`, `STAGES_BESIDE_TABLES` and `STEPS_PER_STAGE`.
        let (alone, beside_tables, steps) = match self.compute_capability {
            (9, _) => (3, 3, 2),
            (8, 0) => (6, 4, 1),
            (7, _) => (1, 1, 1),
            _ => (3, 2, 1),
        };
        let rows_bytes = steps * TILE_ROWS * CHUNK_BYTES + CHUNK_BYTES / 2;
        let stage_bytes = rows_bytes + steps * size_of::<u32>() * LANES * kernel.side_data_words;
        let stages = if self.has_producer_warps(kernel) {
            let free = (HOPPER_SHARED_BYTES - HOPPER_STATIC_BYTES).saturating_sub(data_bytes);
            (free / (WARPS * stage_bytes)).clamp(2, MAX_STAGES)
        } else if kernel.has_tables {
            beside_tables
        } else {
            alone
        };
        (stages, stage_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_CODE: Fatbin = Fatbin { name: "none", image: &[] };
    static NO_BUILDS: StepFatbins =
        StepFatbins { plain: NO_CODE, traced: NO_CODE, featured: NO_CODE, experts: NO_CODE };

    fn kernel(has_tables: bool, side_data_words: usize) -> StepKernel {
        StepKernel {
            fatbins: &NO_BUILDS,
            name: "none",
            has_tables,
            side_data_words,
            partial_bytes: 4,
            converted_eighths: 0,
        }
    }

    #[test]
    fn pipelines_take_the_shared_memory_that_an_instruction_leaves() {
        let on = |compute_capability| DeviceProperties { multiprocessors: 132, bytes_per_us: 0, compute_capability };
        let (half, nf4) = (&kernel(false, 0), &kernel(true, 1));
        let stages = |data_bytes| on((9, 0)).pipeline(half, data_bytes).0;
        assert_eq!([stages(0), stages(50_000), stages(100_000), stages(140_000), stages(400_000)], [5, 5, 3, 2, 2]);
        for data_bytes in (0..150_000).step_by(16) {
            let (stages, bytes) = on((9, 0)).pipeline(half, data_bytes);
            assert!(
                WARPS * stages * bytes + data_bytes <= HOPPER_SHARED_BYTES - HOPPER_STATIC_BYTES,
                "beside {data_bytes} bytes"
            );
        }
        assert_eq!([on((9, 0)).threads(half), on((9, 0)).threads(nf4), on((8, 9)).threads(half)], [640, 512, 512]);
        assert_eq!(
            [on((9, 0)).pipeline(nf4, 0).0, on((8, 0)).pipeline(half, 0).0, on((12, 0)).pipeline(half, 0).0],
            [3, 6, 3]
        );
    }
}
