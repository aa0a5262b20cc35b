//! Cuts matrices into chunks for loading, and computes the device memory that loading needs. Queries no device.

use std::ops::Range;

use anyhow::{Result, bail};
use safetensors::Dtype;

use crate::engine::Setup;
use crate::engine::load::format_of;
use crate::kernels::cuda::staging::{BUFFER_BYTES, SLAB_BYTES};
use crate::quant::cuda::{DeviceBytes, GRANULE, SourceDtype};
use crate::weights::Source;
use crate::weights::policy::Formats;
use crate::weights::spec::MatrixSpec;

/// Threads that read, quantize absmax values and upload at most. More fill pinned memory no faster than a bus of 50 GB/s
/// empties it, and some buffers have to be left to the copies.
pub const READERS: usize = 12;

/// A unit of work for a loading thread.
#[derive(Debug, Clone, PartialEq)]
pub enum LoadChunk {
    /// A matrix that goes through the host's quantizer: one that is saved quantized, that the host reads too, or whose rows no buffer holds.
    Whole {
        matrix: usize,
    },
    Rows {
        matrix: usize,
        rows: Range<usize>,
        reading: SourceReading,
    },
}

impl LoadChunk {
    pub fn matrix(&self) -> usize {
        match self {
            LoadChunk::Whole { matrix } | LoadChunk::Rows { matrix, .. } => *matrix,
        }
    }
}

/// The form in which a source gives the values of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceReading {
    /// The saved dtype.
    Raw(SourceDtype),
    /// Cast to fp16.
    Halves,
    /// Cast to fp32.
    Floats,
}

impl SourceReading {
    /// The reading of the matrix `spec`; `None` where its values are not plain.
    fn of(source: &dyn Source, spec: &MatrixSpec, formats: &Formats) -> Result<Option<Self>> {
        Ok(match source.raw_dtype(&spec.name) {
            Some(Dtype::F16) => Some(SourceReading::Raw(SourceDtype::F16)),
            Some(Dtype::BF16) => Some(SourceReading::Raw(SourceDtype::Bf16)),
            Some(Dtype::F32) => Some(SourceReading::Raw(SourceDtype::F32)),
            Some(other) => bail!("tensor `{}` is {other}; allowed are F16, BF16 and F32", spec.name),
            None if source.is_quantized() => None,
            None if formats.is_exact(spec) => Some(SourceReading::Floats),
            None => Some(SourceReading::Halves),
        })
    }

    pub fn kind(self) -> SourceDtype {
        match self {
            SourceReading::Raw(kind) => kind,
            SourceReading::Halves => SourceDtype::F16,
            SourceReading::Floats => SourceDtype::F32,
        }
    }
}

/// The chunks of `setup`, matrix by matrix. `is_read_by_host` names the matrices that the host needs too.
pub fn chunks(setup: &Setup, is_read_by_host: &dyn Fn(usize) -> bool) -> Result<Vec<LoadChunk>> {
    let mut chunks = Vec::new();
    for (matrix, spec) in setup.model.matrices.iter().enumerate() {
        let reading = match is_read_by_host(matrix) {
            true => None,
            false => SourceReading::of(setup.source, spec, setup.formats)?,
        };
        let cut = reading.and_then(|reading| Some((reading, rows_per_chunk(spec.n, spec.k, reading.kind().bytes())?)));
        match cut {
            None => chunks.push(LoadChunk::Whole { matrix }),
            Some((reading, step)) => {
                let starts = (0..spec.n).step_by(step);
                let rows = starts.map(|start| start..spec.n.min(start + step));
                chunks.extend(rows.map(|rows| LoadChunk::Rows { matrix, rows, reading }));
            }
        }
    }
    Ok(chunks)
}

/// The most rows that a buffer holds of an `[n, k]` matrix so that every chunk begins at a [`GRANULE`]; `None` where there are
/// none.
fn rows_per_chunk(n: usize, k: usize, value_bytes: usize) -> Option<usize> {
    let fitting = BUFFER_BYTES / k.checked_mul(value_bytes).filter(|bytes| *bytes > 0)?;
    // GRANULE is a power of two, and so is the greatest common divisor.
    let granule_rows = GRANULE >> k.trailing_zeros().min(GRANULE.trailing_zeros());
    if n <= fitting {
        return Some(n).filter(|n| *n > 0);
    }
    Some(fitting / granule_rows * granule_rows).filter(|rows| *rows > 0)
}

/// Bytes of the device while a model loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peak {
    /// Matrices, when all are there.
    pub resident: usize,
    /// Bytes beside the resident ones: the slab, and scratch of the open matrices until they are finished.
    pub beyond: usize,
}

