//! What stands around cuBLAS for many rows: LLM.int8's outliers, codes and results, NF4's weights as halves.

use half::f16;
use quantbench::kernels::cuda::arena::{Arena, Layout};
use quantbench::kernels::cuda::launch::{Launcher, MemoryPlanner};
use quantbench::kernels::cuda::matvec::MatrixDesc;
use quantbench::kernels::cuda::shared_input::{ProductAt, SharedInput};
use quantbench::quant::int8::cuda::{ManyRows, flag_bytes};
use quantbench::quant::{FormatOptions, fp16, int8, nf4};

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::place::{formats, place, quantize, widened};
use super::products::{KINDS, Kind, Numbers, SHAPES, activations, check_stored_by, weight};

/// Rows of a call: fewer than its blocks, and more.
const ROWS: [usize; 4] = [2, 3, 40, 300];
/// As int8 quantizes in one launch, which gathers nothing.
const FEW_ROWS: usize = 16;
/// A power of two that keeps results in range.
const SCALE: f32 = 1.0 / 32.0;
/// Outlier columns of the calls before.
const BEFORE: u64 = 5;

pub fn int8_of_many_rows() {
    let mut numbers = Numbers(0x188);
    let shapes = SHAPES.into_iter().filter(|(n, k)| n * k <= 66 * 2560);
    for (turn, ((n, k), kind)) in shapes.flat_map(|shape| KINDS.map(|kind| (shape, kind))).enumerate() {
        let stored = quantize(int8::ID, weight(n, k, kind, &mut numbers));
        let m = ROWS[(turn + turn / 4) % if n * k > 10_000 { 3 } else { ROWS.len() }];
        let x = activations(m, k, kind, &mut numbers);
        let memory = Memory::default();
        let host = Host { chip: CHIPS[1], memory: &memory };
        let desc = place(&memory, "int8", &*stored, FormatOptions::default().int8_threshold);
        // Rows that are gathered, beside those of a prompt that would be.
        let is_gathered = m > FEW_ROWS;
        let scale = if turn % 3 == 0 { SCALE } else { 1.0 };
        let call = ManyRows {
            m,
            n,
            k,
            stride: desc.stride_bytes,
            threshold: desc.threshold,
            weight: desc.weight,
            absmax: desc.scales,
            x: memory.hold(&x),
            y: memory.room::<f16>(m * n),
            flags: memory.room::<u8>(flag_bytes(m, desc.stride_bytes)),
            columns: memory.room::<i32>(k),
            count: memory.room::<i32>(1),
            total: memory.hold(&[BEFORE]),
            codes: memory.room::<u8>(m * desc.stride_bytes),
            row_absmax: memory.room::<f32>(m),
            scale,
            products: memory.room::<i32>(m * n),
            gathered: if is_gathered { memory.room::<f16>(m * desc.stride_bytes) } else { 0 },
            gathered_weights: if is_gathered { memory.room::<f16>(n * desc.stride_bytes) } else { 0 },
        };
        // SAFETY: every address in it is of `memory`, and the buffers are as long as it says.
        let run = unsafe { call.quantize(&host).and_then(|()| call.multiply(&host)).and_then(|()| call.finish(&host)) };
        let what = format!("{kind:?} {m}x{k} @ {k}x{n}");
        run.unwrap_or_else(|error| panic!("{what}: {error}"));

        let x = widened(&x);
        let is_outlier = |column: &i32| x[*column as usize..].iter().step_by(k).any(|value| value.abs() >= 6.0);
        let columns: Vec<i32> = (0..k as i32).filter(is_outlier).collect();
        assert_eq!(memory.read::<i32>(call.count, 1), [columns.len() as i32], "{what}");
        assert_eq!(memory.read::<u64>(call.total, 1), [BEFORE + columns.len() as u64], "{what}");
        assert_eq!(memory.read::<i32>(call.columns, columns.len()), columns, "{what}");
        let unscaled: Vec<f32> = widened(&memory.read(call.y, m * n)).iter().map(|y| y / scale).collect();
        check_stored_by(scale, "int8", &what, &*stored, &x, &unscaled);
    }
}

