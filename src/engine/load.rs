//! Streams a model's tensors from a source into a format: read, cast, quantize, finish, drop, several at a time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use half::f16;
use half::vec::HalfBitsVecExt;

use super::Setup;
use crate::events::{Event, Listener, Unit};
use crate::kernels::cpu::pages::prefer_huge_pages;
use crate::quant::{self, Format, HalfMatrix, Stored};
use crate::weights::Source;
use crate::weights::policy::Formats;
use crate::weights::spec::{MatrixSpec, VectorKind, VectorSpec};

/// fp16 bytes that may be on their way from the source to their final form at once. A larger tensor travels alone.
/// Together with what quantizing adds, this stays inside the 256 MB that loading may use beyond the final size.
const IN_FLIGHT_BYTES: usize = 96 << 20;

/// Matrices in the order of the model, finished by the caller, and vectors as fp32.
pub struct LoadedTensors<T> {
    pub matrices: Vec<T>,
    pub vectors: Vec<Vec<f32>>,
    pub elapsed: Duration,
    /// Quantizing and finishing, summed over threads and divided by them.
    pub quantize: Duration,
    pub fp16_overflow: u64,
}

/// Loads every tensor of `setup.model` with `setup.threads` threads. `finish` turns a stored matrix into what the engine
/// keeps; it runs on the loading threads.
pub fn stream<T: Send>(
    setup: &Setup,
    events: &dyn Listener,
    finish: &(dyn Fn(&MatrixSpec, Box<dyn Stored>) -> candle_core::Result<T> + Sync),
) -> Result<LoadedTensors<T>> {
    let start = Instant::now();
    let formats = setup.formats;
    let specs = &setup.model.matrices;
    begin(setup, events);
    let shared = Shared { budget: Budget::default(), ..Shared::default() };
    let slots: Vec<Mutex<Option<T>>> = specs.iter().map(|_| Mutex::new(None)).collect();
    let load_one = |index: usize| -> Result<()> {
        let spec = &specs[index];
        let _room = shared.room(spec, formats);
        let (stored, begin) = shared.store(setup.source, spec, formats)?;
        let finished = finish(spec, stored).with_context(|| format!("placing `{}`", spec.name))?;
        shared.quantize_ns.fetch_add(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        *slots[index].lock().expect("a loader that panics ends the load") = Some(finished);
        shared.progress(setup, spec, events);
        Ok(())
    };
    shared.run(setup.threads, specs.len(), &load_one)?;
    let vectors = shared.vectors(setup)?;
    events.on(Event::End);

    let matrices = slots.into_iter().map(|slot| slot.into_inner().ok().flatten());
    Ok(LoadedTensors {
        matrices: matrices.collect::<Option<_>>().ok_or_else(|| anyhow!("a loading thread ended early"))?,
        vectors,
        elapsed: start.elapsed(),
        quantize: Duration::from_nanos(shared.quantize_ns.load(Ordering::Relaxed) / setup.threads as u64),
        fp16_overflow: shared.overflow.load(Ordering::Relaxed),
    })
}

/// Finite values that become infinite in fp16, by tensor, those without any left out: reads all tensors that are cast once more. Fails where a read
/// does.
pub fn fp16_overflow_by_tensor(setup: &Setup) -> Result<BTreeMap<String, u64>> {
    let Setup { model, source, formats, .. } = setup;
    let is_cast =
        |spec: &&MatrixSpec| !formats.is_exact(spec) && source.parts(spec).is_none() && source.stored(spec).is_none();
    let matrices = model.matrices.iter().filter(is_cast).map(|spec| (&spec.name, spec.n, spec.k));
    let vectors = model.vectors.iter().filter(|_| !formats.has_exact_vectors());
    let vectors = vectors.map(|spec| (&spec.name, spec.len, 1));
    let mut found = BTreeMap::new();
    let mut rows_of_chunk = Vec::new();
    for (name, n, width) in matrices.chain(vectors) {
        let rows = (IN_FLIGHT_BYTES / size_of::<f16>() / width.max(1)).max(1);
        let mut count = 0;
        for first in (0..n).step_by(rows) {
            let rows = first..(first + rows).min(n);
            rows_of_chunk.resize(rows.len() * width, f16::ZERO);
            count += source.read_rows(name, rows, &mut rows_of_chunk)? as u64;
        }
        if count > 0 {
            found.insert(name.clone(), count);
        }
    }
    Ok(found)
}

/// One matrix in the form that [`stream`] hands to its `finish`.
pub fn one(setup: &Setup, spec: &MatrixSpec) -> Result<Box<dyn Stored>> {
    Ok(Shared::default().store(setup.source, spec, setup.formats)?.0)
}

/// Tells how much there is to load.
pub fn begin(setup: &Setup, events: &dyn Listener) {
    let total = setup.model.matrices.iter().map(|spec| setup.source.stored_bytes(&spec.name)).sum();
    events.on(Event::Begin {
        label: format!("load + quantize {}", setup.formats.precision()),
        total,
        unit: Unit::Bytes,
    });
}

/// The format that holds a matrix which the source has in plain values.
pub fn format_of<'a>(source: &dyn Source, spec: &MatrixSpec, formats: &'a Formats) -> &'a dyn Format {
    // What a quantized checkpoint holds in plain values was left out on purpose.
    let left_out = source.is_quantized() && spec.role.is_quantized() && spec.held.is_none();
    if left_out { formats.unquantized() } else { formats.of(spec) }
}

