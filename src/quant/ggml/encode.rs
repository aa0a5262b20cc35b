//! How ggml's reference quantizers, without an importance matrix, make blocks: the same bytes. All in fp32, each operation rounded and sums in
//! the order of the elements. Source: ggml-quants.c of llama.cpp, as the golden files' README restates it.

use std::array::from_fn;

use half::{bf16 as Bf16, f16};

/// fp16 at byte `at`, rounded to nearest even.
fn put_half(block: &mut [u8], at: usize, value: f32) -> f32 {
    let half = f16::from_f32(value);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of largest magnitude, the first of equals.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |found: f32, value| if value.abs() > found.abs() { *value } else { found })
}

fn range(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

/// The nearest integer of `0 ..= most`, even of two.
fn code(value: f32, most: f32) -> f32 {
    value.round_ties_even().clamp(0.0, most)
}

/// Low and high nibbles of codes that lie half a run apart.
fn put_nibbles(bytes: &mut [u8], codes: &[u8]) {
    let (low, high) = codes.split_at(bytes.len());
    for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
        *byte = low & 15 | (high & 15) << 4;
    }
}

/// The fifth bits of 32 codes.
fn fifths(codes: &[u8; 32]) -> [u8; 4] {
    codes.iter().enumerate().fold(0u32, |bits, (i, code)| bits | u32::from(code >> 4) << i).to_le_bytes()
}

pub fn bf16(values: &[f32], block: &mut [u8]) {
    block.copy_from_slice(&Bf16::from_f32(values[0]).to_le_bytes());
}

pub fn q8_0(values: &[f32], block: &mut [u8]) {
    let d = extreme(values).abs() / 127.0;
    put_half(block, 0, d);
    let inverse = inverse(d);
    for (byte, value) in block[2..].iter_mut().zip(values) {
        *byte = ((value * inverse).round() as i8).cast_unsigned();
    }
}

/// Codes of Q4_0 and Q5_0, `levels` of them, whose middle one is 0.
fn centred(values: &[f32], block: &mut [u8], levels: f32) -> [u8; 32] {
    let d = extreme(values) / -(levels / 2.0);
    put_half(block, 0, d);
    let inverse = inverse(d);
    from_fn(|i| (values[i] * inverse + (levels / 2.0 + 0.5)).min(levels - 1.0) as u8)
}

/// Codes of Q4_1 and Q5_1 from the least value up.
fn from_least(values: &[f32], block: &mut [u8], levels: f32) -> [u8; 32] {
    let (least, most) = range(values);
    let d = (most - least) / (levels - 1.0);
    put_half(block, 0, d);
    put_half(block, 2, least);
    let inverse = inverse(d);
    from_fn(|i| ((values[i] - least) * inverse + 0.5).min(levels - 1.0) as u8)
}

pub fn q4_0(values: &[f32], block: &mut [u8]) {
    let codes = centred(values, block, 16.0);
    put_nibbles(&mut block[2..], &codes);
}

pub fn q4_1(values: &[f32], block: &mut [u8]) {
    let codes = from_least(values, block, 16.0);
    put_nibbles(&mut block[4..], &codes);
}

pub fn q5_0(values: &[f32], block: &mut [u8]) {
    let codes = centred(values, block, 32.0);
    block[2..6].copy_from_slice(&fifths(&codes));
    put_nibbles(&mut block[6..], &codes);
}

pub fn q5_1(values: &[f32], block: &mut [u8]) {
    let codes = from_least(values, block, 32.0);
    block[4..8].copy_from_slice(&fifths(&codes));
    put_nibbles(&mut block[8..], &codes);
}

/// `table` has the values of codes by a scale of 1; `scale_of` that of a byte.
pub fn mxfp4(values: &[f32], block: &mut [u8], table: &[f32; 16], scale_of: impl Fn(&[u8]) -> f32) {
    let largest = extreme(values).abs();
    // ⌊log2⌋ + 127 is the exponent of an fp32: fp16 values have no smaller ones.
    let exponent = (largest.to_bits() >> 23) as u8;
    block[0] = if largest == 0.0 { 0 } else { exponent.saturating_sub(2) };
    let scale = scale_of(block);
    let nearest = |value: f32| {
        let error = |code: usize| (table[code] * scale - value).abs();
        (1..16).fold(0, |best, code| if error(code) < error(best) { code } else { best }) as u8
    };
    let codes: [u8; 32] = from_fn(|i| nearest(values[i]));
    put_nibbles(&mut block[1..], &codes);
}

/// The scale of 16 values whose codes −32 … 31 fit them best, each error weighted by the value's square.
fn scale_of_run(values: &[f32]) -> f32 {
    let extreme = extreme(values);
    if extreme == 0.0 {
        return 0.0;
    }
    let (mut scale, mut best) = (0.0, 0.0);
    for i in std::iter::once(0i8).chain((-9..=9).filter(|i| *i != 0)) {
        let inverse = -(32.0 + 0.1 * f32::from(i)) / extreme;
        let (mut dot, mut square) = (0.0f32, 0.0f32);
        for value in values {
            let (l, w) = ((inverse * value).round_ties_even().clamp(-32.0, 31.0), value * value);
            dot += w * value * l;
            square += w * l * l;
        }
        if square > 0.0 && dot * dot > best * square {
            scale = dot / square;
            best = scale * dot;
        }
    }
    scale
}

