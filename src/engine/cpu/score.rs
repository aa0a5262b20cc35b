//! Logits of every row of a call.

use std::sync::Mutex;

use super::CpuSession;
use crate::kernels::cpu::pool::Worker;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::cpu::vector;
use crate::plan::{LmHead, Softcap};

/// Rows whose logits are held at once when all are asked for: 16 MB at a vocabulary of 256k.
const SCORED_ROWS: usize = 16;

impl CpuSession {
    /// The head over all `rows` that the body left, some at a time.
    pub(super) fn score_rows(&mut self, head: LmHead, rows: usize, on_row: &mut dyn FnMut(usize, &[f32])) {
        let Self { pool, weights, decoder, memory, .. } = self;
        let matrix = &weights.matrices[head.weight.0];
        let bias = head.bias.map(|bias| weights.vectors[bias.0].as_slice());
        let (n, k) = matrix.shape();
        let softcap = head.softcap;
        let mut x = decoder.slots.region(decoder.storage.slot_of[head.x.0])[..rows * k].to_vec();
        x.iter_mut().for_each(|value| *value *= head.scale);
        let mut logits = vec![0.0; SCORED_ROWS.min(rows) * n];
        for (chunk, x) in x.chunks(SCORED_ROWS * k).enumerate() {
            let x = matrix.prepare(x, x.len() / k, &mut memory.prepared[0]);
            let y = SharedSlice::new(&mut logits[..x.m * n]);
            let scratch: Vec<Mutex<&mut Vec<f32>>> =
                memory.scratch.iter_mut().map(|s| Mutex::new(&mut s.kernel)).collect();
            pool.run(&|worker: &Worker| {
                let mut scratch = scratch[worker.index()].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                matrix.multiply(x, worker.share(n, weights.granule), bias, &y, &mut scratch);
            });
            if let Some(Softcap(cap)) = softcap {
                vector::cap(weights.isa, &mut logits[..x.m * n], cap);
            }
            logits.chunks_exact(n).take(x.m).enumerate().for_each(|(row, l)| on_row(chunk * SCORED_ROWS + row, l));
        }
    }
}