/// State that the loading threads share.
#[derive(Default)]
pub struct Shared {
    budget: Budget,
    next: AtomicUsize,
    failure: Mutex<Option<anyhow::Error>>,
    /// Finite values that became infinite in fp16.
    pub overflow: AtomicU64,
    /// Nanoseconds of all threads.
    pub quantize_ns: AtomicU64,
    done_bytes: AtomicU64,
}

impl Shared {
    /// Hands out `0..count` in order to `threads` threads; the first failure stops the rest.
    pub fn run(&self, threads: usize, count: usize, one: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
        let work = || {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                if let Err(error) = one(index) {
                    self.next.store(count, Ordering::Relaxed);
                    let mut failure = self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    failure.get_or_insert(error);
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
        });
        match self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Room for a matrix on its way through the host.
    pub fn room(&self, spec: &MatrixSpec, formats: &Formats) -> Reservation<'_> {
        let weight_bytes = if formats.is_exact(spec) { size_of::<f32>() } else { size_of::<f16>() };
        self.budget.take(weight_bytes * spec.n * spec.k)
    }

    /// Tells that a matrix has been loaded.
    pub fn progress(&self, setup: &Setup, spec: &MatrixSpec, events: &dyn Listener) {
        let bytes = setup.source.stored_bytes(&spec.name);
        let before = self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        events.on(Event::Progress { done: before + bytes });
    }

    /// A matrix in its format, and when its last value was read.
    pub fn store(
        &self,
        source: &dyn Source,
        spec: &MatrixSpec,
        formats: &Formats,
    ) -> Result<(Box<dyn Stored>, Instant)> {
        if let Some(stored) = source.stored(spec) {
            return Ok((stored.with_context(|| format!("loading `{}`", spec.name))?, Instant::now()));
        }
        if let Some(parts) = source.parts(spec) {
            let parts = parts?;
            let begin = Instant::now();
            let format = if spec.held.is_some() { formats.of(spec) } else { formats.asked() };
            let stored = format.restore(spec.n, spec.k, parts).with_context(|| format!("loading `{}`", spec.name))?;
            return Ok((stored, begin));
        }
        if formats.is_exact(spec) {
            let mut data = vec![0.0; spec.n * spec.k];
            source.read_rows_f32(&spec.name, 0..spec.n, &mut data)?;
            return Ok((quant::exact(spec.n, spec.k, data)?, Instant::now()));
        }
        let weight = self.read(source, spec)?;
        let begin = Instant::now();
        let format = format_of(source, spec, formats);
        let stored = format.quantize(weight).with_context(|| format!("quantizing `{}`", spec.name))?;
        Ok((stored, begin))
    }

    /// The model's vectors.
    pub fn vectors(&self, setup: &Setup) -> Result<Vec<Vec<f32>>> {
        let exact = setup.formats.has_exact_vectors();
        let read = |spec| if exact { exact_vector(setup.source, spec) } else { self.read_vector(setup.source, spec) };
        setup.model.vectors.iter().map(read).collect()
    }

    fn read(&self, source: &dyn Source, spec: &MatrixSpec) -> Result<HalfMatrix> {
        // Zero bits come untouched from the system.
        let mut bits = vec![0u16; spec.n * spec.k];
        prefer_huge_pages(&mut bits);
        let mut data: Vec<f16> = bits.reinterpret_into();
        let overflow = source.read_rows(&spec.name, 0..spec.n, &mut data)?;
        self.overflow.fetch_add(overflow as u64, Ordering::Relaxed);
        Ok(HalfMatrix { n: spec.n, k: spec.k, data })
    }

    fn read_vector(&self, source: &dyn Source, spec: &VectorSpec) -> Result<Vec<f32>> {
        let mut data = vec![f16::ZERO; spec.len];
        let overflow = source.read_rows(&spec.name, 0..spec.len, &mut data)?;
        self.overflow.fetch_add(overflow as u64, Ordering::Relaxed);
        Ok(data.into_iter().map(|value| value.to_f32() + offset(spec)).collect())
    }
}

/// A vector in the checkpoint's own values.
fn exact_vector(source: &dyn Source, spec: &VectorSpec) -> Result<Vec<f32>> {
    let mut data = vec![0.0; spec.len];
    source.read_rows_f32(&spec.name, 0..spec.len, &mut data)?;
    data.iter_mut().for_each(|value| *value += offset(spec));
    Ok(data)
}

/// The offset that the norm adds to its stored weights.
fn offset(spec: &VectorSpec) -> f32 {
    if spec.kind == VectorKind::NormOffset { 1.0 } else { 0.0 }
}

/// Bounds the fp16 bytes in flight.
#[derive(Default)]
struct Budget {
    taken: Mutex<usize>,
    freed: Condvar,
}

impl Budget {
    /// Waits until `bytes` more fit, or nothing else is in flight.
    fn take(&self, bytes: usize) -> Reservation<'_> {
        let lock = self.taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let full = |taken: &mut usize| *taken > 0 && *taken + bytes > IN_FLIGHT_BYTES;
        let mut taken = self.freed.wait_while(lock, full).unwrap_or_else(|poisoned| poisoned.into_inner());
        *taken += bytes;
        Reservation { budget: self, bytes }
    }
}

/// Bytes taken from a `Budget`, given back on drop.
pub struct Reservation<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        *self.budget.taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) -= self.bytes;
        self.budget.freed.notify_all();
    }
}
