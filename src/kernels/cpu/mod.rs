//! CPU plumbing: the thread pool, shared output slices, norms, rope, attention, activations.
//!
//! Every operation takes the [`super::isa::Isa`] to use and is safe to call: it checks its lengths, and that the machine
//! has the instructions. What threads do with the parts is the caller's business, but for [`arithmetic`] and
//! [`bandwidth`].

pub mod activation;
pub mod arithmetic;
pub mod attention;
pub mod bandwidth;
mod lanes;
pub mod libraries;
pub mod norm;
pub mod pages;
pub mod pool;
pub mod rlimit;
pub mod rope;
pub mod shared;
#[cfg(test)]
mod test_data;
pub mod topology;
pub mod vector;
