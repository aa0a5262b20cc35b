//! Products of many rows through cuBLAS: fp16 in with fp32 sums, or int8 in int32.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result, bail};

use super::launch::{address, dimension};

/// What cuBLAS may use for the parts of products that it splits: its own choice before Hopper, where that is 32 MiB.
pub const WORKSPACE_BYTES: usize = 4 << 20;

/// Memory for cuBLAS: with its own it would allocate while a graph is captured, once for each product.
pub struct Workspace {
    device: CudaDevice,
    _memory: CudaSlice<u8>,
}

impl Workspace {
    /// For all products on this device, until it is dropped.
    ///
    /// # Errors
    /// If there is no memory, or cuBLAS refuses it.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let memory = device.alloc_zeros::<u8>(WORKSPACE_BYTES)?;
        let (blas, at) = (device.cublas_handle(), address(&memory, device) as *mut c_void);
        // SAFETY: the handle lives as long as `blas`, and uses the memory until `drop` takes it away.
        let status = unsafe { sys::cublasSetWorkspace_v2(*blas.handle(), at, WORKSPACE_BYTES) };
        if status != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            bail!("cublasSetWorkspace: {status:?}");
        }
        Ok(Self { device: device.clone(), _memory: memory })
    }
}

impl Drop for Workspace {
    /// Setting the stream gives the library its own memory back.
    fn drop(&mut self) {
        let (blas, stream) = (self.device.cublas_handle(), self.device.cuda_stream());
        // SAFETY: the handle and the stream live as long as the device. What was queued before the memory is freed runs before.
        let _ = unsafe { sys::cublasSetStream_v2(*blas.handle(), stream.cu_stream().cast()) };
    }
}

/// A row-major matrix on the device, in elements.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    pub address: u64,
    /// From row to row.
    pub stride: usize,
    /// From one product's matrix to the next one's.
    pub batch_stride: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Half,
    Float,
    /// Signed bytes, summed in 32 bits.
    Byte,
    Int,
}

impl Type {
    fn cuda(self) -> sys::cudaDataType {
        match self {
            Type::Half => sys::cudaDataType::CUDA_R_16F,
            Type::Float => sys::cudaDataType::CUDA_R_32F,
            Type::Byte => sys::cudaDataType::CUDA_R_8I,
            Type::Int => sys::cudaDataType::CUDA_R_32I,
        }
    }
}

/// `batch` products `out [m, n] = a [m, k] · bᵀ`, where b is `[n, k]`, or `· b` where b is `[k, n]`.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub batch: usize,
    pub a: Operand,
    pub b: Operand,
    pub b_is_transposed: bool,
    pub out: Operand,
    pub from: Type,
    pub to: Type,
}

impl Gemm {
    /// # Safety
    /// The operands are matrices of these shapes on `device`, and stay so until its stream has come past this call.
    pub unsafe fn run(&self, device: &CudaDevice) -> Result<()> {
        let [m, n, k] = [dimension(self.m)?, dimension(self.n)?, dimension(self.k)?];
        let (compute, one, zero) = match self.from {
            Type::Byte => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, 1u32, 0u32),
            _ => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, 1f32.to_bits(), 0),
        };
        let scalar = |bits: &u32| (&raw const *bits).cast::<c_void>();
        // cuBLAS counts by columns: its first operand is our second one.
        let transpose = |is_transposed| match is_transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let blas = device.cublas_handle();
        // SAFETY: the handle lives as long as `blas`; the scalars are read before the call returns; the caller vouches for
        // the matrices.
        let status = unsafe {
            sys::cublasGemmStridedBatchedEx(
                *blas.handle(),
                transpose(self.b_is_transposed),
                transpose(false),
                n,
                m,
                k,
                scalar(&one),
                self.b.address as *const c_void,
                self.from.cuda(),
                dimension(self.b.stride)?,
                self.b.batch_stride as i64,
                self.a.address as *const c_void,
                self.from.cuda(),
                dimension(self.a.stride)?,
                self.a.batch_stride as i64,
                scalar(&zero),
                self.out.address as *mut c_void,
                self.to.cuda(),
                dimension(self.out.stride)?,
                self.out.batch_stride as i64,
                dimension(self.batch)?,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        if status != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            bail!("cuBLAS: {status:?} at [{m}, {k}] x [{k}, {n}]");
        }
        Ok(())
    }
}
