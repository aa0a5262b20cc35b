use super::*;
use crate::kernels::cpu::test_data::random;

/// Head dims that fill vectors, overhang them, and fall short of one.
const DIMS: [usize; 8] = [1, 7, 20, 24, 32, 64, 80, 256];

/// `[n, d]` in f64, and the error that fp32 may have: a score errs by d/2 + 4 roundings of its absolute terms (a sum of
/// random terms in at least 8 strands stays below that), which moves a weight by twice as much relative to the sum; the
/// exponentials err by 2e-7 twice; sums over t positions by t/8 + 8 roundings.
fn reference(q: &[f32], context: &Context, bias: Option<&[f32]>, seen: impl Fn(usize) -> usize) -> (Vec<f64>, f64) {
    let (d, rounding) = (context.d, f32::EPSILON as f64 / 2.0);
    let t = context.keys.len() / d;
    let mut out = Vec::new();
    let mut size = 0.0f64;
    for (i, q) in q.chunks(d).enumerate() {
        let scores: Vec<f64> = (0..seen(i))
            .map(|j| {
                let terms = q.iter().zip(&context.keys[j * d..]).map(|(q, k)| *q as f64 * *k as f64);
                let bias = bias.map_or(0.0, |bias| bias[i * t + j] as f64);
                let absolute = terms.clone().map(f64::abs).sum::<f64>() * context.scale.abs() as f64;
                size = size.max(absolute + if bias.is_finite() { bias.abs() } else { 0.0 });
                terms.sum::<f64>() * context.scale as f64 + bias
            })
            .collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend(
            (0..d).map(|e| {
                weights.iter().enumerate().map(|(j, w)| w / sum * context.values[j * d + e] as f64).sum::<f64>()
            }),
        );
    }
    let largest = context.values.iter().fold(0.0f64, |m, v| m.max(v.abs() as f64));
    let score_error = (d as f64 / 2.0 + 4.0) * rounding * size;
    (out, largest * (2.0 * score_error + 4e-7 + (t as f64 / 8.0 + 8.0) * rounding))
}

fn check(got: &[f32], (expected, allowed): (Vec<f64>, f64), name: &str) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((*got as f64 - expected).abs() <= allowed, "{name} [{i}]: {got} for {expected} ± {allowed:e}");
    }
}

#[test]
fn attend_matches_f64() {
    let mut scratch = Vec::new();
    for isa in Isa::available() {
        for d in DIMS {
            for (group, t) in [(1, 1), (1, 200), (3, 5), (4, 64), (2, 65), (9, 131), (17, 70), (40, 67)] {
                let (q, bias) = (random(group * d, 1), random(group * t, 4));
                let (keys, values) = (random(t * d, 2), random(t * d, 3));
                let context = Context {
                    keys: &keys,
                    values: &values,
                    d,
                    scale: 1.0 / (d as f32).sqrt(),
                    softcap: None,
                    window: None,
                    sinks: None,
                };
                for bias in [None, Some(&bias[..])] {
                    let mut out = vec![f32::NAN; group * d];
                    attend(isa, &q, &keys, &values, d, context.scale, bias, &mut out, &mut scratch);
                    let name = format!("{} d {d} group {group} t {t} bias {}", isa.name(), bias.is_some());
                    check(&out, reference(&q, &context, bias, |_| t), &name);
                }
            }
        }
    }
}

#[test]
fn rows_see_what_stands_before_them() {
    let mut scratch = Vec::new();
    for isa in Isa::available() {
        for d in DIMS {
            for (rows, group, past) in [(1, 1, 0), (5, 1, 0), (70, 1, 3), (33, 3, 100), (9, 4, 63), (3, 35, 2)] {
                let t = past + rows + 2;
                let (q, keys, values) = (random(rows * group * d, 1), random(t * d, 2), random(t * d, 3));
                let context =
                    Context { keys: &keys, values: &values, d, scale: 0.3, softcap: None, window: None, sinks: None };
                let mut out = vec![f32::NAN; q.len()];
                attend_rows(isa, &q, group, &context, past + 1, &mut out, &mut scratch);
                let name = format!("{} d {d} rows {rows} group {group} past {past}", isa.name());
                check(&out, reference(&q, &context, None, |i| past + 1 + i / group), &name);
            }
        }
    }
}

