//! A normed product that is added to a residual: the operands of `norm_add.cuh`.

/// As `struct NormAdd` of instruction.cuh, which describes each field.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct NormAdd {
    pub y: u64,
    pub x: u64,
    pub weight: u64,
    pub epsilon: f32,
    pub n: i32,
    /// Set by [`super::program::ProgramBuilder`].
    pub written_by: [i32; 2],
}