/// Few rows, whose weights are decoded as they stream: no more than a launch takes and more, of one matrix and of five that read the same rows.
pub fn products_of_few_rows() {
    let mut numbers = Numbers(0x4f46);
    let shapes = SHAPES.into_iter().filter(|(n, k)| k.is_multiple_of(64) && n * k <= 130 * 4096);
    let cases = shapes.flat_map(|shape| KINDS.map(|kind| (shape, kind)));
    let entries = [fp16::ID, int8::ID, nf4::ID, nf4::NO_DOUBLE_QUANT];
    let cases = cases.flat_map(|case| entries.map(|entry| (case, entry))).enumerate();
    let cases = cases.map(|(turn, (((n, k), kind), entry))| {
        let rows: &[usize] = match entry.name {
            "fp16" => &[2, 8, 9, 16],
            "int8" => &[2, 8, 9, 16],
            _ => &[2, 8, 9, 16, 17, 32, 33, 64],
        };
        let n_parts = if turn % 11 == 0 && n * k <= 1 << 14 { 5 } else { 1 };
        ((n, k), kind, entry, rows[turn * 7 / 4 % rows.len()], n_parts, CHIPS[turn % CHIPS.len()])
    });
    // So many rows of a weight that blocks have no more warps than they need.
    let wide = CHIPS.map(|chip| entries.map(|entry| ((8480, 64), Kind::Outliers, entry, 3, 1, chip)));
    for (turn, ((n, k), kind, entry, m, n_parts, chip)) in cases.chain(wide.into_iter().flatten()).enumerate() {
        let stored: Vec<_> =
            (0..n_parts).map(|part| quantize(entry, weight(n + part, k, kind, &mut numbers))).collect();
        let x = activations(m, k, kind, &mut numbers);
        let memory = Memory::default();
        let host = Host { chip, memory: &memory };
        let threshold = if entry == int8::ID { FormatOptions::default().int8_threshold } else { f32::NAN };
        let is_float = turn % 3 == 0 && entry != int8::ID;
        let scale = if turn % 5 == 0 { SCALE } else { 1.0 };
        let parts: Vec<_> = stored
            .iter()
            .map(|stored| {
                let matrix = place(&memory, entry.name, &**stored, threshold);
                let y = m * matrix.n;
                let address = if is_float { memory.room::<f32>(y) } else { memory.room::<f16>(y) };
                (matrix, ProductAt { address, is_float, scale })
            })
            .collect();
        let (at, total) = (memory.hold(&x), memory.hold(&[BEFORE]));
        let run = |on: &dyn Launcher, arena: &Arena| {
            let input = SharedInput::new(at, m, total, arena);
            // SAFETY: the matrices, x and y are of `memory`, and as large as the shapes say.
            unsafe { MatrixDesc::multiply_all(&parts, on, &input) }
        };
        let what = format!("{} {kind:?} {m}x{k} @ {k}x{n}, {n_parts} parts", entry.name);
        let layout = Layout::of(|arena| run(&MemoryPlanner, arena)).expect("a plan");
        run(&host, &Arena::at(memory.room::<u8>(layout.bytes().max(1)), &layout))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        for (stored, (matrix, y)) in stored.iter().zip(&parts) {
            let y = y.address;
            let len = m * matrix.n;
            let made = if is_float { memory.read::<f32>(y, len) } else { widened(&memory.read(y, len)) };
            let unscaled: Vec<f32> = made.iter().map(|y| y / scale).collect();
            check_stored_by(scale, entry.name, &what, &**stored, &widened(&x), &unscaled);
        }
    }
}

/// Each value of the reference rounded once, bit for bit.
pub fn nf4_as_halves() {
    let mut numbers = Numbers(0x4f4);
    for entry in formats().filter(|entry| entry.name.starts_with("nf4")) {
        for (n, k) in SHAPES.into_iter().filter(|(n, k)| n * k <= 66 * 2560) {
            let stored = quantize(entry, weight(n, k, Kind::Zeros, &mut numbers));
            let memory = Memory::default();
            let matrix = place(&memory, entry.name, &*stored, f32::NAN);
            // All rows, and some from the middle on.
            for rows in [0..n, n / 3..n - n / 4] {
                let out = memory.room::<f16>(rows.len() * k);
                // SAFETY: the matrix was placed in `memory`, and `out` holds its rows.
                unsafe { nf4::cuda::dequantize(&Host { chip: CHIPS[1], memory: &memory }, &matrix, rows.clone(), out) }
                    .unwrap_or_else(|error| panic!("{} [{n}, {k}]: {error}", entry.name));
                let values = &stored.dequantize()[rows.start * k..rows.end * k];
                let values = values.iter().map(|value| f16::from_f32(*value).to_bits());
                let made = memory.read::<f16>(out, rows.len() * k).into_iter().map(f16::to_bits);
                assert!(values.eq(made), "{} [{n}, {k}] {rows:?}", entry.name);
            }
        }
    }
}
