//! Attention of one query, and of many, against fp64.

use half::f16;
use quantbench::kernels::cuda::arena::{Arena, Layout};
use quantbench::kernels::cuda::attend::{Bias, Heads, RowsAttention, RowsFeatures};
use quantbench::kernels::cuda::attention::{Attention, Features, KvSplit};
use quantbench::kernels::cuda::launch::MemoryPlanner;
use quantbench::kernels::cuda::place::{DevicePlace, RowPlaces};
use quantbench::kernels::cuda::program::ProgramBuilder;
use quantbench::quant::dense;

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::products::{Numbers, rounding};

#[derive(Debug, Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    d: usize,
    rotary: usize,
    /// Whether the query's own key and value go into the cache first; else the cache is an encoder's.
    appends: bool,
    has_bias: bool,
    capacity: usize,
    multiprocessors: usize,
    /// Keys that a query sees, or 0 for all.
    window: usize,
    /// 0 for none.
    softcap: f32,
    has_sinks: bool,
    norms: Norms,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Norms {
    None,
    OfHeads,
    OfAll,
}

const EPSILON: f32 = 1e-6;

const CASES: &[Case] = &[
    // Query heads of a key/value head: one, some, and all of them.
    case(4, 4, 64, 64, 100, 1),
    case(6, 2, 64, 64, 300, 132),
    case(8, 1, 256, 256, 200, 132),
    case(9, 3, 80, 32, 333, 7),
    case(10, 2, 96, 96, 150, 132),
    // No rotation, heads that are no whole 16-byte words, and a head of one unit.
    case(2, 2, 80, 0, 130, 132),
    case(3, 1, 20, 10, 200, 132),
    case(5, 5, 7, 0, 70, 132),
    case(2, 1, 8, 8, 129, 132),
    Case { has_bias: true, ..case(6, 6, 64, 0, 200, 132) },
    Case { has_bias: true, ..case(4, 2, 40, 0, 90, 1) },
    Case { appends: false, ..case(6, 6, 64, 0, 200, 132) },
    Case { appends: false, ..case(4, 2, 24, 0, 100, 3) },
    // More splits than the span has positions.
    case(1, 1, 8, 0, 4500, 132),
    // Features, each alone and together: windows within a unit and over some, and one that no sequence outgrows.
    Case { window: 16, ..case(4, 2, 64, 64, 100, 1) },
    Case { window: 130, ..case(4, 1, 40, 40, 300, 132) },
    Case { window: 500, ..case(2, 2, 128, 64, 200, 7) },
    Case { softcap: 2.0, ..case(4, 2, 64, 64, 200, 132) },
    Case { has_sinks: true, ..case(8, 1, 64, 64, 300, 132) },
    Case { has_sinks: true, appends: false, ..case(4, 2, 24, 0, 100, 3) },
    Case { norms: Norms::OfHeads, ..case(6, 2, 20, 20, 150, 132) },
    Case { norms: Norms::OfAll, ..case(6, 2, 36, 18, 150, 5) },
    Case { window: 70, softcap: 3.0, has_sinks: true, norms: Norms::OfHeads, ..case(4, 2, 256, 256, 300, 132) },
];

const fn case(heads: usize, kv_heads: usize, d: usize, rotary: usize, capacity: usize, multiprocessors: usize) -> Case {
    Case {
        heads,
        kv_heads,
        d,
        rotary,
        appends: true,
        has_bias: false,
        capacity,
        multiprocessors,
        window: 0,
        softcap: 0.0,
        has_sinks: false,
        norms: Norms::None,
    }
}

