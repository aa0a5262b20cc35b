//! A loaded model in a device's memory, as kernels find it.

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::f16;

use super::angles::DeviceAngles;
use super::token_ring::TokenRing;
use crate::call::KvFormat;
use crate::engine::memory::named;
use crate::engine::{Footprint, OutlierColumns, Setup};
use crate::kernels::cuda::cublas::{WORKSPACE_BYTES, Workspace};
use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::matvec::MatrixDesc;
use crate::kernels::cuda::place::DevicePlace;
use crate::kernels::cuda::step_kernel::DeviceProperties;
use crate::lower::cuda::{self as lower, Addresses, BiasAt, CacheAt, SessionAt, padded, padded_floats, padded_head};
use crate::plan::{
    BiasId, CacheId, CacheScope, CacheShape, EncoderInputKind, MatrixId, Model, RelativeBias, Rope, RopeId, VectorId,
};
use crate::quant::CudaMatrix;

/// Memory that calls share: nothing here is allocated again after loading.
pub struct Weights {
    /// Before the device's other owners: it is taken from cuBLAS while that is there.
    _workspace: Workspace,
    pub(super) device: CudaDevice,
    pub(super) properties: DeviceProperties,
    pub(super) model: Model,
    matrices: Vec<Box<dyn CudaMatrix>>,
    vectors: Vec<CudaSlice<f32>>,
    caches: Vec<Cache>,
    /// Sequences of the session.
    pub(super) sequences: usize,
    /// Where each stands, and its last token: of a batch.
    pub(super) places: CudaSlice<DevicePlace>,
    pub(super) tokens: CudaSlice<i32>,
    angles: Vec<DeviceAngles>,
    biases: Vec<BiasTable>,
    /// Token, position, step, rows of the encoder.
    state: CudaSlice<i32>,
    pub(super) logits: CudaSlice<f32>,
    /// Features of the last pictures, for rows of a prompt that stand for them: fp16 `[sequences, patches, width]`.
    features: Option<CudaSlice<f16>>,
    /// Zeros, as many as the widest norm has: the bias of norms that have none.
    zeros: CudaSlice<f32>,
    /// The count that LLM.int8 has found.
    outlier_columns: CudaSlice<u64>,
    pub(super) token_ring: TokenRing,
    pub(super) capacity: usize,
    pub(super) encoder_capacity: usize,
}

/// Keys and values `[sequences, g, capacity, d_pad]`.
struct Cache {
    keys: CudaSlice<f16>,
    values: CudaSlice<f16>,
    capacity: usize,
    /// A head's elements and zeros up to whole 16-byte words.
    d_pad: usize,
}

/// A relative bias, as [`lower::by_distance`] lays it out.
struct BiasTable {
    values: CudaSlice<f32>,
    reach: usize,
}

