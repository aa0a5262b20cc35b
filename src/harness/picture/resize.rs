//! Resizing of 8-bit RGB pictures, bit for bit as Pillow's `Image.resize`.
//!
//! Filters, supports and fixed-point rounding are facts of Pillow's `Resample.c` (and `Geometry.c` for nearest). A
//! filter with other rounding, such as the `image` crate's own, moves pixels by one step and with them the logits.

use image::{Rgb, RgbImage};

/// Pillow's filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Nearest,
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

impl Filter {
    /// By Pillow's number, which is also the index here.
    pub const ALL: [(&'static str, Filter); 6] = [
        ("nearest", Filter::Nearest),
        ("lanczos", Filter::Lanczos),
        ("bilinear", Filter::Bilinear),
        ("bicubic", Filter::Bicubic),
        ("box", Filter::Box),
        ("hamming", Filter::Hamming),
    ];

    /// Samples each side of the centre that count, before widening for a reduction.
    fn support(self) -> f64 {
        match self {
            Filter::Nearest | Filter::Box => 0.5,
            Filter::Bilinear | Filter::Hamming => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    /// Weight at `x` samples from the centre.
    fn weight(self, x: f64) -> f64 {
        match self {
            // Half open, so that a sample between two outputs counts for one of them.
            Filter::Nearest | Filter::Box => f64::from(x > -0.5 && x <= 0.5),
            Filter::Bilinear => (1.0 - x.abs()).max(0.0),
            Filter::Bicubic => cubic(x.abs()),
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Hamming if x.abs() < 1.0 => sinc(x) * (0.54 + 0.46 * (std::f64::consts::PI * x).cos()),
            Filter::Lanczos | Filter::Hamming => 0.0,
        }
    }
}

/// `picture` as `size` × `size` pixels, in a pass along the rows and one along the columns, each rounded to 8 bits.
pub fn resize(picture: &RgbImage, size: u32, filter: Filter) -> RgbImage {
    if columns_first(picture, size) {
        along_rows(&along_columns(picture, size, filter), size, filter)
    } else {
        along_columns(&along_rows(picture, size, filter), size, filter)
    }
}

/// Rounding between the passes makes their order count. Pillow 13 begins with the columns where the height shrinks much
/// more than the width (pull request 9549); releases before it always began with the rows.
fn columns_first(picture: &RgbImage, size: u32) -> bool {
    let excess = |side: u32| i64::from(side) - i64::from(size);
    excess(picture.height()) > 0 && excess(picture.height()) > 2 * excess(picture.width())
}

/// [height, width, 3] → [height, `width`, 3].
fn along_rows(picture: &RgbImage, width: u32, filter: Filter) -> RgbImage {
    let taps = taps(filter, picture.width(), width);
    RgbImage::from_fn(width, picture.height(), |x, y| {
        let Taps { first, weights } = &taps[x as usize];
        let mut sums = [HALF; 3];
        for (i, weight) in (*first..).zip(weights) {
            add(&mut sums, &picture.get_pixel(i, y).0, *weight);
        }
        Rgb(sums.map(rounded))
    })
}

/// [height, width, 3] → [`height`, width, 3]; whole rows at a time, as they lie in memory.
fn along_columns(picture: &RgbImage, height: u32, filter: Filter) -> RgbImage {
    let row_len = picture.width() as usize * 3;
    let mut out = RgbImage::new(picture.width(), height);
    let mut sums = vec![0; row_len];
    for (Taps { first, weights }, out_row) in
        taps(filter, picture.height(), height).iter().zip(out.chunks_exact_mut(row_len.max(1)))
    {
        sums.fill(HALF);
        let rows = picture.chunks_exact(row_len.max(1)).skip(*first as usize);
        for (row, weight) in rows.zip(weights) {
            add(&mut sums, row, *weight);
        }
        for (value, sum) in out_row.iter_mut().zip(&sums) {
            *value = rounded(*sum);
        }
    }
    out
}

/// Bits after the point of a weight: 8 of the pixel and 2 for the sign and an overshoot make 32.
const FRACTION_BITS: u32 = 32 - 8 - 2;
/// Every sum starts here, so that cutting the fraction off rounds it.
const HALF: i32 = 1 << (FRACTION_BITS - 1);

fn add(sums: &mut [i32], values: &[u8], weight: i32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += i32::from(*value) * weight;
    }
}

fn rounded(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

/// One output sample: input samples from `first` on, times `weights` (fixed point, together 1).
struct Taps {
    first: u32,
    weights: Vec<i32>,
}

/// Weights by which each of `n_out` samples is made of `n_in` ones.
fn taps(filter: Filter, n_in: u32, n_out: u32) -> Vec<Taps> {
    let scale = f64::from(n_in) / f64::from(n_out);
    if filter == Filter::Nearest {
        return nearest_taps(scale, n_in, n_out);
    }
    // A reduction widens the filter: antialiasing.
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let tap = |out: u32| {
        let center = (f64::from(out) + 0.5) * scale;
        // `as` cuts towards zero and holds a negative at 0.
        let first = (center - support + 0.5) as u32;
        let end = ((center + support + 0.5) as u32).min(n_in);
        let weights: Vec<f64> =
            (first..end).map(|i| filter.weight((f64::from(i) - center + 0.5) * (1.0 / stretch))).collect();
        let total: f64 = weights.iter().sum();
        let fixed = |weight: &f64| (weight / total * f64::from(1u32 << FRACTION_BITS)).round() as i32;
        Taps { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..n_out).map(tap).collect()
}

/// The position is summed up rather than multiplied: Pillow's rounding at exact borders depends on it.
fn nearest_taps(scale: f64, n_in: u32, n_out: u32) -> Vec<Taps> {
    let mut position = scale * 0.5;
    let tap = |_| {
        let first = (position as u32).min(n_in.saturating_sub(1));
        position += scale;
        Taps { first, weights: vec![1 << FRACTION_BITS] }
    };
    (0..n_out).map(tap).collect()
}

/// Keys' cubic convolution kernel with a = -0.5, at `x` ≥ 0.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    let angle = std::f64::consts::PI * x;
    if x == 0.0 { 1.0 } else { angle.sin() / angle }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_picture_stays_flat() {
        // The weights of one output are rounded apart: their sum is off 1 by at most n · 2^-23, so 255 moves by less
        // than half a step while n is under 2^23 / 510 = 16448 taps.
        for (name, filter) in Filter::ALL {
            for (width, height) in [(1, 1), (1, 9), (7, 1), (16, 16), (33, 50), (2000, 3)] {
                let flat = RgbImage::from_pixel(width, height, Rgb([0, 131, 255]));
                for size in [1, 3, 16, 40] {
                    let out = resize(&flat, size, filter);
                    assert_eq!(out, RgbImage::from_pixel(size, size, Rgb([0, 131, 255])), "{name} {width}x{height}");
                }
            }
        }
    }

    #[test]
    fn the_same_size_changes_nothing() {
        let picture = RgbImage::from_fn(13, 13, |x, y| Rgb([(x * 19) as u8, (y * 37) as u8, (x * y * 71 % 256) as u8]));
        for (name, filter) in Filter::ALL {
            assert_eq!(resize(&picture, 13, filter), picture, "{name}");
        }
    }
}
