//! Loads a model onto the device: threads read chunks of matrices into pinned buffers, asynchronous copies bring them to the device, and
//! kernels cast, quantize and lay them out. A matrix is whole only in its final location.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::load_chunks::{LoadChunk, Peak, READERS, SourceReading, chunks, peak};
use crate::engine::Setup;
use crate::engine::load::{LoadedTensors, Shared, begin, format_of};
use crate::engine::memory::is_out_of_memory;
use crate::error::size;
use crate::events::{Event, Listener};
use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::staging::{Staging, StagingBuffer};
use crate::quant::CudaMatrix;
use crate::quant::cuda::{CudaEncoder, SourceValues};
use crate::weights::spec::MatrixSpec;

/// A matrix, and its values where the host reads them too: it lays a bias out by distance, and drops it.
pub type PlacedMatrix = (Box<dyn CudaMatrix>, Option<Vec<f32>>);

/// Loads every tensor of `setup.model`.
pub fn stream(setup: &Setup, device: &Device, events: &dyn Listener) -> Result<LoadedTensors<PlacedMatrix>> {
    let start = Instant::now();
    let cuda = device.as_cuda_device()?;
    let threads = setup.threads.clamp(1, READERS);
    begin(setup, events);
    let chunks = chunks(setup, &|matrix| is_bias(setup, matrix))?;
    let loader = Loader {
        staging: Staging::new(cuda)?,
        overflow: cuda.alloc_zeros(1)?,
        targets: setup.model.matrices.iter().map(|_| Mutex::default()).collect(),
        shared: Shared::default(),
        setup,
        device,
        events,
    };
    for chunk in &chunks {
        loader.target(chunk.matrix()).chunks_left += 1;
    }
    let ran = loader.shared.run(threads, chunks.len(), &|index| loader.run(&chunks[index]));
    // Nothing may be in flight when memory is freed, even after an error.
    let kernel_time = loader.staging.finish();
    ran.map_err(|error| explained(error, setup))?;
    let vectors = loader.shared.vectors(setup)?;
    events.on(Event::End);

    let overflow: u64 = cuda.clone_dtoh(&loader.overflow)?.iter().sum();
    let host_ns = loader.shared.quantize_ns.load(Ordering::Relaxed) / threads as u64;
    let fp16_overflow = overflow + loader.shared.overflow.load(Ordering::Relaxed);
    let placed = loader.targets.into_iter().map(|target| target.into_inner().ok().and_then(|target| target.placed));
    Ok(LoadedTensors {
        matrices: placed.collect::<Option<_>>().context("a loading thread ended early")?,
        vectors,
        elapsed: start.elapsed(),
        quantize: kernel_time? + Duration::from_nanos(host_ns),
        fp16_overflow,
    })
}

/// Adds the memory that loading needs to an error for lack of it.
fn explained(error: Error, setup: &Setup) -> Error {
    if !is_out_of_memory(&error) {
        return error;
    }
    let Peak { resident, beyond } = peak(&setup.model.matrices, setup.source, setup.formats);
    let (resident, beyond) = (size(resident as u64), size(beyond as u64));
    error.context(format!("loading takes {resident} of device memory, and {beyond} more while tensors are converted"))
}

fn is_bias(setup: &Setup, matrix: usize) -> bool {
    setup.model.biases.iter().any(|bias| bias.table.0 == matrix)
}

/// Dropped from top to bottom: the staging first, whose copies write to the fields below it.
struct Loader<'a> {
    staging: Staging,
    /// Finite values that became infinite in fp16, as the device counts them.
    overflow: CudaSlice<u64>,
    targets: Vec<Mutex<Target>>,
    shared: Shared,
    setup: &'a Setup<'a>,
    device: &'a Device,
    events: &'a dyn Listener,
}

/// A matrix that is being loaded.
#[derive(Default)]
struct Target {
    /// From the first chunk to the last.
    encoder: Option<Box<dyn CudaEncoder>>,
    chunks_left: usize,
    placed: Option<PlacedMatrix>,
}