pub fn attention_of_one_query() {
    let mut numbers = Numbers(0xa77e);
    for (turn, case) in CASES.iter().enumerate() {
        let (chip, memory) = (CHIPS[turn % CHIPS.len()], Memory::default());
        let properties = Host { chip, memory: &memory }.properties(case.multiprocessors);
        let keys = if case.window > 0 { case.window.min(case.capacity) } else { case.capacity };
        let split = match case.is_featured() {
            true => KvSplit::featured(keys, case.heads, case.d_pad(), properties),
            false => KvSplit::new(keys, case.kv_heads, case.heads / case.kv_heads, case.d_pad(), properties),
        };
        let mut lengths = vec![1, 2, split.span - 1, split.span, split.span + 1, case.capacity / 2 + 3, case.capacity];
        lengths.extend([case.window, case.window + 1]);
        lengths.retain(|length| (1..=case.capacity).contains(length));
        for length in lengths {
            attend(*case, split, length, chip, &mut numbers);
        }
    }
}

/// A call's rows, in the middle of a cache or over all of it: heads of every kernel, more rows and more keys than a tile has.
pub fn attention_of_many_rows() {
    let mut numbers = Numbers(0xf3e5);
    for (turn, (case, rows, position, is_causal)) in [
        (case(4, 2, 64, 0, 60, 1), 5, 0, true),
        (case(3, 3, 80, 0, 90, 1), 8, 70, true),
        (case(2, 2, 72, 0, 90, 1), 66, 0, false),
        (case(8, 1, 256, 0, 40, 1), 3, 9, true),
        (case(2, 1, 256, 0, 90, 1), 70, 10, true),
        (case(2, 1, 128, 0, 140, 1), 130, 5, true),
        (Case { has_bias: true, ..case(2, 1, 20, 0, 50, 1) }, 7, 0, false),
        (Case { has_bias: true, ..case(6, 6, 64, 0, 33, 1) }, 1, 30, true),
        (Case { has_bias: true, ..case(2, 2, 64, 0, 150, 1) }, 100, 40, true),
        (case(5, 5, 7, 0, 300, 1), 2, 0, false),
        (case(1, 1, 9, 0, 200, 1), 80, 0, true),
        // Few rows over so many keys that blocks share them: two splits of 64-key tiles, and the last of some 16-key tiles has none for a row.
        (case(2, 1, 64, 0, 1110, 132), 3, 1100, true),
        (case(1, 1, 200, 0, 2100, 132), 20, 2060, true),
        // Windows that begin in the middle of a tile and of a warp's rows, in calls of several tiles of rows.
        (Case { window: 12, ..case(4, 2, 18, 0, 60, 1) }, 40, 0, true),
        (Case { window: 70, softcap: 2.0, ..case(2, 1, 80, 0, 300, 1) }, 150, 100, true),
        (Case { window: 33, has_sinks: true, ..case(2, 1, 64, 0, 200, 1) }, 90, 71, true),
        (Case { softcap: 3.0, ..case(2, 2, 128, 0, 60, 1) }, 9, 40, true),
        (Case { window: 20, softcap: 2.5, ..case(2, 1, 256, 0, 100, 1) }, 70, 10, true),
        (Case { has_sinks: true, ..case(2, 1, 64, 0, 1110, 132) }, 3, 1100, true),
        (Case { window: 900, has_sinks: true, ..case(2, 1, 64, 0, 2110, 132) }, 3, 2100, true),
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case { appends: false, ..case };
        let total = if is_causal { position + rows } else { case.capacity - 3 };
        // Every other case is of two sequences, the second of which is shorter: in causal calls it stands earlier, in others its encoder had fewer rows.
        let sequences = 1 + turn % 2;
        let shorter = |of: usize, by: usize| [of, of - by.min(of)];
        let positions = if is_causal { shorter(position, position / 3) } else { [position; 2] };
        let totals = if is_causal { positions.map(|position| position + rows) } else { shorter(total, 2) };
        let mut caches: Vec<Cache> = totals[..sequences].iter().map(|total| case.cache(*total, &mut numbers)).collect();
        let q: Vec<f16> =
            (0..sequences * rows * case.heads * case.d).map(|_| f16::from_f32(numbers.normal())).collect();
        let memory = Memory::default();
        let host = Host { chip: CHIPS[turn % CHIPS.len()], memory: &memory };
        let (heads, kv_heads, d, d_pad, capacity) = (case.heads, case.kv_heads, case.d, case.d_pad(), case.capacity);
        let scale = 1.0 / (d as f32).sqrt();
        let bias = match case.has_bias {
            true => Bias { address: memory.hold(&caches[0].bias), reach: case.reach() },
            false => Bias::default(),
        };
        let sinks = if case.has_sinks { memory.hold(&caches[0].sinks) } else { 0 };
        let held =
            |of: fn(&Cache) -> &Vec<f16>| memory.hold(&caches.iter().map(of).cloned().collect::<Vec<_>>().concat());
        let places =
            positions.iter().zip(totals).map(|(position, total)| DevicePlace::new(*position as i32, total as i32, 0));
        let places: Vec<DevicePlace> = places.take(sequences).collect();
        let (q_at, out) = (memory.hold(&q), memory.room::<f16>(q.len()));
        let (keys, values) = (held(|cache| &cache.keys), held(|cache| &cache.values));
        let heads_at = Heads { heads, kv_heads, d, d_pad, capacity };
        let places_at = if sequences > 1 { memory.hold(&places) } else { 0 };
        let call = RowsAttention {
            places: RowPlaces { sequences, rows, position, places: places_at },
            heads: heads_at,
            q: q_at,
            out,
            keys,
            values,
            total,
            over_encoder: !is_causal,
            scale,
            is_causal,
            bias,
            features: RowsFeatures { window: case.window as i32, softcap: case.softcap, sinks },
        };
        // SAFETY: the planner launches nothing.
        let layout =
            Layout::of(|arena| unsafe { call.run(&MemoryPlanner, arena, case.multiprocessors) }).expect("a plan");
        let arena = Arena::at(memory.room::<u8>(layout.bytes().max(1)), &layout);
        // SAFETY: every address is of `memory`, and as large as the shapes say.
        unsafe { call.run(&host, &arena, case.multiprocessors) }.unwrap_or_else(|error| panic!("{case:?}: {error}"));
        let made: Vec<f16> = memory.read(out, q.len());
        let (first_bias, first_sinks) = (caches[0].bias.clone(), caches[0].sinks.clone());
        for (at_row, row) in (0..sequences).flat_map(|_| 0..rows).enumerate() {
            let (sequence, cache) = (at_row / rows, &mut caches[at_row / rows]);
            (cache.bias, cache.sinks) = (first_bias.clone(), first_sinks.clone());
            let length = if is_causal { positions[sequence] + row + 1 } else { totals[sequence] };
            cache.q.copy_from_slice(&q[at_row * heads * d..][..heads * d]);
            for head in 0..heads {
                let (y, error) = expected(case, cache, head, length, positions[sequence] + row, scale);
                let rounded = rounded_weights(length, &cache.values);
                for (at, (y, made)) in y.iter().zip(&made[(at_row * heads + head) * d..]).enumerate() {
                    let allowed = 1.01 * (error + rounded + f64::from(rounding(*y as f32)));
                    let off = (made.to_f64() - y).abs();
                    let place = format!("{case:?} [{sequence}, {row}, {head}, {at}]");
                    assert!(off <= allowed, "{place}: {made} for {y} within {allowed:e}");
                }
            }
        }
    }
}

