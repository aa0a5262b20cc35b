//! Loading embedded kernels and launching them on candle's stream.

use std::borrow::Cow;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DeviceRepr, DriverError, result, sys};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Storage, Tensor, bail};
use half::f16;

use super::gemm::Gemm;
use super::memory::driver_error;

/// The kernels of one `.cu` for all chips, as `build.rs` compiled them.
pub struct Fatbin {
    /// File name of the source without its extension.
    pub name: &'static str,
    pub image: &'static [u8],
}

/// The kernels that `build.rs` made of the source `$stem.cu`, in the build `$build`.
#[macro_export]
macro_rules! fatbin {
    ($stem:literal) => {
        $crate::fatbin!($stem, "")
    };
    ($stem:literal, $build:literal) => {
        $crate::kernels::cuda::launch::Fatbin {
            name: concat!($stem, $build),
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $stem, $build, ".fatbin")),
        }
    };
}

/// A kernel of a loaded module. Modules are never unloaded: candle uses the device's primary context, which lives as long
/// as the process uses the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub name: &'static str,
    function: sys::CUfunction,
}

// SAFETY: a function handle is an opaque number of the driver, which may be used from every thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A module that is loaded on a device, and the kernels of it that were asked for.
struct Module {
    ordinal: usize,
    fatbin: &'static str,
    handle: sys::CUmodule,
    kernels: Vec<Kernel>,
}
// SAFETY: as for a kernel's handle.
unsafe impl Send for Module {}

static MODULES: Mutex<Vec<Module>> = Mutex::new(Vec::new());

impl Fatbin {
    /// The kernel `name`; the first call on a device loads the module there.
    pub fn kernel(&self, device: &CudaDevice, name: &'static str) -> Result<Kernel> {
        let explain = |error| driver_error(error).context(format!("loading kernel `{name}` of {}.cu", self.name));
        let ordinal = device.cuda_stream().context().ordinal();
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        let known = modules.iter().position(|module| module.ordinal == ordinal && module.fatbin == self.name);
        let at = match known {
            Some(at) => at,
            None => {
                modules.push(self.load(device, ordinal).map_err(explain)?);
                modules.len() - 1
            }
        };
        let module = &mut modules[at];
        if let Some(kernel) = module.kernels.iter().find(|kernel| kernel.name == name) {
            return Ok(*kernel);
        }
        let symbol = std::ffi::CString::new(name).map_err(Error::wrap)?;
        // SAFETY: the module is loaded and stays so.
        let function = unsafe { result::module::get_function(module.handle, symbol) }.map_err(explain)?;
        module.kernels.push(Kernel { name, function });
        Ok(Kernel { name, function })
    }

    fn load(&self, device: &CudaDevice, ordinal: usize) -> std::result::Result<Module, DriverError> {
        device.cuda_stream().context().bind_to_thread()?;
        // A copy, since the driver wants the image aligned, as allocations are.
        let image = self.image.to_vec();
        // SAFETY: a fatbin carries its own length, and the driver copies what it keeps.
        let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
        Ok(Module { ordinal, fatbin: self.name, handle, kernels: Vec::new() })
    }
}

