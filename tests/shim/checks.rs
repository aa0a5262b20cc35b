//! The shim itself: it finds what it is there to find, and rounds as a chip does.

use std::ffi::c_void;

use half::f16;
use quantbench::kernels::cuda::launch::{Fatbin, Grid, Launcher};
use quantbench::parameters;

use super::host::Host;
use super::memory::Memory;

static CHECKS: Fatbin = Fatbin { name: "checks", image: &[] };
const COUNT: usize = 64;

/// Runs a kernel of checks.cu over 64 floats with `threads` threads.
fn run(kernel: &'static str, threads: u32, memory: &Memory) -> (candle_core::Result<()>, u64) {
    let from = memory.hold(&[2.5f32; COUNT]);
    let to = memory.room::<f32>(COUNT);
    let count = COUNT as i32;
    let grid = Grid { shared_bytes: 4 * COUNT, ..Grid::new((1, 1), threads) };
    let parameters: &mut [*mut c_void] = parameters![from, to, count];
    // SAFETY: what these kernels do wrong is what the shim has to catch.
    (unsafe { Host { chip: 900, memory }.launch(&CHECKS, kernel, grid, parameters) }, to)
}

pub fn faults_are_named() {
    for (kernel, threads, parts) in [
        ("read_outside", 96, &["read_outside, block (0, 0): thread 64 (warp 2, lane 0): touches 0x"][..]),
        ("read_askew", 32, &["thread 0", "not aligned"]),
        ("part_at_a_shuffle", 32, &["lanes 0000ffff at __shfl_xor_sync, lanes ffff0000 have ended"]),
        ("part_at_a_barrier", 64, &["warp 1 waits for ever: lanes ffffffff at __syncthreads", "32 of 64 threads"]),
        ("mix_operations", 32, &["at __shfl_xor_sync for lanes ffffffff", "are at __ballot_sync"]),
        ("forget_a_barrier", 64, &["threads in another order leave other bits"]),
        ("exceed_dynamic", 32, &["thread 0", "touches 0x"]),
        ("exceed_shared_address", 32, &["4 bytes at 256 of 256 of shared memory"]),
    ] {
        let error = run(kernel, threads, &Memory::default()).0.expect_err(kernel).to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{kernel}: {error}");
    }
    for (kernel, is_poison) in [("read_unwritten", [false, true]), ("forget_to_wait", [true, true])] {
        let memory = Memory::default();
        let (result, to) = run(kernel, COUNT as u32, &memory);
        result.expect(kernel);
        let values: Vec<f32> = memory.read(to, COUNT);
        assert_eq!([values[0].is_nan(), values[COUNT / 2].is_nan()], is_poison, "{kernel}: {values:?}");
    }
}

/// Every half and its neighbours in fp32, and the points between two halves.
pub fn halves_are_rounded() {
    let around = |bits: u16| {
        let value = f16::from_bits(bits).to_f32();
        let next = f16::from_bits(bits.wrapping_add(1)).to_f32();
        let middle = ((f64::from(value) + f64::from(next)) / 2.0) as f32;
        [value, value.next_up(), value.next_down(), middle, middle.next_up(), middle.next_down()]
    };
    let mut values: Vec<f32> = (0..=u16::MAX).flat_map(around).collect();
    values.extend([65519.996, 65520.0, -65520.0, 1e30, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY]);
    let memory = Memory::default();
    let (from, to, count) = (memory.hold(&values), memory.room::<f16>(values.len()), values.len() as i32);
    let parameters: &mut [*mut c_void] = parameters![from, to, count];
    // SAFETY: as checks.cu declares them.
    unsafe { Host { chip: 900, memory: &memory }.launch(&CHECKS, "to_half", Grid::new((1, 1), 256), parameters) }
        .expect("to_half");
    for (value, made) in values.iter().zip(memory.read::<f16>(to, values.len())) {
        let half = f16::from_f32(*value);
        assert!(made.to_bits() == half.to_bits() || made.is_nan() && half.is_nan(), "{value:e}: {made:e} for {half:e}");
    }
}
