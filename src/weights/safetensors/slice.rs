//! Parts of tensors that hold many matrices: the experts of a mixture.

use std::ops::Range;

use anyhow::{Result, anyhow, ensure};
use half::f16;
use safetensors::Dtype;

use super::{READ_BYTES, Safetensors};
use crate::weights::cast;
use crate::weights::spec::TensorSlice;

impl Safetensors {
    /// Rows of one matrix of a tensor, `[rows, k]`, cast to fp16. Returns how many finite values became infinite.
    ///
    /// # Errors
    /// If the tensor is not what `slice` describes, holds no plain values, or cannot be read.
    pub fn read_slice(&self, name: &str, slice: &TensorSlice, rows: Range<usize>, out: &mut [f16]) -> Result<usize> {
        let mut wide = vec![0.0; out.len()];
        self.read_slice_f32(name, slice, rows, &mut wide)?;
        let mut overflow = 0;
        for (narrow, wide) in out.iter_mut().zip(wide) {
            *narrow = f16::from_f32(wide);
            overflow += usize::from(wide.is_finite() && narrow.is_infinite());
        }
        Ok(overflow)
    }

    /// As [`Self::read_slice`], in the file's own values.
    pub fn read_slice_f32(&self, name: &str, slice: &TensorSlice, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let widen = match tensor.dtype {
            Dtype::F16 => cast::widen_f16,
            Dtype::BF16 => cast::widen_bf16,
            Dtype::F32 => cast::widen_f32,
            other => return Err(anyhow!("tensor `{name}` is {other}; allowed are F16, BF16 and F32")),
        };
        let TensorSlice { index, count, start, step, rows: all_rows, transposed } = *slice;
        let k = out.len() / rows.len().max(1);
        let all: usize = tensor.shape.iter().product();
        let fits = index < count && (rows.is_empty() || start + (rows.end - 1) * step < all_rows);
        ensure!(
            fits && all == count * all_rows * k && out.len() == rows.len() * k,
            "tensor `{name}` has {all} values, which are not {count} matrices of {all_rows} rows of {k}"
        );
        let first = index * all_rows * k;
        if transposed {
            // Whole columns of the matrix lie together: some at a time, of which every row takes its value.
            let columns_at_once = (READ_BYTES / size_of::<f32>() / all_rows).clamp(1, k.max(1));
            let mut block = vec![0.0; columns_at_once * all_rows];
            for column in (0..k).step_by(columns_at_once) {
                let columns = column..k.min(column + columns_at_once);
                let block = &mut block[..columns.len() * all_rows];
                self.read_values(name, tensor, first + column * all_rows, block, widen)?;
                for (values, column) in block.chunks_exact(all_rows).zip(columns) {
                    for (row, of_matrix) in rows.clone().enumerate() {
                        out[row * k + column] = values[start + of_matrix * step];
                    }
                }
            }
        } else if step == 1 {
            self.read_values(name, tensor, first + (start + rows.start) * k, out, widen)?;
        } else {
            let mut row_values = vec![0.0; all_rows * k];
            self.read_values(name, tensor, first, &mut row_values, widen)?;
            for (out, row) in out.chunks_exact_mut(k.max(1)).zip(rows) {
                let at = (start + row * step) * k;
                out.copy_from_slice(&row_values[at..at + k]);
            }
        }
        Ok(())
    }
}