impl Kernel {
    /// Lets blocks of this kernel have up to `bytes` of shared memory that is sized at launch, or what was allowed before if that
    /// is more, and asks for the largest share of on-chip memory: a multiprocessor that must divide it anew drains first.
    pub fn allow_shared(&self, bytes: usize) -> Result<()> {
        use sys::CUfunction_attribute as attribute;
        // The driver keeps the last limit that was set, and refuses every launch that needs more.
        static ALLOWED: Mutex<Vec<(Kernel, usize)>> = Mutex::new(Vec::new());
        let mut allowed = ALLOWED.lock().unwrap_or_else(PoisonError::into_inner);
        let known = allowed.iter_mut().find(|(kernel, _)| kernel == self);
        if known.as_ref().is_some_and(|(_, most)| *most >= bytes) {
            return Ok(());
        }
        let explain = |error| driver_error(error).context(format!("kernel `{}` with {bytes} bytes a block", self.name));
        let most = i32::try_from(bytes).unwrap_or(i32::MAX);
        let set = |attribute, value| {
            // SAFETY: the function is loaded and stays so.
            unsafe { result::function::set_function_attribute(self.function, attribute, value) }.map_err(explain)
        };
        set(attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)?;
        set(attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
        match known {
            Some((_, most)) => *most = bytes,
            None => allowed.push((*self, bytes)),
        }
        Ok(())
    }

    /// Blocks of `threads` threads and `shared_bytes` that fit on one multiprocessor.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared_bytes: usize) -> Result<usize> {
        let mut blocks = 0;
        // SAFETY: the function is loaded, and the call writes one int.
        unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, self.function, threads as i32, shared_bytes)
        }
        .result()
        .map_err(driver_error)?;
        Ok(usize::try_from(blocks).unwrap_or(0))
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: (usize, usize),
    pub threads: u32,
    pub shared_bytes: usize,
    /// All blocks are on the device at once, so that they may wait for each other; a launch that does not fit fails.
    pub cooperative: bool,
    /// The kernel may start while the launch before it ends, where the chip can do that: it waits before it reads what others write
    /// (`wait_for_launch_before` of device.cuh).
    pub overlaps: bool,
}

impl Grid {
    pub fn new(blocks: (usize, usize), threads: u32) -> Self {
        Self { blocks, threads, shared_bytes: 0, cooperative: false, overlaps: false }
    }

    /// The same for a kernel that waits for the launch before.
    pub fn overlapping(self) -> Self {
        Self { overlaps: true, ..self }
    }

    /// A thread for each of `count` elements.
    pub fn over(count: usize, threads: u32) -> Self {
        Self::new((count.div_ceil(threads as usize), 1), threads)
    }
}

/// Runs kernels: a device, or in tests a host that compiles the same sources.
pub trait Launcher {
    /// # Safety
    /// As [`launch`] says.
    unsafe fn launch(
        &self,
        fatbin: &'static Fatbin,
        kernel: &'static str,
        grid: Grid,
        parameters: &mut [*mut c_void],
    ) -> Result<()>;

    /// A product that no kernel of ours makes.
    ///
    /// # Safety
    /// The operands are matrices of these shapes where this runs, and stay so until its stream has come past this call.
    unsafe fn multiply(&self, gemm: &Gemm) -> Result<()>;
}

/// Launches nothing: for planning the memory of a call before there is any.
pub struct MemoryPlanner;

impl Launcher for MemoryPlanner {
    unsafe fn launch(&self, _: &'static Fatbin, _: &'static str, _: Grid, _: &mut [*mut c_void]) -> Result<()> {
        Ok(())
    }

    unsafe fn multiply(&self, _: &Gemm) -> Result<()> {
        Ok(())
    }
}

/// The addresses of kernel parameters, for [`launch`].
#[macro_export]
macro_rules! parameters {
    ($($value:expr),* $(,)?) => { &mut [$((&raw const $value).cast_mut().cast::<std::ffi::c_void>()),*] };
}

