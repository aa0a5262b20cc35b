//! Operations over many rows.

use half::f16;
use quantbench::kernels::cuda::attend::Heads;
use quantbench::kernels::cuda::place::RowPlaces;
use quantbench::kernels::cuda::rows::{Addend, RowKernels, Table};

use super::attention::rotated;
use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::norms::normed;
use super::place::widened;
use super::products::{Numbers, rounding};

/// Of a gate's results; no value of these cases becomes subnormal by it.
const SCALE: f32 = 0.25;

pub fn operations_over_rows() {
    let mut numbers = Numbers(0x70e5);
    for (rows, width) in [(1, 1), (3, 7), (5, 256), (2, 1000)] {
        let memory = Memory::default();
        let mut case = Case { memory: &memory, numbers: &mut numbers, rows, width };
        case.embed();
        case.add_table();
        case.norm();
        case.add_and_widen();
        case.activate();
        case.narrow_and_cut();
        case.norm_parts();
    }
    append(&mut numbers);
    read();
}

fn on<'a>(host: &'a Host<'a>) -> RowKernels<'a> {
    RowKernels { on: host }
}

struct Case<'a> {
    memory: &'a Memory,
    numbers: &'a mut Numbers,
    rows: usize,
    width: usize,
}

impl Case<'_> {
    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| 3.0 * self.numbers.normal()).collect()
    }

    fn halves(&mut self, count: usize) -> Vec<f16> {
        self.floats(count).into_iter().map(f16::from_f32).collect()
    }

    fn host(&self) -> Host<'_> {
        Host { chip: CHIPS[1], memory: self.memory }
    }

    /// Tokens, of which one stands for a picture's features.
    fn embed(&mut self) {
        const IMAGE: u32 = 4;
        let (rows, width, stride, scale) = (self.rows, self.width, self.width + 3, 1.25);
        let tokens: Vec<i32> = (0..rows as i32).map(|row| [2, 4, 0, 4, 6][row as usize % 5]).collect();
        let feature_of_row: Vec<i32> = (0..rows as i32).map(|row| [-1, 0, 0, 1, 1][row as usize % 5]).collect();
        let (table, features) = (self.halves(7 * stride), self.halves(2 * width));
        let out = self.memory.room::<f32>(rows * width);
        let held = [self.memory.hold(&tokens), self.memory.hold(&feature_of_row), self.memory.hold(&features)];
        let at = Table { address: self.memory.hold(&table), stride, width };
        // SAFETY: buffers of the case, as large as the call says.
        unsafe { on(&self.host()).embed(rows, held[0], held[1], at, held[2], Some(IMAGE), scale, out) }.expect("embed");
        let value = |at: usize| match (tokens[at / width], feature_of_row[at / width]) {
            (4, feature) => features[feature as usize * width + at % width].to_f32(),
            (token, _) => table[token as usize * stride + at % width].to_f32() * scale,
        };
        assert_eq!(self.memory.read::<f32>(out, rows * width), (0..rows * width).map(value).collect::<Vec<_>>());
    }

    fn add_table(&mut self) {
        let (rows, width, stride) = (self.rows, self.width, self.width + 5);
        // The rows of two sequences, where they are even.
        let period = if rows % 2 == 0 { rows / 2 } else { rows };
        let (mut x, table) = (self.floats(rows * width), self.halves(period * stride));
        let (at, table_at) = (self.memory.hold(&x), Table { address: self.memory.hold(&table), stride, width });
        // SAFETY: as above.
        unsafe { on(&self.host()).add_table(rows, period, at, table_at) }.expect("add_table");
        x.iter_mut().enumerate().for_each(|(at, x)| *x += table[at / width % period * stride + at % width].to_f32());
        assert_eq!(self.memory.read::<f32>(at, x.len()), x);
    }

    /// A product that is added, and what it adds to each value: an fp16 one and its bias are rounded first.
    fn addend(&mut self, is_float: bool, has_bias: bool) -> (Addend, Vec<f32>) {
        let (count, width) = (self.rows * self.width, self.width);
        let (floats, halves, bias) = (self.floats(count), self.halves(count), self.floats(width));
        let values = if is_float { self.memory.hold(&floats) } else { self.memory.hold(&halves) };
        let bias_at = if has_bias { self.memory.hold(&bias) } else { 0 };
        let added = (0..count).map(|at| match (is_float, has_bias) {
            (true, true) => floats[at] + bias[at % width],
            (true, false) => floats[at],
            (false, true) => f16::from_f32(halves[at].to_f32() + bias[at % width]).to_f32(),
            (false, false) => halves[at].to_f32(),
        });
        (
            Addend { values, bias: bias_at, is_float: i32::from(is_float), scale: 2.0 },
            added.map(|value| 2.0 * value).collect(),
        )
    }

    /// None, one and two, of every kind, with what they add up to on `a`.
    fn addends(&mut self, a: &[f32]) -> Vec<([Addend; 2], Vec<f32>)> {
        let mut cases = vec![([Addend::default(); 2], a.to_vec())];
        for [is_float, has_bias] in [[false, false], [false, true], [true, false], [true, true]] {
            let (first, added) = self.addend(is_float, has_bias);
            let sum: Vec<f32> = a.iter().zip(added).map(|(a, b)| a + b).collect();
            let (second, added) = self.addend(!is_float, has_bias);
            let both = sum.iter().zip(added).map(|(a, b)| a + b).collect();
            cases.extend([([first, Addend::default()], sum), ([first, second], both)]);
        }
        cases
    }

    fn norm(&mut self) {
        let (rows, width) = (self.rows, self.width);
        let (a, weight, bias) = (self.floats(rows * width), self.floats(width), self.floats(width));
        let held = [&weight, &bias].map(|values| self.memory.hold(values));
        for ((addends, x), has_bias) in
            self.addends(&a).into_iter().flat_map(|case| [(case.clone(), false), (case, true)])
        {
            let (x_at, out) = (self.memory.hold(&a), self.memory.room::<f16>(rows * width));
            let bias_at = if has_bias { held[1] } else { 0 };
            // SAFETY: as above.
            unsafe { on(&self.host()).norm(rows, width, x_at, addends, held[0], bias_at, 1e-5, 1.0, out) }
                .expect("norm");
            assert_eq!(self.memory.read::<f32>(x_at, rows * width), x, "{addends:?}");
            let made: Vec<f16> = self.memory.read(out, rows * width);
            for (x, made) in x.chunks_exact(width).zip(made.chunks_exact(width)) {
                let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
                let none = vec![0.0; width];
                let reference = if has_bias { normed(x, &weight, &bias, mean) } else { normed(x, &weight, &none, 0.0) };
                for (made, (y, error)) in made.iter().zip(reference) {
                    let allowed = 1.01 * (error + f64::from(rounding(y as f32)));
                    assert!((made.to_f64() - y).abs() <= allowed, "norm of {width}: {made} for {y} within {allowed:e}");
                }
            }
        }
    }

    fn add_and_widen(&mut self) {
        let (rows, width, count) = (self.rows, self.width, self.rows * self.width);
        let (a, bias, halves) = (self.floats(count), self.floats(width), self.halves(count));
        let memory = self.memory;
        let (a_at, halves_at, bias_at) = (memory.hold(&a), memory.hold(&halves), memory.hold(&bias));
        // One that adds nothing is none.
        for (addends, sum) in self.addends(&a).into_iter().skip(1) {
            let out = memory.room::<f32>(count);
            // SAFETY: as above.
            unsafe { on(&self.host()).add(rows, width, a_at, addends, out) }.expect("add");
            assert_eq!(memory.read::<f32>(out, count), sum, "{addends:?}");
        }
        let (wide, biased, biased_halves) = (memory.room::<f32>(count), memory.hold(&a), memory.hold(&halves));
        let host = self.host();
        // SAFETY: as above.
        unsafe {
            on(&host).widen(count, halves_at, 4.0, wide).expect("widen");
            on(&host).add_bias(rows, width, biased, true, bias_at).expect("add_bias");
            on(&host).add_bias(rows, width, biased_halves, false, bias_at).expect("add_bias");
        }
        let halves = widened(&halves);
        let all = |value: &dyn Fn(usize) -> f32| (0..count).map(value).collect::<Vec<_>>();
        assert_eq!(memory.read::<f32>(wide, count), all(&|at| 4.0 * halves[at]));
        assert_eq!(memory.read::<f32>(biased, count), all(&|at| a[at] + bias[at % width]));
        let rounded = all(&|at| f16::from_f32(halves[at] + bias[at % width]).to_f32());
        assert_eq!(widened(&memory.read(biased_halves, count)), rounded);
    }

    fn narrow_and_cut(&mut self) {
        let (rows, width, count) = (self.rows, self.width, self.rows * self.width);
        let (floats, halves) = (self.floats(count), self.halves(count));
        let (start, len) = (width / 3, width - width / 3 - width / 4);
        let memory = self.memory;
        let (narrow, cut) = (memory.room::<f16>(count), memory.room::<f16>(rows * len));
        let host = self.host();
        // SAFETY: as above.
        unsafe {
            on(&host).narrow(count, memory.hold(&floats), narrow).expect("narrow");
            on(&host).copy_columns(rows, width, (start, len), memory.hold(&halves), cut).expect("copy_columns");
        }
        let bits = |values: &[f16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let rounded: Vec<f16> = floats.into_iter().map(f16::from_f32).collect();
        assert_eq!(bits(&memory.read(narrow, count)), bits(&rounded));
        let columns: Vec<f16> = halves.chunks_exact(width).flat_map(|row| row[start..start + len].to_vec()).collect();
        assert_eq!(bits(&memory.read(cut, rows * len)), bits(&columns));
    }

    /// Rows of three parts.
    fn norm_parts(&mut self) {
        let (rows, len) = (self.rows, self.width);
        let (x, weight) = (self.halves(rows * 3 * len), self.floats(len));
        for bias in [None, Some(self.floats(3 * len))] {
            let at = self.memory.hold(&x);
            let bias_at = bias.as_ref().map_or(0, |bias| self.memory.hold(bias));
            // SAFETY: as above.
            unsafe { on(&self.host()).norm_parts(rows, (3, len), at, bias_at, self.memory.hold(&weight), 1e-5) }
                .expect("norm_parts");
            let biased = x.iter().enumerate().map(|(at, x)| match &bias {
                Some(bias) => f16::from_f32(x.to_f32() + bias[at % (3 * len)]).to_f32(),
                None => x.to_f32(),
            });
            let biased: Vec<f32> = biased.collect();
            let made = self.memory.read::<f16>(at, x.len());
            for (x, made) in biased.chunks_exact(len).zip(made.chunks_exact(len)) {
                for (made, (y, error)) in made.iter().zip(normed(x, &weight, &vec![0.0; len], 0.0)) {
                    let allowed = 1.01 * (error + f64::from(rounding(y as f32)));
                    assert!((made.to_f64() - y).abs() <= allowed, "norm of {len}: {made} for {y} within {allowed:e}");
                }
            }
        }
    }

    fn activate(&mut self) {
        let (rows, width, count) = (self.rows, self.width, self.rows * self.width);
        let (mut gate, up, bias) = (self.halves(count), self.halves(count), self.floats(width));
        gate[0] = f16::from_f32(-20.0);
        let [gate_at, up_at] = [&gate, &up].map(|values| self.memory.hold(values));
        let bias_at = self.memory.hold(&bias);
        let cases = [1, 2, 3].into_iter().flat_map(|kind| [(kind, false), (kind, true)]);
        for ((kind, has_up), has_bias) in cases.flat_map(|case| [(case, false), (case, true)]) {
            let out = self.memory.room::<f16>(count);
            let (bias_at, up_at) = (if has_bias { bias_at } else { 0 }, if has_up { up_at } else { 0 });
            // SAFETY: as above.
            unsafe { on(&self.host()).activate(rows, width, kind, gate_at, bias_at, up_at, SCALE, out) }
                .expect("activate");
            for (at, made) in self.memory.read::<f16>(out, count).into_iter().enumerate() {
                let biased = f16::from_f32(gate[at].to_f32() + bias[at % width]);
                let x = if has_bias { biased } else { gate[at] }.to_f64();
                let y = match kind {
                    1 => x / (1.0 + (-x).exp()),
                    2 => 0.5 * x * (1.0 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh()),
                    _ => x.max(0.0),
                };
                // fp32's part is as in a product's epilogue; both results are rounded.
                let error = 2f64.powi(-18) * x.abs() + f64::from(rounding(y as f32));
                let up = f64::from(SCALE) * up[at].to_f64();
                let (y, error) = if has_up { (y * up, error * up.abs()) } else { (y, error) };
                let allowed = 1.01 * (error + if has_up { f64::from(rounding(y as f32)) } else { 0.0 });
                assert!(
                    (made.to_f64() - y).abs() <= allowed,
                    "activation {kind} of {x}: {made} for {y} within {allowed:e}"
                );
            }
        }
    }
}

