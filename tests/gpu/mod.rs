//! The GPU that tests share, or why there is none.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Device;
use quantbench::error::BadInput;
use quantbench::kernels::cuda::device;

use crate::skips::skip;

/// The first GPU, for one test at a time, since they share its memory pool. Where there is none, the refusal must name what
/// is missing and how to go on.
#[track_caller]
pub fn gpu() -> Option<(Device, MutexGuard<'static, ()>)> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    match device::open(0) {
        Ok(device) => Some((device, turn)),
        Err(error) => {
            let refusal = error.downcast_ref::<BadInput>().expect("a machine without a GPU is no internal error");
            assert!(refusal.hint_text().is_some_and(|hint| hint.contains("--device cpu")), "{refusal}");
            skip(refusal);
            None
        }
    }
}
