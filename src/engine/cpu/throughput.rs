//! The arithmetic throughput of the engine's own products of many rows, which a decode step of many sequences approaches.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use half::f16;

use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;
use crate::quant::{BASELINE, FormatOptions, HalfMatrix, Prepared};

/// Rows of the product, and the shape of its matrix: 2 MiB of weights for each of some rounds, so that decoding them counts as little as in
/// a prompt.
const ROWS: usize = 96;
const OUTPUTS: usize = 1024;
const INPUTS: usize = 1024;

/// The best of the rounds counts, as for the bandwidth.
const ROUNDS: usize = 8;

/// fp32 operations a second / 1e9 (a multiplication and an addition are two) of a product by a matrix in 16 bit, on all threads of the pool.
pub fn matmul_gflop_s(isa: Isa, pool: &Pool) -> f64 {
    let data = (0..OUTPUTS * INPUTS).map(|i| f16::from_f32((i % 13) as f32 - 6.0)).collect();
    let weight = HalfMatrix { n: OUTPUTS, k: INPUTS, data };
    let Ok(stored) = (BASELINE.new)(FormatOptions::default()).quantize(weight) else { return f64::NAN };
    let matrix = stored.pack(isa);
    let x: Vec<f32> = (0..ROWS * INPUTS).map(|i| (i % 11) as f32 - 5.0).collect();
    let (mut y, mut prepared) = (vec![0.0; ROWS * OUTPUTS], Prepared::default());
    let x = matrix.prepare(&x, ROWS, &mut prepared);
    let scratch: Vec<Mutex<Vec<f32>>> = (0..pool.threads()).map(|_| Mutex::default()).collect();
    let y = SharedSlice::new(&mut y);
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        pool.run(&|worker| {
            let mut scratch = scratch[worker.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            matrix.multiply(x, worker.share(OUTPUTS, matrix.row_granule()), None, &y, &mut scratch);
        });
        best = best.min(start.elapsed());
    }
    (2 * ROWS * OUTPUTS * INPUTS) as f64 / 1e9 / best.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_multiplies() {
        let pool = Pool::new(2);
        for isa in Isa::available() {
            let rate = matmul_gflop_s(isa, &pool);
            assert!(rate.is_finite() && rate > 0.0, "{}: {rate}", isa.name());
        }
    }
}