/// What a launch reads.
struct Cache {
    q: Vec<f16>,
    k: Vec<f16>,
    v: Vec<f16>,
    /// `[g, capacity, d_pad]`, NaN where the query must not read.
    keys: Vec<f16>,
    values: Vec<f16>,
    /// Cosine and sine `[capacity, rotary / 2, 2]`.
    angles: Vec<f32>,
    /// `[h, 2 · reach + 1]`
    bias: Vec<f32>,
    /// `[h]`
    sinks: Vec<f32>,
    /// Weights of the norms of all heads' queries and keys.
    norms: [Vec<f32>; 2],
}

impl Case {
    fn d_pad(self) -> usize {
        self.d.next_multiple_of(8)
    }

    fn reach(self) -> usize {
        if self.has_bias { self.capacity } else { 0 }
    }

    fn cache(self, length: usize, numbers: &mut Numbers) -> Cache {
        let mut halves = |count: usize| -> Vec<f16> { (0..count).map(|_| f16::from_f32(numbers.normal())).collect() };
        let (q, k, v) = (halves(self.heads * self.d), halves(self.kv_heads * self.d), halves(self.kv_heads * self.d));
        let held = if self.appends { length - 1 } else { length };
        let mut cache = || {
            let mut all = vec![f16::ZERO; self.kv_heads * self.capacity * self.d_pad()];
            for (row, out) in all.chunks_exact_mut(self.d_pad()).enumerate() {
                let is_held = row % self.capacity < held;
                let values = if is_held { halves(self.d) } else { vec![f16::NAN; self.d] };
                out[..self.d].copy_from_slice(&values);
            }
            all
        };
        let (keys, values) = (cache(), cache());
        let half = self.rotary / 2;
        let angle = |at: usize| (at / half) as f32 * 0.7f32.powi((at % half) as i32);
        let angles = (0..self.capacity * half).flat_map(|at| [angle(at).cos(), angle(at).sin()]).collect();
        let bias = (0..if self.has_bias { self.heads * (2 * self.reach() + 1) } else { 0 })
            .map(|_| numbers.normal())
            .collect();
        let sinks = (0..self.heads).map(|_| numbers.normal()).collect();
        let norms = [self.heads, self.kv_heads]
            .map(|heads| (0..heads * self.d).map(|_| 1.0 + 0.3 * numbers.normal()).collect());
        Cache { q, k, v, keys, values, angles, bias, sinks, norms }
    }