impl Loader<'_> {
    fn run(&self, chunk: &LoadChunk) -> Result<()> {
        let spec = &self.setup.model.matrices[chunk.matrix()];
        let placed = match chunk {
            LoadChunk::Whole { matrix } => Some(self.whole(*matrix, spec)?),
            LoadChunk::Rows { matrix, rows, reading } => self.rows(*matrix, spec, rows.clone(), *reading)?,
        };
        if placed.is_some() {
            self.target(chunk.matrix()).placed = placed;
            self.shared.progress(self.setup, spec, self.events);
        }
        Ok(())
    }

    /// Loads a matrix through the host's quantizer.
    fn whole(&self, matrix: usize, spec: &MatrixSpec) -> Result<PlacedMatrix> {
        let _room = self.shared.room(spec, self.setup.formats);
        let (stored, begin) = self.shared.store(self.setup.source, spec, self.setup.formats)?;
        let learned = is_bias(self.setup, matrix).then(|| stored.dequantize());
        let on_device = stored.upload(self.device).with_context(|| format!("placing `{}`", spec.name))?;
        self.shared.quantize_ns.fetch_add(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok((on_device, learned))
    }

    /// Reads a chunk and queues its copy. Returns the matrix with its last chunk.
    fn rows(
        &self,
        matrix: usize,
        spec: &MatrixSpec,
        rows: Range<usize>,
        reading: SourceReading,
    ) -> Result<Option<PlacedMatrix>> {
        let mut buffer = self.staging.take()?;
        self.read(spec, rows.clone(), reading, &mut buffer)?;
        let explain = || format!("placing `{}`", spec.name);
        let mut target = self.target(matrix);
        self.send(&mut target, spec, rows, reading, buffer).with_context(explain)?;
        target.chunks_left -= 1;
        let last = if target.chunks_left == 0 { target.encoder.take() } else { None };
        // Released before this thread waits for the device.
        drop(target);
        last.map(|encoder| Ok((encoder.finish().with_context(explain)?, None))).transpose()
    }

    fn read(
        &self,
        spec: &MatrixSpec,
        rows: Range<usize>,
        reading: SourceReading,
        buffer: &mut StagingBuffer,
    ) -> Result<()> {
        let (source, len) = (self.setup.source, rows.len() * spec.k);
        match reading {
            SourceReading::Raw(kind) => source.read_raw(&spec.name, rows, buffer.bytes(len * kind.bytes())),
            SourceReading::Floats => source.read_rows_f32(&spec.name, rows, buffer.floats(len)),
            SourceReading::Halves => {
                let overflow = source.read_rows(&spec.name, rows, buffer.halves(len))?;
                self.shared.overflow.fetch_add(overflow as u64, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    fn send(
        &self,
        target: &mut Target,
        spec: &MatrixSpec,
        rows: Range<usize>,
        reading: SourceReading,
        buffer: StagingBuffer,
    ) -> Result<()> {
        let encoder = match &mut target.encoder {
            Some(encoder) => encoder,
            none => {
                let format = format_of(self.setup.source, spec, self.setup.formats);
                let encoder = format.encoder(spec.n, spec.k, self.device)?;
                self.staging.admit_allocations()?;
                none.insert(encoder)
            }
        };
        let kind = reading.kind();
        let bytes = rows.len() * spec.k * kind.bytes();
        if let Some(to) = encoder.place(&rows, kind) {
            // SAFETY: the encoder has admitted room for these rows; its memory outlives the staging or is drained before.
            return Ok(unsafe { buffer.place(bytes, to) }?);
        }
        let overflow = address(&self.overflow, self.device.as_cuda_device()?);
        // SAFETY: the copy has brought these rows when the stream comes to the launch, and `take` waits before the next one.
        Ok(buffer.send(bytes, |values| unsafe { encoder.encode(rows, SourceValues { values, overflow, kind }) })?)
    }

    fn target(&self, matrix: usize) -> MutexGuard<'_, Target> {
        self.targets[matrix].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