pub fn peak(matrices: &[MatrixSpec], source: &dyn Source, formats: &Formats) -> Peak {
    let of = |spec: &MatrixSpec| format_of(source, spec, formats).device_bytes(spec.n, spec.k);
    let bytes: Vec<DeviceBytes> = matrices.iter().map(of).collect();
    let mut transient: Vec<usize> = bytes.iter().map(|bytes| bytes.transient).collect();
    transient.sort_unstable_by_key(|bytes| std::cmp::Reverse(*bytes));
    // Chunks are handed out in order: a matrix is open while a thread has a chunk of it, and one because more are to come.
    let open = transient.iter().take(READERS + 1).sum::<usize>();
    Peak { resident: bytes.iter().map(|bytes| bytes.resident).sum(), beyond: SLAB_BYTES + open }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Device;
    use crate::plan::Model;
    use crate::quant::{FORMATS, FormatOptions, INTERNAL_FORMATS};
    use crate::weights::builtin_models;
    use crate::weights::random::Random;

    /// Bytes that loading may use beyond the model and its largest tensor.
    const ALLOWED_BYTES: usize = 256_000_000;

    /// Every built-in shape at every precision.
    fn for_each(check: &dyn Fn(&Model, &Random, &Formats)) {
        for shape in builtin_models() {
            let model = crate::models::build(&shape.config()).unwrap();
            let source = Random::new(0, 0, &model.matrices, &model.vectors);
            for precision in FORMATS.iter().chain(INTERNAL_FORMATS) {
                check(&model, &source, &Formats::new(*precision, FormatOptions::default()));
            }
        }
    }

    #[test]
    fn loading_takes_little_beyond_what_stays() {
        for_each(&|model, source, formats| {
            let precision = formats.precision();
            let Peak { resident, beyond } = peak(&model.matrices, source, formats);
            let stored: usize =
                model.matrices.iter().map(|spec| format_of(source, spec, formats).stored_bytes(spec.n, spec.k)).sum();
            let name = model.architecture;
            assert!(beyond <= ALLOWED_BYTES, "{name} {precision}: {beyond} bytes beyond {resident}");
            // Rows are padded to 128 bytes: to 384 of 288 for nf4 in 576 columns, the narrowest here.
            assert!(resident >= stored && resident < stored / 3 * 4, "{name} {precision}: {resident} of {stored}");
        });
    }

    #[test]
    fn pieces_are_all_of_a_matrix_in_whole_blocks_that_a_buffer_holds() {
        for_each(&|model, source, formats| {
            let setup = Setup {
                model,
                source,
                formats,
                device: Device::Cuda(0),
                threads: 1,
                sequences: 1,
                kv_format: Device::Cuda(0).kv_format(),
                capacity: 1,
                encoder_capacity: 1,
                cuda_graph: true,
            };
            let chunks = chunks(&setup, &|matrix| matrix == 3).unwrap();
            let mut next = vec![0; model.matrices.len()];
            for chunk in &chunks {
                let (matrix, rows, bytes) = match chunk {
                    LoadChunk::Whole { matrix } => (*matrix, 0..model.matrices[*matrix].n, 0),
                    LoadChunk::Rows { matrix, rows, reading } => (*matrix, rows.clone(), reading.kind().bytes()),
                };
                let MatrixSpec { name, n, k, .. } = &model.matrices[matrix];
                assert_eq!(bytes == 0, matrix == 3, "{name}: only what the host reads is made there");
                assert_eq!(rows.start, next[matrix], "{name}");
                assert!((rows.start * k).is_multiple_of(GRANULE) && rows.len() * k * bytes <= BUFFER_BYTES, "{name}");
                assert!(rows.end == *n || (rows.end * k).is_multiple_of(GRANULE), "{name}");
                next[matrix] = rows.end;
            }
            assert!(next.iter().zip(&model.matrices).all(|(next, spec)| *next == spec.n));
        });
    }

    #[test]
    fn rows_are_cut_where_blocks_end() {
        for ((n, k, bytes), rows) in [
            ((1, 1, 2), Some(1)),
            ((7, 33, 2), Some(7)),
            ((10_000_000, 1, 2), Some(BUFFER_BYTES / 2)),
            // An odd k shares no factor with a block: 64 rows are the least.
            ((100_000, 33, 4), Some(BUFFER_BYTES / 132 / 64 * 64)),
            ((100_000, 48, 2), Some(BUFFER_BYTES / 96 / 4 * 4)),
            ((100_000, 4096, 2), Some(512)),
            // 64 rows are larger than a buffer, and all rows as well.
            ((63, 100_001, 2), None),
            ((20, 100_001, 2), Some(20)),
            ((3, BUFFER_BYTES, 2), None),
            ((3, 0, 2), None),
            ((0, 64, 2), None),
            ((2, usize::MAX, 4), None),
        ] {
            assert_eq!(rows_per_chunk(n, k, bytes), rows, "[{n}, {k}] of {bytes} bytes a value");
        }
    }
}