    fn is_featured(self) -> bool {
        self.window > 0 || self.softcap > 0.0 || self.has_sinks || self.norms != Norms::None
    }

    /// Queries (0) or keys (1) as they are rotated, not rounded.
    fn normed(self, all: &[f16], which: usize, cache: &Cache) -> Vec<f32> {
        let part = match self.norms {
            Norms::None => return all.iter().map(|value| value.to_f32()).collect(),
            Norms::OfHeads => self.d,
            Norms::OfAll => all.len(),
        };
        let weights = cache.norms[which][..part].iter().cycle();
        let normed = all.chunks_exact(part).flat_map(|values| {
            let squares: f64 = values.iter().map(|value| value.to_f64().powi(2)).sum();
            let factor = 1.0 / (squares / part as f64 + f64::from(EPSILON)).sqrt();
            values.iter().map(move |value| value.to_f64() * factor)
        });
        normed.zip(weights).map(|(value, weight)| (value * f64::from(*weight)) as f32).collect()
    }
}

/// One head's elements rotated by the angles of `position`: the kernel's own fp32 expression, so that it gives the same bits.
pub fn rotated(head: &[f16], rotary: usize, angles: &[f32], position: usize) -> Vec<f16> {
    turned(&head.iter().map(|value| value.to_f32()).collect::<Vec<_>>(), rotary, angles, position)
}

fn turned(head: &[f32], rotary: usize, angles: &[f32], position: usize) -> Vec<f16> {
    let half = rotary / 2;
    let of = |at: usize| {
        let value = head[at];
        if at >= rotary {
            return f16::from_f32(value);
        }
        let (pair, other) = if at < half { (at, at + half) } else { (at - half, at - half) };
        let (cos, sin) = (angles[2 * (position * half + pair)], angles[2 * (position * half + pair) + 1]);
        let turned = head[other] * sin;
        f16::from_f32(if at < half { value * cos - turned } else { value * cos + turned })
    };
    (0..head.len()).map(of).collect()
}

