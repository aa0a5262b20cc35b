//! Which format holds a matrix: what transformers converts by default, and what it leaves alone.

use super::spec::Role;

/// True for what stays in fp16 at every precision. transformers converts linear layers only, without the head and
/// without what an architecture lists in `_keep_in_fp32_modules`.
pub fn keeps_fp16(role: Role) -> bool {
    match role {
        Role::Projection => false,
        Role::Head | Role::Embedding | Role::Patches | Role::HighPrecision => true,
    }
}
