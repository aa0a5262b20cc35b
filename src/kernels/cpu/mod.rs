//! CPU plumbing: the thread pool, shared output slices, norms, rope, attention, activations.

pub mod shared;