pub fn q6_k(values: &[f32], block: &mut [u8]) {
    let scales: [f32; 16] = from_fn(|run| scale_of_run(&values[16 * run..][..16]));
    let extreme = extreme(&scales);
    block.fill(0);
    if extreme == 0.0 {
        return;
    }
    let inverse = -128.0 / extreme;
    let d = put_half(block, 208, 1.0 / inverse);
    let mut codes = [32u8; 256];
    for (run, scale) in scales.iter().enumerate() {
        let quantized = (inverse * scale).round_ties_even().min(127.0);
        block[192 + run] = (quantized as i8).cast_unsigned();
        let scale = d * quantized;
        if scale == 0.0 {
            continue;
        }
        for (code, value) in codes[16 * run..][..16].iter_mut().zip(&values[16 * run..]) {
            *code = ((value / scale).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8;
        }
    }
    for (half, codes) in codes.chunks_exact(128).enumerate() {
        put_nibbles(&mut block[64 * half..][..64], codes);
        for l in 0..32 {
            block[128 + 32 * half + l] = (0..4).fold(0, |bits, i| bits | codes[32 * i + l] >> 4 << (2 * i));
        }
    }
}

/// Scale, minimum and codes of 32 values for `scale · code − minimum`, codes up to `most`: the best of a line through the extremes and of weighted
/// least squares after each of some roundings, from `first` steps of the scale on.
fn line_of_run(values: &[f32], most: f32, first: f32, n_tries: u8) -> (f32, f32, [u8; 32]) {
    let mean_square = values.iter().fold(0.0, |sum, value| sum + value * value) / 32.0;
    let root = mean_square.sqrt();
    let weights: [f32; 32] = from_fn(|i| root + values[i].abs());
    let (least, high) = range(values);
    let mut low = least.min(0.0);
    if high == low {
        return (0.0, -low, [0; 32]);
    }
    let (mut sum_w, mut sum_x) = (0.0f32, 0.0f32);
    for (w, x) in weights.iter().zip(values) {
        sum_w += w;
        sum_x += w * x;
    }
    let codes = |inverse: f32, low: f32| -> [f32; 32] { from_fn(|i| code(inverse * (values[i] - low), most)) };
    let error = |scale: f32, low: f32, codes: &[f32; 32]| {
        let terms = codes.iter().zip(values).zip(&weights);
        terms.fold(0.0f32, |sum, ((l, x), w)| {
            let off = scale * l + low - x;
            sum + w * (off * off)
        })
    };
    let inverse = most / (high - low);
    let mut scale = 1.0 / inverse;
    let mut best_codes = codes(inverse, low);
    let mut best = error(scale, low, &best_codes);
    for i in 0..n_tries {
        let inverse = (first + 0.1 * f32::from(i) + most) / (high - low);
        let tried = codes(inverse, low);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((l, x), w) in tried.iter().zip(values).zip(&weights) {
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut slope = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut intercept = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if intercept > 0.0 {
            (slope, intercept) = (sum_xl / sum_l2, 0.0);
        }
        let tried_error = error(slope, intercept, &tried);
        if tried_error < best {
            (best, best_codes, scale, low) = (tried_error, tried, slope, intercept);
        }
    }
    (scale, -low, best_codes.map(|code| code as u8))
}

/// `d`, `dmin` and scales of Q4_K and Q5_K, and all codes.
fn lines(values: &[f32], block: &mut [u8], most: f32, first: f32, n_tries: u8) -> [u8; 256] {
    let runs: [_; 8] = from_fn(|run| line_of_run(&values[32 * run..][..32], most, first, n_tries));
    let largest = |of: fn(&(f32, f32, [u8; 32])) -> f32| runs.iter().map(of).fold(0.0, f32::max);
    let (scale, min) = (largest(|run| run.0), largest(|run| run.1));
    let inverse = |largest: f32| if largest > 0.0 { 63.0 / largest } else { 0.0 };
    let (d, dmin) = (put_half(block, 0, scale / 63.0), put_half(block, 2, min / 63.0));
    let (inverse_scale, inverse_min) = (inverse(scale), inverse(min));
    let mut codes = [0; 256];
    let packed = &mut block[4..16];
    packed.fill(0);
    for (run, (scale, min, found)) in runs.iter().enumerate() {
        let (s, m) = (code(inverse_scale * scale, 63.0), code(inverse_min * min, 63.0));
        let (s_bits, m_bits) = (s as u8, m as u8);
        if run < 4 {
            packed[run] |= s_bits;
            packed[run + 4] |= m_bits;
        } else {
            packed[run + 4] = s_bits & 15 | (m_bits & 15) << 4;
            packed[run - 4] |= s_bits >> 4 << 6;
            packed[run] |= m_bits >> 4 << 6;
        }
        let (scale, min) = (d * s, dmin * m);
        let values = &values[32 * run..][..32];
        let of_run: [u8; 32] = match scale == 0.0 {
            true => *found,
            false => from_fn(|l| code((values[l] + min) / scale, most) as u8),
        };
        codes[32 * run..][..32].copy_from_slice(&of_run);
    }
    codes
}

pub fn q4_k(values: &[f32], block: &mut [u8]) {
    let codes = lines(values, block, 15.0, -1.0, 21);
    for (bytes, codes) in block[16..].chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        put_nibbles(bytes, codes);
    }
}

pub fn q5_k(values: &[f32], block: &mut [u8]) {
    let codes = lines(values, block, 31.0, -0.5, 16);
    for l in 0..32 {
        block[16 + l] = (0..8).fold(0, |bits, i| bits | codes[32 * i + l] >> 4 << i);
    }
    for (bytes, codes) in block[48..].chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        put_nibbles(bytes, codes);
    }
}