/// Rotation and cache write of a prompt.
fn append(numbers: &mut Numbers) {
    let shapes = [(4, 2, 16, 16), (3, 1, 20, 10), (2, 2, 7, 0), (8, 8, 64, 64)];
    for ((heads, kv_heads, d, rotary), has_bias) in shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)])
    {
        let (rows, position, capacity, d_pad) = (5, 3, 11, usize::next_multiple_of(d, 8));
        let memory = Memory::default();
        let mut halves = |count: usize| -> Vec<f16> { (0..count).map(|_| f16::from_f32(numbers.normal())).collect() };
        let (q, k, v) = (halves(rows * heads * d), halves(rows * kv_heads * d), halves(rows * kv_heads * d));
        let angles: Vec<f32> =
            (0..capacity * rotary / 2).flat_map(|at| [(at as f32 * 0.3).cos(), (at as f32 * 0.3).sin()]).collect();
        let mut cache = [vec![f16::ZERO; kv_heads * capacity * d_pad], vec![f16::ONE; kv_heads * capacity * d_pad]];
        let caches = cache.each_ref().map(|values| memory.hold(values));
        let held = [&q, &k, &v].map(|values| memory.hold(values));
        let mut bias = |count: usize| -> Vec<f32> { (0..count).map(|_| numbers.normal()).collect() };
        let biases = [bias(heads * d), bias(kv_heads * d), bias(kv_heads * d)];
        let biases_at = biases.each_ref().map(|bias| if has_bias { memory.hold(bias) } else { 0 });
        let shape = Heads { heads, kv_heads, d, d_pad, capacity };
        let (host, angles_at) = (Host { chip: CHIPS[1], memory: &memory }, memory.hold(&angles));
        let places = RowPlaces { sequences: 1, rows, position, places: 0 };
        // SAFETY: buffers of the case, as large as the call says.
        unsafe { on(&host).append(places, shape, held, biases_at, caches, angles_at, rotary) }.expect("append");
        let biased = |values: &[f16], bias: &[f32]| -> Vec<f16> {
            let with =
                |(value, bias): (&f16, &f32)| if has_bias { f16::from_f32(value.to_f32() + bias) } else { *value };
            values.iter().zip(bias.iter().cycle()).map(with).collect()
        };
        let [q, k, v] = [(&q, 0), (&k, 1), (&v, 2)].map(|(values, at)| biased(values, &biases[at]));
        let turned = |values: &[f16], count: usize| -> Vec<f16> {
            let head = |(at, head): (usize, &[f16])| rotated(head, rotary, &angles, position + at / count);
            values.chunks_exact(d).enumerate().flat_map(head).collect()
        };
        let k = turned(&k, kv_heads);
        for (at, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let to = (at % kv_heads * capacity + position + at / kv_heads) * d_pad;
            cache[0][to..to + d].copy_from_slice(k);
            cache[1][to..to + d].copy_from_slice(v);
        }
        assert_eq!(memory.read::<f16>(held[0], q.len()), turned(&q, heads), "{shape:?}");
        assert_eq!(cache.each_ref().map(Vec::len), [kv_heads * capacity * d_pad; 2]);
        for (values, at) in cache.iter().zip(caches) {
            assert_eq!(&memory.read::<f16>(at, values.len()), values, "{shape:?}");
        }
    }
}

/// All words are read, by whole steps and one by one: they write where their bits say so.
fn read() {
    const MARK: i32 = 0x5eed_5eed;
    for (words, marked) in [(2 * 512 * 9 + 5, true), (1, true), (2 * 512 * 8, false)] {
        let memory = Memory::default();
        let mut values = vec![0; 4 * words];
        values[0] = if marked { MARK } else { 1 };
        let (from, out) = (memory.hold(&values), memory.hold(&[7]));
        let host = Host { chip: CHIPS[1], memory: &memory };
        // SAFETY: as above.
        unsafe { on(&host).read(2, words, from, out) }.expect("read");
        assert_eq!(memory.read::<i32>(out, 1), [if marked { 1 } else { 7 }]);
    }
}