#[test]
fn parts_merge_to_the_whole() {
    let mut scratch = Vec::new();
    let (d, group, t) = (24, 5, 150);
    let (q, keys, values) = (random(group * d, 1), random(t * d, 2), random(t * d, 3));
    let context = Context { keys: &keys, values: &values, d, scale: 0.5, softcap: None, window: None, sinks: None };
    for isa in Isa::available() {
        for cuts in [vec![0, 150], vec![0, 1, 150], vec![0, 0, 64, 149, 150], vec![0, 90, 150, 150]] {
            let (mut out, mut partials) = (vec![0.0; group * d], vec![Partial::EMPTY; group]);
            for cut in cuts.windows(2) {
                let range = cut[0] * d..cut[1] * d;
                let part = Context { keys: &keys[range.clone()], values: &values[range], ..context };
                let (mut part_out, mut part_partials) = (vec![f32::NAN; group * d], vec![Partial::EMPTY; group]);
                attend_part(isa, &q, &part, None, &mut part_out, &mut part_partials, &mut scratch);
                merge(isa, &mut out, &mut partials, &part_out, &part_partials, d);
            }
            finish(isa, &mut out, &partials, d);
            check(&out, reference(&q, &context, None, |_| t), &format!("{} {cuts:?}", isa.name()));
        }
    }
}

#[test]
fn extremes() {
    let mut scratch = Vec::new();
    let (d, t) = (20, 130);
    let (q, keys, values) = (random(d, 1), random(t * d, 2), random(t * d, 3));
    for isa in Isa::available() {
        let mut run = |scale: f32, bias: &[f32], t: usize| {
            let mut out = vec![f32::NAN; d];
            let (keys, values) = (&keys[..t * d], &values[..t * d]);
            attend(isa, &q, keys, values, d, scale, Some(bias), &mut out, &mut scratch);
            out
        };
        // Nothing to see.
        assert_eq!(run(0.1, &[], 0), vec![0.0; d]);
        assert_eq!(run(0.1, &[f32::NEG_INFINITY; 130], t), vec![0.0; d]);
        // One position left by the mask, in the last tile: its value comes out as it is.
        let mut mask = [f32::NEG_INFINITY; 130];
        mask[129] = 0.0;
        assert_eq!(run(0.1, &mask, t), &values[129 * d..]);
        // Scores in the thousands, of either sign of the scale, do not overflow.
        for scale in [1e3, -1e3] {
            assert!(run(scale, &[0.0; 130], t).iter().all(|y| y.is_finite()), "{} {scale}", isa.name());
        }
        mask[7] = f32::NAN;
        assert!(run(0.1, &mask, t).iter().all(|y| y.is_nan()));
    }
}

/// Windows, caps and sinks against plain sums in fp64, for one row and for several.
#[test]
fn windows_caps_and_sinks_match_f64() {
    let mut scratch = Vec::new();
    for isa in Isa::available() {
        for (d, group, rows, first, window) in
            [(20, 1, 1, 150, 64), (32, 3, 9, 130, 65), (24, 2, 40, 1, 7), (64, 4, 16, 70, 1), (16, 40, 2, 80, 70)]
        {
            let t = first + rows - 1;
            let (q, sinks) = (random(rows * group * d, 1), random(group, 9));
            let (keys, values) = (random(t * d, 2), random(t * d, 3));
            let (scale, cap) = (1.0 / (d as f32).sqrt(), 0.7);
            let context = Context {
                keys: &keys,
                values: &values,
                d,
                scale,
                softcap: Some(cap),
                window: Some(window),
                sinks: Some(&sinks),
            };
            let mut out = vec![f32::NAN; q.len()];
            attend_rows(isa, &q, group, &context, first, &mut out, &mut scratch);
            for (i, (q, out)) in q.chunks(d).zip(out.chunks(d)).enumerate() {
                let seen = first + i / group;
                let visible = seen.saturating_sub(window)..seen;
                let score = |j: usize| {
                    let dot: f64 = q.iter().zip(&keys[j * d..]).map(|(q, k)| *q as f64 * *k as f64).sum();
                    cap as f64 * (dot * scale as f64 / cap as f64).tanh()
                };
                let weights: Vec<f64> = visible.clone().map(|j| score(j).exp()).collect();
                let sum = weights.iter().sum::<f64>() + (sinks[i % group] as f64).exp();
                for (e, out) in out.iter().enumerate() {
                    let terms = weights.iter().zip(visible.clone()).map(|(w, j)| w * values[j * d + e] as f64);
                    let expected = terms.sum::<f64>() / sum;
                    // Scores below 1 err by d/2 roundings and 2e-7 of the cap; weights by the same; values are below 1.
                    let allowed = 2.0 * (d as f64 / 2.0 * 6e-8 + 2e-7) + 4e-7 + (t as f64 / 8.0 + 8.0) * 6e-8;
                    assert!((*out as f64 - expected).abs() <= allowed, "{} query {i} [{e}]: {out}", isa.name());
                }
            }
        }
    }
}
