//! The shim itself: it finds what it is there to find, and rounds as a chip does.

use std::ffi::c_void;

use half::f16;
use quantbench::kernels::cuda::launch::{Fatbin, Grid, Launcher};
use quantbench::parameters;

use super::host::Host;
use super::memory::Memory;

static CHECKS: Fatbin = Fatbin { name: "checks", image: &[] };
const COUNT: usize = 64;

/// Runs a kernel of checks.cu over 64 floats with `threads` threads a block; several blocks run at once.
fn run(kernel: &'static str, blocks: usize, threads: u32, memory: &Memory) -> (candle_core::Result<()>, u64) {
    let from = memory.hold(&[2.5f32; COUNT]);
    let to = memory.room::<f32>(COUNT);
    let count = COUNT as i32;
    let grid = Grid { shared_bytes: 4 * COUNT, cooperative: blocks > 1, ..Grid::new((blocks, 1), threads) };
    let parameters: &mut [*mut c_void] = parameters![from, to, count];
    // SAFETY: what these kernels do wrong is what the shim has to catch.
    (unsafe { Host { chip: 900, memory }.launch(&CHECKS, kernel, grid, parameters) }, to)
}

pub fn faults_are_named() {
    for (kernel, blocks, threads, parts) in [
        ("read_outside", 1, 96, &["read_outside, block (0, 0): thread 64 (warp 2, lane 0): touches 0x"][..]),
        ("read_askew", 1, 32, &["thread 0", "not aligned"]),
        ("part_at_a_shuffle", 1, 32, &["lanes 0000ffff at __shfl_xor_sync, lanes ffff0000 have ended"]),
        ("part_at_a_barrier", 1, 64, &["warp 1 waits for ever: lanes ffffffff at __syncthreads", "32 of 64 threads"]),
        ("wait_for_nobody", 1, 32, &["waits for ever", "at backoff"]),
        ("sync_as_a_stranger", 1, 64, &["thread 32", "syncs with the first 32 threads"]),
        ("mix_operations", 1, 32, &["at __shfl_xor_sync for lanes ffffffff", "are at __ballot_sync"]),
        ("forget_a_barrier", 1, 64, &["threads in another order leave other bits"]),
        ("exceed_dynamic", 1, 32, &["thread 0", "touches 0x"]),
        ("exceed_shared_address", 1, 32, &["4 bytes at 256 of 256 of shared memory"]),
        ("wait_in_vain", 2, 64, &["wait_in_vain, block (1, 0): warp 1 waits for ever: lanes ffff0000 at backoff"]),
        ("hand_over", 65, 32, &["hand_over: 65 blocks at once, allowed are 64"]),
    ] {
        let error = run(kernel, blocks, threads, &Memory::default()).0.expect_err(kernel).to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{kernel}: {error}");
    }
    for (kernel, is_poison) in [("read_unwritten", [false, true]), ("forget_to_wait", [true, true])] {
        let memory = Memory::default();
        let (result, to) = run(kernel, 1, COUNT as u32, &memory);
        result.expect(kernel);
        let values: Vec<f32> = memory.read(to, COUNT);
        assert_eq!([values[0].is_nan(), values[COUNT / 2].is_nan()], is_poison, "{kernel}: {values:?}");
    }
}

pub fn warps_fill_slots_for_others() {
    let memory = Memory::default();
    let (result, to) = run("fill_for_another", 1, COUNT as u32, &memory);
    result.expect("fill_for_another");
    let values: Vec<f32> = memory.read(to, COUNT);
    assert!(values[..32].iter().all(|&value| value == 2.5), "{values:?}");
    assert!(
        values[32..].iter().all(|value| value.is_nan()),
        "what a copy brings lies there before the wait: {values:?}"
    );
    let (result, to) = run("sync_apart", 1, COUNT as u32, &memory);
    result.expect("sync_apart");
    assert!(memory.read::<f32>(to, COUNT).iter().all(|&value| value == 1.0));
}

pub fn blocks_run_at_once() {
    let words = |kernel| {
        let memory = Memory::default();
        let (result, to) = run(kernel, 2, 64, &memory);
        result.expect(kernel);
        memory.read::<i32>(to, 6)
    };
    assert_eq!(words("hand_over")[0], COUNT as i32 - 1);
    assert_eq!(words("keep_apart"), [0, 0, 0, 0, 1, 1]);
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