fn attend(case: Case, split: KvSplit, length: usize, chip: u32, numbers: &mut Numbers) {
    let what = format!("{case:?} at {length} of {split:?}");
    let Case { heads, kv_heads, d, rotary, capacity, .. } = case;
    let mut cache = case.cache(length, numbers);
    let (position, group) = (if case.appends { length - 1 } else { 0 }, heads / kv_heads);
    let memory = Memory::default();
    let optional = |is_there: bool, address: u64| if is_there { address } else { 0 };
    let operands = Attention {
        q: memory.hold(&tagged_halves(&cache.q)),
        k: optional(case.appends, memory.hold(&tagged_halves(&cache.k))),
        v: optional(case.appends, memory.hold(&tagged_halves(&cache.v))),
        keys: memory.hold(&cache.keys),
        values: memory.hold(&cache.values),
        out: memory.room::<u32>(heads * d),
        angles: optional(rotary > 0, memory.hold(&cache.angles)),
        bias: optional(case.has_bias, memory.hold(&cache.bias)),
        position: optional(case.appends, memory.hold(&[position as i32])),
        length: optional(!case.appends, memory.hold(&[length as i32])),
        partials: memory.room::<f32>(split.partials(heads, d)),
        arrived: memory.hold(&vec![0; heads]),
        scale: 1.0 / (d as f32).sqrt(),
        kv_heads: kv_heads as i32,
        group: group as i32,
        d: d as i32,
        d_pad: case.d_pad() as i32,
        rotary: rotary as i32,
        reach: case.reach() as i32,
        capacity: capacity as i32,
        span: split.span as i32,
        splits: split.splits as i32,
        features: Features {
            window: case.window as i32,
            softcap: case.softcap,
            sinks: optional(case.has_sinks, memory.hold(&cache.sinks)),
            q_norm: optional(case.norms != Norms::None, memory.hold(&cache.norms[0])),
            k_norm: optional(case.norms != Norms::None, memory.hold(&cache.norms[1])),
            epsilon: if case.norms == Norms::None { 0.0 } else { EPSILON },
            norms_all_heads: i32::from(case.norms == Norms::OfAll),
        },
        ..Attention::default()
    };
    let host = Host { chip, memory: &memory };
    let mut program = ProgramBuilder::new(host.properties(case.multiprocessors));
    program.attend(operands).expect("an instruction");
    let planned = program.plan_on(&dense::cuda::STEP, 0).expect("a plan");
    // SAFETY: every address in it is of `memory`.
    unsafe { planned.launch_on(&host) }.unwrap_or_else(|error| panic!("{what}: {error}"));

    if case.appends {
        let keys: Vec<f16> = memory.read(operands.keys, cache.keys.len());
        for head in 0..kv_heads {
            let at = (head * capacity + position) * case.d_pad();
            let normed = case.normed(&cache.k, 1, &cache);
            let own = turned(&normed[head * d..][..d], rotary, &cache.angles, position);
            // Norms are summed in another order, which may round an element to its neighbour.
            let is_near = |(made, own): (&f16, &f16)| {
                (made.to_f32() - own.to_f32()).abs() <= 2.0 * rounding(own.to_f32()) && case.norms != Norms::None
            };
            let made = &keys[at..at + d];
            let are_near = made.iter().zip(&own).all(is_near);
            cache.keys[at..at + d].copy_from_slice(if are_near { made } else { &own });
            cache.values[at..at + d].copy_from_slice(&cache.v[head * d..][..d]);
        }
    }
    let bits = |values: &[f16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&memory.read(operands.keys, cache.keys.len())), bits(&cache.keys), "{what}: keys");
    assert_eq!(bits(&memory.read(operands.values, cache.values.len())), bits(&cache.values), "{what}: values");
    assert!(memory.read::<i32>(operands.arrived, heads).iter().all(|count| *count == 0), "{what}");
    let out: Vec<u32> = memory.read(operands.out, heads * d);
    let out: Vec<f16> = out.iter().map(|word| f16::from_bits(*word as u16)).collect();
    for head in 0..heads {
        let (y, error) = expected(case, &cache, head, length, position, operands.scale);
        // Tensor cores take weights in fp16.
        let rounded =
            if case.d_pad() <= 64 && !case.is_featured() { rounded_weights(length, &cache.values) } else { 0.0 };
        for (at, (y, out)) in y.iter().zip(&out[head * d..]).enumerate() {
            let (off, allowed) = ((out.to_f64() - y).abs(), 1.01 * (error + rounded + f64::from(rounding(*y as f32))));
            assert!(off <= allowed, "{what}: [{head}, {at}] is {out}, not {y}: off by {off:e}, allowed {allowed:e}");
        }
    }
}

