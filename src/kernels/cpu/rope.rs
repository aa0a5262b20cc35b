//! Rotary position embedding in the half-split layout: element `i` of a head pairs with `i + rotary_dim / 2`.

/// Cosines and sines for every position of a context, `[capacity, rotary_dim / 2]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Tables of the cosines and sines of each position in turn, `half` of each.
    pub fn new(turns: impl Iterator<Item = (f32, f32)>, half: usize) -> Self {
        let (cos, sin) = turns.unzip();
        Self { half, cos, sin }
    }

    /// `(cos, sin)` of one position, `rotary_dim / 2` each. Panics past the capacity.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// Takes the cosines and sines of the positions from `first` on.
    pub fn set(&mut self, first: usize, turns: impl Iterator<Item = (f32, f32)>) {
        let at = first * self.half;
        let tables = self.cos[at..].iter_mut().zip(&mut self.sin[at..]);
        tables.zip(turns).for_each(|((cos, sin), turn)| (*cos, *sin) = turn);
    }

    /// Bytes of both tables.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.cos[..]) + size_of_val(&self.sin[..])
    }
}

/// Rotates one head in place by the angles of its position; elements past `2 · cos.len()` stay as they are.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert!(sin.len() == half && head.len() >= 2 * half, "head {}, cos {half}, sin {}", head.len(), sin.len());
    let (first, rest) = head.split_at_mut(half);
    for (((a, b), cos), sin) in first.iter_mut().zip(&mut rest[..half]).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::test_data::random;

    fn angles(frequencies: &[f32], capacity: usize) -> Angles {
        let at = |position: usize| frequencies.iter().map(move |f| (position as f32 * f).sin_cos());
        Angles::new((0..capacity).flat_map(at).map(|(sin, cos)| (cos, sin)), frequencies.len())
    }

    #[test]
    fn rotates_pairs_and_leaves_the_rest() {
        for (d, half) in [(64, 32), (80, 16), (20, 5), (8, 4), (7, 3)] {
            let frequencies: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
            let angles = angles(&frequencies, 300);
            for position in [0, 1, 299] {
                let head = random(d, position as u64);
                let mut out = head.clone();
                let (cos, sin) = angles.at(position);
                rotate(&mut out, cos, sin);
                for i in 0..half {
                    let (s, c) = ((position as f32 * frequencies[i]) as f64).sin_cos();
                    let (a, b) = (head[i] as f64, head[i + half] as f64);
                    // cos and sin are within 1 ulp; two products and a sum round once each: 4 roundings of |a| + |b|.
                    let allowed = 4.0 * f32::EPSILON as f64 * (a.abs() + b.abs());
                    assert!((out[i] as f64 - (a * c - b * s)).abs() <= allowed, "d {d} position {position} pair {i}");
                    assert!((out[i + half] as f64 - (b * c + a * s)).abs() <= allowed);
                }
                assert_eq!(out[2 * half..], head[2 * half..]);
            }
        }
    }

    #[test]
    fn position_zero_changes_nothing() {
        let angles = angles(&[1.0, 0.1], 1);
        let mut head = [1.0, -2.0, 3.0, -4.0, 5.0];
        let (cos, sin) = angles.at(0);
        rotate(&mut head, cos, sin);
        assert_eq!(head, [1.0, -2.0, 3.0, -4.0, 5.0]);
        assert_eq!(angles.bytes(), 16);
    }
}
