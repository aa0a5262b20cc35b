//! The functions of the CUDA libraries that this program calls, each defined here as a jump, so that the program starts where
//! none of the libraries exists.
//!
//! candle links against the libraries, and the system's loader ends a program that lacks one of them before `main`. A name
//! that is defined in the program itself needs no library, though. What stands behind each name is therefore
//!
//! ```text
//!   cuInit:      jmp *slot.target          slot: target, name
//!   first call:  slot to r11, jmp bind     bind: finds the name in its library, fills the slot, goes on there
//! ```
//!
//! so that a first call looks the function up and every later one costs a jump more. Where the library or the function is
//! missing the call returns an error code of its library. The loader's own lazy binding would end the program there, and it
//! cannot be had at all without compiling every crate anew: rustc makes calls that are bound at start.
//!
//! A function that is not listed links as before: the program then needs its library to start, and tests/portable.rs names it.
//! Other architectures than x86-64 link all of them so.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod jumps {
    use std::arch::global_asm;
    use std::ffi::{CStr, c_char, c_void};
    use std::sync::atomic::{AtomicPtr, Ordering};

    use super::super::libraries::{self, Library};

    /// What the jump of one function reads. Each is made below, in the program's data.
    #[repr(C)]
    struct Slot {
        target: AtomicPtr<c_void>,
        name: *const c_char,
    }

    macro_rules! functions {
        ($($name:ident)*) => {
            $(global_asm!(
                ".pushsection .rodata.quantbench_cuda, \"a\", @progbits",
                concat!("quantbench_name_", stringify!($name), ": .asciz \"", stringify!($name), "\""),
                ".popsection",
                ".pushsection .data.quantbench_cuda, \"aw\", @progbits",
                ".balign 8",
                concat!("quantbench_slot_", stringify!($name), ": .quad quantbench_first_", stringify!($name)),
                concat!(".quad quantbench_name_", stringify!($name)),
                ".popsection",
                ".pushsection .text.quantbench_cuda, \"ax\", @progbits",
                ".balign 16",
                concat!(".globl ", stringify!($name)),
                concat!(".hidden ", stringify!($name)),
                concat!(".type ", stringify!($name), ", @function"),
                concat!(stringify!($name), ": jmp qword ptr [rip + quantbench_slot_", stringify!($name), "]"),
                concat!("quantbench_first_", stringify!($name), ": lea r11, [rip + quantbench_slot_", stringify!($name), "]"),
                "jmp quantbench_bind",
                ".popsection",
            );)*
        };
    }

    functions! {
        cuCtxDestroy_v2 cuCtxGetCurrent cuCtxSetCurrent cuCtxSynchronize cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount
        cuDeviceGetMemPool cuDeviceGetName cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain cuDeviceTotalMem_v2
        cuDriverGetVersion cuEventCreate cuEventDestroy_v2 cuEventElapsedTime_v2 cuEventQuery cuEventRecord
        cuEventSynchronize
        cuFuncSetAttribute cuGetErrorName cuGetErrorString cuGraphDestroy cuGraphExecDestroy cuGraphInstantiateWithFlags
        cuGraphLaunch cuGraphUpload cuInit cuLaunchKernel cuLaunchKernelEx cuMemAllocAsync cuMemAlloc_v2 cuMemFreeAsync
        cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemPoolGetAttribute cuMemPoolSetAttribute
        cuMemPoolTrimTo cuMemcpyDtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyHtoDAsync_v2 cuMemcpyPeerAsync cuMemsetD8Async
        cuModuleGetFunction cuModuleLoad cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveBlocksPerMultiprocessor
        cuStreamBeginCapture_v2 cuStreamCreate cuStreamDestroy_v2 cuStreamEndCapture cuStreamIsCapturing cuStreamQuery
        cuStreamSynchronize cuStreamWaitEvent
        cublasCreate_v2 cublasDestroy_v2 cublasDgemmStridedBatched cublasGemmStridedBatchedEx cublasSetMathMode
        cublasSetStream_v2 cublasSetWorkspace_v2
        curandCreateGenerator curandDestroyGenerator curandSetPseudoRandomGeneratorSeed curandSetStream
    }

    // A caller's arguments lie in six registers and, where they are floating point, in eight others; rax counts the latter.
    // The stack is 8 bytes off a multiple of 16 where a function begins, and a multiple of 16 behind seven pushes.
    global_asm!(
        ".pushsection .text.quantbench_cuda, \"ax\", @progbits",
        ".balign 16",
        "quantbench_bind:",
        "push rax; push rdi; push rsi; push rdx; push rcx; push r8; push r9",
        "sub rsp, 128",
        "movaps [rsp], xmm0; movaps [rsp + 16], xmm1; movaps [rsp + 32], xmm2; movaps [rsp + 48], xmm3",
        "movaps [rsp + 64], xmm4; movaps [rsp + 80], xmm5; movaps [rsp + 96], xmm6; movaps [rsp + 112], xmm7",
        "mov rdi, r11",
        "call {find}",
        "mov r11, rax",
        "movaps xmm0, [rsp]; movaps xmm1, [rsp + 16]; movaps xmm2, [rsp + 32]; movaps xmm3, [rsp + 48]",
        "movaps xmm4, [rsp + 64]; movaps xmm5, [rsp + 80]; movaps xmm6, [rsp + 96]; movaps xmm7, [rsp + 112]",
        "add rsp, 128",
        "pop r9; pop r8; pop rcx; pop rdx; pop rsi; pop rdi; pop rax",
        "jmp r11",
        ".popsection",
        find = sym find,
    );

    /// Where a call goes: to the function, which the slot then leads to, or to one that fails as the library's would.
    extern "C" fn find(slot: &Slot) -> *const c_void {
        // SAFETY: the slots above hold names that end in a zero byte.
        let name = unsafe { CStr::from_ptr(slot.name) };
        let library = Library::of(name);
        match libraries::function(library, name) {
            Some(found) => {
                slot.target.store(found.cast_mut(), Ordering::Release);
                found
            }
            None => match library {
                Library::Driver => no_driver as *const c_void,
                Library::Blas => no_blas as *const c_void,
                Library::Random => no_random as *const c_void,
            },
        }
    }

    /// `CUDA_ERROR_SHARED_OBJECT_INIT_FAILED`
    extern "C" fn no_driver() -> u32 {
        303
    }

    /// `CUBLAS_STATUS_NOT_INITIALIZED`
    extern "C" fn no_blas() -> u32 {
        1
    }

    /// `CURAND_STATUS_INITIALIZATION_FAILED`
    extern "C" fn no_random() -> u32 {
        203
    }
}
