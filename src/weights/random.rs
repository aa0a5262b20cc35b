//! Random weights of a true shape: seeded, scaled so that activations stay finite, with planted outlier channels.
//!
//! A value depends on the seed, the tensor's name, its row and its column alone, so any chunking, thread order and
//! machine gives the same weights. Only integer arithmetic and correctly rounded operations make them.
//!
//! A router of independent weights sends most tokens to few experts: what tokens have in common decides, as outlier channels and what attention
//! averages over a context. A trained router is balanced by its loss. So here a router reads no outlier channel, its rows have one length, and
//! embeddings are large beside what the blocks add to them: each token's own share decides (`routers`).
//!
//! Beside the planted channels LLM.int8 should meet about as few outliers as in a trained model, where what a gate multiplies is small: SmolLM2-135M has 2.7
//! outlier columns a call over 512 tokens. So what reads a norm weighs its outlier channels by as little as they are larger, and makes results
//! of half the size (`Kind::BehindNorm`).

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use half::f16;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::spec::{MatrixSpec, Role, VectorKind, VectorSpec};
use super::{Source, SourceInfo, SourceKind};

/// Values of the table that all weights are drawn from: 16 KiB of fp16, half a first-level cache.
const TABLE: usize = 1 << 13;

/// What an outlier channel of a norm is multiplied by. A normalised activation is near N(0, 1), so |x| ≥ 6 for
/// P(|x| ≥ 0.3) = 76 % of the tokens: LLM.int8 meets about the planted number of outlier columns in each call.
const OUTLIER_SCALE: f32 = 20.0;

/// Standard deviation of what a matrix behind a norm makes of activations near N(0, 1). The product of two such values, as
/// gates make it, is beyond 6 with a probability of 6 · 10⁻¹²; that of two values near N(0, 1) with 7 · 10⁻⁴, so that three of ten columns of 512 tokens
/// would have an outlier.
const BEHIND_NORM_STD: f64 = 0.5;

/// Names how values are made of a seed: other weights have another name.
const RECIPE: &str = "recipe:2";

/// Spread of norm weights around 1, and of biases around 0.
const VECTOR_STD: f64 = 0.02;

/// A source that makes its tensors up.
pub struct Random {
    info: SourceInfo,
    seed: u64,
    outlier_channels: usize,
    tensors: HashMap<String, Tensor>,
}

struct Tensor {
    /// `[len]` for a vector.
    shape: Vec<usize>,
    /// Hash of seed and name.
    key: u64,
    kind: Kind,
}

enum Kind {
    /// Draws from a table that carries the standard deviation 1 / √k: sums over k inputs keep their size.
    Matrix(Arc<[f16; TABLE]>),
    /// By [`BEHIND_NORM_STD`], and outlier channels, which are these, once more by 1 / [`OUTLIER_SCALE`].
    BehindNorm(Arc<[f16; TABLE]>, Arc<[usize]>),
    /// As `Matrix`, with rows of length 1 and nothing in outlier channels.
    Router(Arc<[f16; TABLE]>),
    Vector(VectorKind, Arc<[f16; TABLE]>),
}

