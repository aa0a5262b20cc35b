//! The router's choice among experts: the operands of `route.cuh`.

use candle_core::{Result, bail};

use super::launch::dimension;
use super::matvec::MatrixPart;

/// As in instruction.cuh: experts of a token, and experts that there are.
pub(super) const MAX_CHOSEN: usize = 8;
const MAX_EXPERTS: usize = 512;

/// Parts of an expert in the table that [`Route::experts`] is the address of: gate, up and down.
pub type ExpertParts = [MatrixPart; 3];

/// As `struct Route` of instruction.cuh, which describes each field.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Route {
    pub scores: u64,
    pub experts: u64,
    pub hidden: u64,
    pub n_experts: i32,
    pub top_k: i32,
    pub rows_of_expert: i32,
    pub is_over_all: i32,
    /// Set by [`super::program::ProgramBuilder`], as `written_by`.
    pub next_gate: i32,
    pub written_by: i32,
}

impl Route {
    /// # Errors
    /// If there are more experts, or a token has more, than the kernel knows.
    pub fn choosing(self, top_k: usize, experts: usize) -> Result<Self> {
        if top_k > MAX_CHOSEN || experts > MAX_EXPERTS {
            bail!("{top_k} of {experts} experts for a token, allowed are {MAX_CHOSEN} of {MAX_EXPERTS}");
        }
        Ok(Self { top_k: dimension(top_k)?, n_experts: dimension(experts)?, ..self })
    }
}