impl Weights {
    pub(super) fn new(
        setup: &Setup,
        device: CudaDevice,
        matrices: Vec<Box<dyn CudaMatrix>>,
        learned: &[Option<Vec<f32>>],
        vectors: &[Vec<f32>],
    ) -> Result<Self> {
        let (model, sequences) = (setup.model.clone(), setup.sequences);
        let cache = |spec: &CacheShape| -> Result<Cache> {
            let capacity = if spec.scope == CacheScope::Decoder { setup.capacity } else { setup.encoder_capacity };
            let d_pad = padded_head(spec.head_dim);
            let len = sequences * spec.kv_heads * capacity * d_pad;
            let half =
                || named(device.alloc_zeros(len), len * size_of::<f16>(), || format!("a cache of {capacity} tokens"));
            Ok(Cache { keys: half()?, values: half()?, capacity, d_pad })
        };
        let angles = |rope: &Rope| DeviceAngles::new(rope, setup.capacity, &device);
        let vector = |values: &Vec<f32>| device.clone_htod(&padded(values));
        let reach = setup.capacity.max(setup.encoder_capacity);
        let bias = |bias: &RelativeBias| -> Result<BiasTable> {
            let learned = learned[bias.table.0].as_ref().context("a bias without its table")?;
            let buckets = model.matrices[bias.table.0].n;
            let values = lower::by_distance(bias, learned, buckets, reach);
            Ok(BiasTable { values: device.clone_htod(&values)?, reach })
        };
        let patches = match model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => picture.patches(),
            Some(EncoderInputKind::Tokens) | None => 0,
        };
        let features = lower::features_width(&model).map(|width| device.alloc_zeros(sequences * patches * width));
        let features = features.transpose()?;
        Ok(Self {
            _workspace: Workspace::new(&device)?,
            features,
            vectors: vectors.iter().map(vector).collect::<Result<_, _>>()?,
            caches: model.caches.iter().map(cache).collect::<Result<_>>()?,
            angles: model.ropes.iter().map(angles).collect::<Result<_>>()?,
            biases: model.biases.iter().map(bias).collect::<Result<_>>()?,
            sequences,
            places: device.clone_htod(&vec![DevicePlace::default(); sequences])?,
            tokens: device.alloc_zeros(sequences)?,
            state: device.alloc_zeros(4)?,
            logits: device.alloc_zeros(sequences * model.vocab)?,
            zeros: device.alloc_zeros(padded_floats(vectors.iter().map(Vec::len).max().unwrap_or(1)))?,
            outlier_columns: device.alloc_zeros(1)?,
            token_ring: TokenRing::new(&device, sequences)?,
            properties: DeviceProperties::of(&device)?,
            capacity: setup.capacity,
            encoder_capacity: setup.encoder_capacity,
            matrices,
            model,
            device,
        })
    }

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token as usize >= self.model.vocab) {
            Some(token) => bail!("token {token} is outside the vocabulary of {}", self.model.vocab),
            None => Ok(()),
        }
    }

    /// Makes the calls and steps from now on those of a sequence that has `length` positions behind them.
    pub(super) fn set_length(&mut self, length: usize) -> Result<()> {
        let Self { angles, model, capacity, device, .. } = self;
        let mut ropes = angles.iter_mut().zip(&model.ropes);
        ropes.try_for_each(|(angles, rope)| angles.set_length(rope, *capacity, length, device))
    }

    /// The same for steps alone: where each has its frequencies in the table, nothing changes.
    pub(super) fn set_step_length(&mut self, length: usize) -> Result<()> {
        let Self { angles, model, capacity, device, .. } = self;
        let mut ropes = angles.iter_mut().zip(&model.ropes).filter(|(angles, _)| angles.calls.is_none());
        ropes.try_for_each(|(angles, rope)| angles.set_length(rope, *capacity, length, device))
    }

    /// What the session holds, where calls and steps have `scratch` bytes beside what is here and each sequence has `encoded` encoder rows.
    pub(super) fn footprint(&self, scratch: usize, encoded: usize) -> Footprint {
        let Self { model, matrices, .. } = self;
        let stored: Vec<usize> = matrices.iter().map(|m| m.stored_bytes()).collect();
        let resident: usize = matrices.iter().map(|m| m.resident_bytes()).sum();
        let vectors = model.vector_bytes();
        let caches: usize = self.caches.iter().map(|cache| 2 * cache.keys.len() * size_of::<f16>()).sum();
        Footprint {
            weights_bytes: (stored.iter().sum::<usize>() + vectors) as u64,
            // Vectors are held in fp32.
            weights_resident_bytes: (resident + 2 * vectors) as u64,
            kv_cache_bytes: caches as u64,
            scratch_bytes: (scratch + WORKSPACE_BYTES + 4 * self.logits.len()) as u64,
            weight_bytes_per_token: model.weight_bytes_per_step(&stored, self.sequences) as u64,
            ..Footprint::of_caches(model, KvFormat::Fp16, encoded)
        }
    }

    /// The columns of calls that have `examined` so many, and what the device has found.
    pub(super) fn outlier_columns(&self, examined: OutlierColumns) -> Result<OutlierColumns> {
        let counted = self.device.clone_dtoh(&self.outlier_columns)?;
        Ok(OutlierColumns { columns: counted[0], ..examined })
    }

    /// Token, position, step and encoder rows, before all that is launched from now on.
    pub(super) fn set_state(&mut self, token: u32, position: usize, step: u32, encoded: usize) -> Result<()> {
        let state = [token as i32, position as i32, step as i32, encoded as i32];
        Ok(self.device.memcpy_htod(&state, &mut self.state)?)
    }
}

impl Addresses for Weights {
    fn model(&self) -> &Model {
        &self.model
    }

    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn matrix(&self, id: MatrixId) -> MatrixDesc {
        self.matrices[id.0].desc()
    }

    fn vector(&self, id: VectorId) -> u64 {
        address(&self.vectors[id.0], &self.device)
    }

    fn cache(&self, id: CacheId) -> CacheAt {
        let Cache { keys, values, capacity, d_pad } = &self.caches[id.0];
        let (keys, values) = (address(keys, &self.device), address(values, &self.device));
        CacheAt { keys, values, capacity: *capacity, d_pad: *d_pad }
    }

    fn step_angles(&self, id: RopeId) -> u64 {
        address(&self.angles[id.0].steps, &self.device)
    }

    fn call_angles(&self, id: RopeId) -> u64 {
        let DeviceAngles { steps, calls, .. } = &self.angles[id.0];
        address(calls.as_ref().unwrap_or(steps), &self.device)
    }

    fn bias(&self, id: BiasId) -> BiasAt {
        let BiasTable { values, reach } = &self.biases[id.0];
        BiasAt { address: address(values, &self.device), reach: *reach }
    }

    fn session(&self) -> SessionAt {
        let device = &self.device;
        SessionAt {
            state: address(&self.state, device),
            logits: address(&self.logits, device),
            zeros: address(&self.zeros, device),
            features: self.features.as_ref().map_or(0, |features| address(features, device)),
            outlier_columns: address(&self.outlier_columns, device),
            host: self.token_ring.address(),
            host_slots: self.token_ring.slots(),
            sequences: self.sequences,
            places: address(&self.places, device),
            tokens: address(&self.tokens, device),
        }
    }
}