/// What rounding weights to fp16 moves an output by: each, relative to the largest so far, by half a unit in its last place or half the smallest
/// subnormal. Their sum, which is not rounded, is at least 1.
fn rounded_weights(length: usize, values: &[f16]) -> f64 {
    let largest = values.iter().map(|v| v.to_f64().abs()).filter(|v| !v.is_nan()).fold(0.0, f64::max);
    (2f64.powi(-11) + length as f64 * 2f64.powi(-25)) * largest
}

/// As instructions before attention leave them; here none is in the same launch.
fn tagged_halves(values: &[f16]) -> Vec<u32> {
    values.iter().map(|value| 7 << 16 | u32::from(value.to_bits())).collect()
}

/// A head's output and how far fp32 may be off. A score is a sum of d products, off by (d + 8) · 2⁻²⁴ of their magnitudes; that
/// moves a weight, relative to the largest, by twice as much, and its power adds (4 + |exponent|) units of 2⁻²³. Sums of
/// weights and of weighted values add (length + 16) · 2⁻²⁴ each. All are parts of the mean magnitude of the values.
fn expected(case: Case, cache: &Cache, head: usize, length: usize, position: usize, scale: f32) -> (Vec<f64>, f64) {
    let (d, row) = (case.d, |key: usize| (head / (case.heads / case.kv_heads) * case.capacity + key) * case.d_pad());
    let q = turned(&case.normed(&cache.q, 0, cache)[head * d..][..d], case.rotary, &cache.angles, position);
    let first = if case.window > 0 { length.saturating_sub(case.window) } else { 0 };
    let mut score_error = 0.0f64;
    let scores: Vec<f64> = (first..length)
        .map(|key| {
            let products =
                q.iter().zip(&cache.keys[row(key)..]).map(|(q, k)| f64::from(q.to_f32() * scale) * k.to_f64());
            let (sum, magnitude) = products.fold((0.0, 0.0), |(sum, magnitude), p| (sum + p, magnitude + p.abs()));
            let bias = match case.has_bias {
                true => cache.bias[head * (2 * case.reach() + 1) + case.reach() + key - position],
                false => 0.0,
            };
            let score = sum + f64::from(bias);
            score_error = score_error.max((d as f64 + 8.0) * 2f64.powi(-24) * magnitude + 2f64.powi(-23) * score.abs());
            if case.norms != Norms::None {
                // An element of the query may have been rounded to its neighbour, too.
                score_error = score_error.max(2f64.powi(-10) * magnitude);
            }
            if case.softcap == 0.0 {
                return score;
            }
            // A tanh adds some units in the last place of the cap; its slope is 1 at most.
            score_error += 2f64.powi(-21) * f64::from(case.softcap);
            f64::from(case.softcap) * (score / f64::from(case.softcap)).tanh()
        })
        .collect();
    let sink = case.has_sinks.then(|| f64::from(cache.sinks[head]));
    let all = || scores.iter().copied().chain(sink);
    let largest = all().fold(f64::NEG_INFINITY, f64::max);
    let smallest = all().fold(f64::INFINITY, f64::min);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = all().map(|score| (score - largest).exp()).sum();
    let sum = |of: &dyn Fn(f64) -> f64, at: usize| -> f64 {
        let weighed = |(key, weight): (usize, &f64)| weight / total * of(cache.values[row(first + key) + at].to_f64());
        weights.iter().enumerate().map(weighed).sum()
    };
    let y: Vec<f64> = (0..d).map(|at| sum(&|value| value, at)).collect();
    let magnitude = (0..d).map(|at| sum(&f64::abs, at)).fold(0.0, f64::max);
    let of_weight = 2.0 * score_error + (4.0 + largest - smallest) * 2f64.powi(-23);
    (y, 2.0 * (of_weight + (length as f64 + 16.0) * 2f64.powi(-24)) * magnitude)
}