impl Random {
    pub fn new(seed: u64, outlier_channels: usize, matrices: &[MatrixSpec], vectors: &[VectorSpec]) -> Self {
        let normal = normal_table();
        let mut tables = HashMap::new();
        let mut tensors = HashMap::new();
        // Norms of heads have other widths than matrices have inputs.
        let norms: HashMap<usize, Arc<[usize]>> = vectors
            .iter()
            .filter(|spec| spec.kind != VectorKind::Bias)
            .map(|spec| (spec.len, outliers(seed, outlier_channels, spec.len).into()))
            .collect();
        let key = |name: &str| xxh3_64_with_seed(name.as_bytes(), seed);
        let routers = routers(matrices);
        // Twice what as many blocks add, each of which adds about 1 to every channel's variance.
        let embedding_std = 2.0 * (routers.len() as f64).sqrt();
        let embedding = (!routers.is_empty()).then(|| Arc::new(scaled(&normal, embedding_std)));
        for spec in matrices {
            let is_router = routers.contains(spec.name.as_str());
            let reads_rows = ![Role::Embedding, Role::Patches].contains(&spec.role) && !is_router;
            let behind = norms.get(&spec.k).filter(|_| reads_rows);
            let std = if behind.is_some() { BEHIND_NORM_STD } else { 1.0 };
            let table = tables
                .entry((spec.k, behind.is_some()))
                .or_insert_with(|| Arc::new(scaled(&normal, std / (spec.k.max(1) as f64).sqrt())))
                .clone();
            let kind = match (&embedding, behind) {
                (Some(embedding), _) if spec.role == Role::Embedding => Kind::Matrix(embedding.clone()),
                _ if is_router => Kind::Router(table),
                (_, Some(channels)) => Kind::BehindNorm(table, channels.clone()),
                (_, None) => Kind::Matrix(table),
            };
            tensors.insert(spec.name.clone(), Tensor { shape: vec![spec.n, spec.k], key: key(&spec.name), kind });
        }
        let table = Arc::new(scaled(&normal, VECTOR_STD));
        for spec in vectors {
            let kind = Kind::Vector(spec.kind, table.clone());
            tensors.insert(spec.name.clone(), Tensor { shape: vec![spec.len], key: key(&spec.name), kind });
        }
        let info = SourceInfo {
            source: SourceKind::Random,
            dtype: "f16".to_owned(),
            seed: Some(seed),
            hash: format!("seed:{seed}, {RECIPE}"),
        };
        Self { info, seed, outlier_channels, tensors }
    }

    /// A row of a router.
    fn router_row(&self, key: u64, row: usize, table: &[f16; TABLE], out: &mut [f16]) {
        fill_row(key, row as u64, table, out);
        for channel in outliers(self.seed, self.outlier_channels, out.len()) {
            out[channel] = f16::ZERO;
        }
        let square: f64 = out.iter().map(|value| value.to_f64() * value.to_f64()).sum();
        let scale = if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 };
        out.iter_mut().for_each(|value| *value = f16::from_f32((value.to_f64() * scale) as f32));
    }

    fn vector(&self, tensor: &Tensor, kind: VectorKind, table: &[f16; TABLE], out: &mut [f16]) {
        fill_row(tensor.key, 0, table, out);
        let centre = match kind {
            VectorKind::Bias => return,
            VectorKind::NormWeight => 0.0,
            // The norm itself adds the 1.
            VectorKind::NormOffset => 1.0,
        };
        for value in out.iter_mut() {
            *value = f16::from_f32(1.0 - centre + value.to_f32());
        }
        for channel in outliers(self.seed, self.outlier_channels, out.len()) {
            out[channel] = f16::from_f32(OUTLIER_SCALE * (out[channel].to_f32() + centre) - centre);
        }
    }
}

impl Source for Random {
    fn info(&self) -> &SourceInfo {
        &self.info
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|tensor| tensor.shape.clone())
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> Result<usize> {
        let tensor = self.tensors.get(name).ok_or_else(|| anyhow!("no random tensor is named `{name}`"))?;
        let n = tensor.shape[0];
        let k = tensor.shape.get(1).copied().unwrap_or(1);
        ensure!(rows.start <= rows.end && rows.end <= n, "rows {rows:?} of `{name}`, which has {n}");
        ensure!(out.len() == rows.len() * k, "{} values asked of {} in `{name}`", out.len(), rows.len() * k);
        match &tensor.kind {
            Kind::Matrix(_) | Kind::BehindNorm(..) | Kind::Router(_) if k == 0 => {}
            Kind::BehindNorm(table, channels) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(k)) {
                    fill_row(tensor.key, row as u64, table, out);
                    for channel in channels.iter() {
                        out[*channel] = f16::from_f32(out[*channel].to_f32() / OUTLIER_SCALE);
                    }
                }
            }
            Kind::Router(table) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(k)) {
                    self.router_row(tensor.key, row, table, out);
                }
            }
            Kind::Matrix(table) => {
                for (row, out) in rows.zip(out.chunks_exact_mut(k)) {
                    fill_row(tensor.key, row as u64, table, out);
                }
            }
            Kind::Vector(kind, table) => {
                let mut whole = vec![f16::ZERO; n];
                self.vector(tensor, *kind, table, &mut whole);
                out.copy_from_slice(&whole[rows]);
            }
        }
        Ok(0)
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |tensor| 2 * tensor.shape.iter().product::<usize>() as u64)
    }
}

