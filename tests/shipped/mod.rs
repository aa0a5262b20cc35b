//! The binary whose contents tests look at.

use std::path::PathBuf;

/// The one that `QUANTBENCH_SHIPPED` names, as `.ci/cuda` has it from `scripts/release.sh`: only a build that is optimised across crates leaves out
/// what candle never calls here. Else the one that cargo has built for this test.
pub fn binary() -> PathBuf {
    std::env::var_os("QUANTBENCH_SHIPPED").unwrap_or_else(|| env!("CARGO_BIN_EXE_quantbench").into()).into()
}
