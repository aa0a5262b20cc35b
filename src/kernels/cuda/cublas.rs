//! cuBLAS: the products of [`super::gemm`], and its workspace.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result, bail};

use super::gemm::{Gemm, Type};
use super::launch::{address, dimension};

/// Workspace of cuBLAS for products that it splits: its default before Hopper, where that is 32 MiB.
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

fn data_type(ty: Type) -> sys::cudaDataType {
    match ty {
        Type::Half => sys::cudaDataType::CUDA_R_16F,
        Type::Float => sys::cudaDataType::CUDA_R_32F,
        Type::Byte => sys::cudaDataType::CUDA_R_8I,
        Type::Int => sys::cudaDataType::CUDA_R_32I,
    }
}

/// Queues the products.
///
/// # Safety
/// The operands are matrices of these shapes on `device`, and stay so until its stream has come past this call.
pub unsafe fn multiply(gemm: &Gemm, device: &CudaDevice) -> Result<()> {
    let [m, n, k] = [dimension(gemm.m)?, dimension(gemm.n)?, dimension(gemm.k)?];
    let (compute, alpha, zero) = match gemm.from {
        Type::Byte => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, 1u32, 0u32),
        _ => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, gemm.alpha.to_bits(), 0),
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
            transpose(gemm.b_is_transposed),
            transpose(false),
            n,
            m,
            k,
            scalar(&alpha),
            gemm.b.address as *const c_void,
            data_type(gemm.from),
            dimension(gemm.b.stride)?,
            gemm.b.batch_stride as i64,
            gemm.a.address as *const c_void,
            data_type(gemm.from),
            dimension(gemm.a.stride)?,
            gemm.a.batch_stride as i64,
            scalar(&zero),
            gemm.out.address as *mut c_void,
            data_type(gemm.to),
            dimension(gemm.out.stride)?,
            gemm.out.batch_stride as i64,
            dimension(gemm.batch)?,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    if status != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        bail!("cuBLAS: {status:?} at [{m}, {k}] x [{k}, {n}]");
    }
    Ok(())
}