/// Launches on the device's stream. Work of size zero is the caller's to skip.
///
/// # Safety
/// `parameters` point to values that match the kernel's in number, order and type, and every pointer among them is valid for
/// what a grid of this size touches.
pub unsafe fn launch(device: &CudaDevice, kernel: Kernel, grid: Grid, parameters: &mut [*mut c_void]) -> Result<()> {
    let dimension = |blocks: usize, most: u32| match u32::try_from(blocks) {
        Ok(blocks) if (1..=most).contains(&blocks) => Ok(blocks),
        _ => bail!("kernel `{}`: a grid of {blocks} blocks, allowed are 1 to {most}", kernel.name),
    };
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(driver_error)?;
    use sys::{CUlaunchAttributeID as id, CUlaunchAttributeValue as value};
    let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let mut attributes = Vec::with_capacity(2);
    if grid.cooperative {
        attributes.push(attribute(id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, value { cooperative: 1 }));
    }
    if grid.overlaps && overlaps(stream.context().ordinal()) {
        let value = value { programmaticStreamSerializationAllowed: 1 };
        attributes.push(attribute(id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value));
    }
    let config = sys::CUlaunchConfig {
        gridDimX: dimension(grid.blocks.0, i32::MAX as u32)?,
        gridDimY: dimension(grid.blocks.1, MAX_GRID_Y)?,
        gridDimZ: 1,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: u32::try_from(grid.shared_bytes).unwrap_or(u32::MAX),
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // SAFETY: the caller's promise; the configuration and its attributes live through the call.
    unsafe { sys::cuLaunchKernelEx(&config, kernel.function, parameters.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
        .map_err(|error| driver_error(error).context(format!("launching kernel `{}`", kernel.name)))
}

/// Whether launches on device `ordinal` may overlap: on Hopper. Newer chips run the code of 8.9, which does not wait.
fn overlaps(ordinal: usize) -> bool {
    static KNOWN: Mutex<Vec<(usize, bool)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, overlaps)) = known.iter().find(|(known, _)| *known == ordinal) {
        return *overlaps;
    }
    let overlaps = super::probe(ordinal).is_ok_and(|properties| properties.compute_capability.0 == 9);
    known.push((ordinal, overlaps));
    overlaps
}

/// CUDA's limit for the second dimension of a grid.
pub const MAX_GRID_Y: u32 = 65535;

/// The address of `memory` on the device. All work is on one stream, so that the address stays good while the owner lives.
pub fn address<T, P: DevicePtr<T>>(memory: &P, device: &CudaDevice) -> u64 {
    memory.device_ptr(&device.cuda_stream()).0
}

/// Copies `values` to `to`, before all that is queued from now on. Memory that is not pinned is read before this returns.
///
/// # Safety
/// `to` has room for them on the device until its stream has come past the copy.
pub unsafe fn upload<T: DeviceRepr>(values: &[T], to: u64, device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(driver_error)?;
    // SAFETY: the caller's promise.
    unsafe { result::memcpy_htod_async(to, values, stream.cu_stream()) }.map_err(driver_error)
}

/// The fp16 `[m, k]` that `x` holds contiguously on a CUDA device, and m.
pub fn half_rows<'a>(x: &'a Storage, layout: &Layout, k: usize) -> Result<(CudaView<'a, f16>, usize)> {
    let Storage::Cuda(storage) = x else { bail!("activations must be on the CUDA device of the weights") };
    let (m, columns) = layout.shape().dims2()?;
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("activations [{m}, {columns}] are not contiguous")
    };
    if columns != k || m == 0 || i32::try_from(m).is_err() {
        bail!("activations are [{m}, {columns}], the weight takes [m, {k}] with 1 to {} rows", i32::MAX);
    }
    Ok((storage.as_cuda_slice::<f16>()?.slice(start..end), m))
}

/// `[rows, columns]` as a tensor.
pub fn tensor<T>(values: CudaSlice<T>, rows: usize, columns: usize, device: &CudaDevice) -> Result<Tensor>
where
    T: candle_core::cuda_backend::CudaDType + DeviceRepr,
{
    if values.len() != rows * columns {
        bail!("{} values cannot be a [{rows}, {columns}]", values.len());
    }
    let storage = CudaStorage::wrap_cuda_slice(values, device.clone());
    Ok(Tensor::from_storage(Storage::Cuda(storage), (rows, columns), BackpropOp::none(), false))
}

/// [`padded_rows`] on the device.
pub fn upload_rows(bytes: &[u8], row_bytes: usize, stride: usize, device: &CudaDevice) -> Result<CudaSlice<u8>> {
    device.clone_htod(&*padded_rows(bytes, row_bytes, stride))
}

/// Rows of `row_bytes`, each followed by zeros up to `stride` bytes.
pub fn padded_rows(bytes: &[u8], row_bytes: usize, stride: usize) -> Cow<'_, [u8]> {
    if row_bytes == stride {
        return Cow::Borrowed(bytes);
    }
    let mut rows = vec![0; bytes.len() / row_bytes * stride];
    let pairs = rows.chunks_exact_mut(stride).zip(bytes.chunks_exact(row_bytes));
    pairs.for_each(|(row, bytes)| row[..row_bytes].copy_from_slice(bytes));
    Cow::Owned(rows)
}

/// A dimension as kernels take it.
pub fn dimension(value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Msg(format!("a dimension of {value} exceeds {}", i32::MAX)))
}