/// The channels that every norm of this width scales: the same in all layers, as in trained models.
fn outliers(seed: u64, count: usize, len: usize) -> Vec<usize> {
    let mut channels = Vec::new();
    let key = xxh3_64_with_seed(b"outlier channels", seed);
    let mut draw = 0;
    while channels.len() < count.min(len) {
        let channel = (mix(key.wrapping_add(draw)) % len as u64) as usize;
        if !channels.contains(&channel) {
            channels.push(channel);
        }
        draw += 1;
    }
    channels
}

/// Names of the routers: matrices of a module that has experts, with a row for each. Whatever role a user gave them.
fn routers(matrices: &[MatrixSpec]) -> HashSet<&str> {
    let mut experts: HashMap<&str, HashSet<&str>> = HashMap::new();
    for (module, expert) in matrices.iter().filter_map(|spec| spec.name.split_once(".experts.")) {
        experts.entry(module).or_default().insert(expert.split('.').next().unwrap_or_default());
    }
    let is_router = |spec: &&MatrixSpec| {
        let module = spec.name.trim_end_matches(".weight").rsplit_once('.').map(|(module, _)| module);
        module.and_then(|module| experts.get(module)).is_some_and(|experts| experts.len() == spec.n)
    };
    matrices.iter().filter(is_router).map(|spec| spec.name.as_str()).collect()
}

/// A row's values: four draws from each 64-bit hash of a counter.
fn fill_row(key: u64, row: u64, table: &[f16; TABLE], out: &mut [f16]) {
    const INDEX: u64 = TABLE as u64 - 1;
    let mut counter = mix(key ^ mix(row));
    let mut next = || {
        counter = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(counter)
    };
    let mut quads = out.chunks_exact_mut(4);
    for quad in &mut quads {
        let bits = next();
        quad[0] = table[(bits & INDEX) as usize];
        quad[1] = table[(bits >> 16 & INDEX) as usize];
        quad[2] = table[(bits >> 32 & INDEX) as usize];
        quad[3] = table[(bits >> 48 & INDEX) as usize];
    }
    let bits = next();
    for (i, value) in quads.into_remainder().iter_mut().enumerate() {
        *value = table[(bits >> (16 * i) & INDEX) as usize];
    }
}

/// The finaliser of splitmix64: every input bit reaches every output bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Near-normal values of mean 0 and variance 1: sums of eight 16-bit uniforms, each with its negative. Logarithms and
/// cosines would differ between machines in their last bits; integer sums and one square root do not.
fn normal_table() -> Vec<f64> {
    let uniforms = |bits: u64| (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i64).sum::<i64>();
    let sums: Vec<i64> = (0..TABLE as u64 / 2)
        .map(|i| uniforms(mix(2 * i + 1)) + uniforms(mix((2 * i + 2) << 32)) - 8 * 0x8000)
        .collect();
    let square: f64 = sums.iter().map(|&sum| sum as f64 * sum as f64).sum();
    let std = (square / sums.len() as f64).sqrt();
    sums.iter().flat_map(|&sum| [sum as f64 / std, -(sum as f64) / std]).collect()
}

/// By way of fp32 everywhere: some machines convert fp64 to fp16 in one rounding, others in two.
fn scaled(normal: &[f64], std: f64) -> [f16; TABLE] {
    std::array::from_fn(|i| f16::from_f32((normal[i] * std) as f32))
}
