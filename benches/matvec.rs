//! Streaming rates of the CPU kernels: format × shape × instruction set at one token, in bytes of the stored format, beside
//! the plain read rate of the same threads; and multiplications for many tokens.
//!
//! Weights are cold: each iteration multiplies the next of as many matrices as exceed the last-level cache several times.

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use quantbench::kernels::cpu::shared::SharedSlice;
use quantbench::kernels::isa::Isa;
use quantbench::quant::{CpuMatrix, FORMATS, FormatOptions, HalfMatrix, Prepared};

/// Cold bytes to rotate over.
const COLD_BYTES: usize = 256 << 20;
/// `[n, k]` of llama-3.2-1b's gate and down projections, of phi-2's first and of smollm2-135m's gate.
const SHAPES: &[(usize, usize)] = &[(8192, 2048), (2048, 8192), (10240, 2560), (1536, 576)];
const PROMPT_TOKENS: &[usize] = &[8, 512];

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get())
}

/// fp16 weights of no particular meaning; the rates do not depend on the values.
fn weight(n: usize, k: usize) -> HalfMatrix {
    let value = |i: usize| f16::from_f32((i.wrapping_mul(2_654_435_761) >> 7 & 0xff) as f32 / 128.0 - 1.0);
    HalfMatrix { n, k, data: (0..n * k).map(value).collect() }
}

fn matrices(
    entry: &quantbench::quant::FormatEntry,
    (n, k): (usize, usize),
    isa: Isa,
    bytes: usize,
) -> Vec<Box<dyn CpuMatrix>> {
    let format = (entry.new)(FormatOptions::default());
    let count = bytes.div_ceil(format.stored_bytes(n, k));
    let weight = weight(n, k);
    (0..count).map(|_| format.quantize(weight.clone()).expect("a valid weight").pack(isa)).collect()
}

/// Equal parts of the rows, in multiples of the granule.
fn parts(matrix: &dyn CpuMatrix) -> Vec<Range<usize>> {
    let (n, _) = matrix.shape();
    let granules = n.div_ceil(matrix.row_granule());
    let bound = |part: usize| (granules * part / threads() * matrix.row_granule()).min(n);
    (0..threads()).map(|part| bound(part)..bound(part + 1)).collect()
}

/// Time of `iterations` calls, each with the next matrix. Threads live for all of them and meet only at the end, so that
/// no hand-over is measured.
fn time_calls(matrices: &[Box<dyn CpuMatrix>], x: &[f32], m: usize, iterations: u64) -> Duration {
    let (n, _) = matrices[0].shape();
    let mut prepared = Prepared::default();
    let prepared = matrices[0].prepare(x, m, &mut prepared);
    let mut y = vec![0.0; m * n];
    let y = SharedSlice::new(&mut y);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for rows in parts(&*matrices[0]) {
            let y = &y;
            scope.spawn(move || {
                let mut scratch = Vec::new();
                for i in 0..iterations as usize {
                    matrices[i % matrices.len()].multiply(prepared, rows.clone(), None, y, &mut scratch);
                }
            });
        }
    });
    start.elapsed()
}

fn activations(m: usize, k: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..m * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
    // Six outlier channels, as models of a billion parameters have them.
    x.chunks_mut(k).for_each(|token| (0..6).for_each(|i| token[i * k / 6] = 20.0));
    x
}

fn decode(criterion: &mut Criterion) {
    for &(n, k) in SHAPES {
        let mut group = criterion.benchmark_group(format!("decode {n}x{k}"));
        for entry in FORMATS {
            for isa in Isa::available() {
                let matrices = matrices(entry, (n, k), isa, COLD_BYTES);
                let x = activations(1, k);
                group.throughput(Throughput::Bytes(matrices[0].stored_bytes() as u64));
                group.bench_function(BenchmarkId::new(entry.name, isa.name()), |bencher| {
                    bencher.iter_custom(|iterations| time_calls(&matrices, &x, 1, iterations));
                });
            }
        }
    }
}

fn prefill(criterion: &mut Criterion) {
    let (n, k) = SHAPES[0];
    let mut group = criterion.benchmark_group(format!("prefill {n}x{k}"));
    for &m in PROMPT_TOKENS {
        for entry in FORMATS {
            for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Portable) {
                let matrices = matrices(entry, (n, k), isa, 1);
                let x = activations(m, k);
                // Multiply-adds: a criterion element is one.
                group.throughput(Throughput::Elements((m * n * k) as u64));
                group.bench_function(BenchmarkId::new(entry.name, format!("{} m{m}", isa.name())), |bencher| {
                    bencher.iter_custom(|iterations| time_calls(&matrices, &x, m, iterations));
                });
            }
        }
    }
}

/// What plain reading reaches: sums of 64-bit words over cold memory, on all threads.
fn read(criterion: &mut Criterion) {
    let words = vec![0x0123_4567_89ab_cdefu64; COLD_BYTES / 8];
    let mut group = criterion.benchmark_group("read");
    group.throughput(Throughput::Bytes(COLD_BYTES as u64));
    group.bench_function("all threads", |bencher| {
        bencher.iter(|| {
            std::thread::scope(|scope| {
                for part in words.chunks(words.len() / threads()) {
                    scope.spawn(move || black_box(part.iter().fold(0u64, |sum, word| sum ^ word)));
                }
            });
        });
    });
}

/// Activations of one token brought into the kernels' form.
fn prepare(criterion: &mut Criterion) {
    let (n, k) = (16, 16384);
    let mut group = criterion.benchmark_group("prepare");
    for entry in FORMATS {
        let matrix = &matrices(entry, (n, k), Isa::detect(), 1)[0];
        let (x, mut prepared) = (activations(1, k), Prepared::default());
        group.throughput(Throughput::Elements(k as u64));
        group.bench_function(entry.name, |bencher| bencher.iter(|| black_box(matrix.prepare(&x, 1, &mut prepared).m)));
    }
}

/// fp16 bytes quantized per second on one thread.
fn quantize(criterion: &mut Criterion) {
    let weight = weight(2048, 2048);
    let mut group = criterion.benchmark_group("quantize");
    for entry in FORMATS {
        let format = (entry.new)(FormatOptions::default());
        group.throughput(Throughput::Bytes((weight.data.len() * 2) as u64));
        group.bench_function(entry.name, |bencher| bencher.iter(|| format.quantize(weight.clone()).expect("valid")));
        group.bench_function(format!("{} pack", entry.name), |bencher| {
            bencher.iter_batched(
                || format.quantize(weight.clone()).expect("valid"),
                |stored| stored.pack(Isa::detect()),
                criterion::BatchSize::PerIteration,
            );
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = read, quantize, prepare, decode, prefill
}
criterion_main!(benches);
