//! Tensors for candle's models from our own sources, one at a time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use half::f16;

use crate::engine::Setup;
use crate::events::{Event, Listener, Unit};
use crate::weights::Source;

/// The names that a model asks for, and what it gets.
pub struct CandleFeed<'a> {
    source: &'a dyn Source,
    events: &'a dyn Listener,
    rules: HashMap<String, WeightRule>,
    /// Tensors that were made. All are in use: a name that is asked for again shares its memory.
    made: Mutex<HashMap<String, Tensor>>,
    tally: WeightTally,
    done_bytes: AtomicU64,
}

/// A tensor that is not the checkpoint's of the same name.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightRule {
    /// A tied head: the tensor of this name.
    SameAs(String),
    /// The checkpoint's values times this.
    Scaled(f32),
    /// Zero rows behind the checkpoint's, as many as are asked for.
    Padded,
}

/// Totals of the tensors that were loaded. Clones share them.
#[derive(Clone, Default)]
pub struct WeightTally(Arc<[AtomicU64; 2]>);

impl WeightTally {
    /// Bytes of all tensors, each counted once.
    pub fn bytes(&self) -> u64 {
        self.0[0].load(Ordering::Relaxed)
    }

    /// Finite checkpoint values that became infinite in fp16.
    pub fn overflow(&self) -> u64 {
        self.0[1].load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize, overflow: usize) {
        self.0[0].fetch_add(bytes as u64, Ordering::Relaxed);
        self.0[1].fetch_add(overflow as u64, Ordering::Relaxed);
    }
}

impl<'a> CandleFeed<'a> {
    pub fn new(setup: &Setup<'a>, rules: HashMap<String, WeightRule>, events: &'a dyn Listener) -> Self {
        let source = setup.source;
        let total = setup.model.matrices.iter().map(|spec| source.stored_bytes(&spec.name)).sum();
        events.on(Event::Begin { label: "load candle's model".to_owned(), total, unit: Unit::Bytes });
        let (made, done_bytes) = (Mutex::default(), AtomicU64::new(0));
        Self { source, events, rules, made, tally: WeightTally::default(), done_bytes }
    }

    pub fn tally(&self) -> WeightTally {
        self.tally.clone()
    }

    fn read(&self, name: &str, dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(stored) = self.source.shape(name) else {
            bail!("candle's model asks for `{name}`, which the checkpoint does not have");
        };
        let width: usize = dims.iter().skip(1).product();
        let (rows, given) = (dims[0], stored[0]);
        let padded = self.rules.get(name) == Some(&WeightRule::Padded);
        if stored.iter().product::<usize>() != given * width || given > rows || (given < rows && !padded) {
            bail!("`{name}` has shape {stored:?}; candle's model asks for {dims:?}");
        }
        let (tensor, overflow) = if dtype == DType::F32 {
            let mut data = vec![0.0; rows * width];
            self.source.read_rows_f32(name, 0..given, &mut data[..given * width]).map_err(message)?;
            (Tensor::from_vec(data, dims, device)?, 0)
        } else {
            let mut data = vec![f16::ZERO; rows * width];
            let overflow = self.source.read_rows(name, 0..given, &mut data[..given * width]).map_err(message)?;
            (Tensor::from_vec(data, dims, device)?, overflow)
        };
        let tensor = match self.rules.get(name) {
            Some(WeightRule::Scaled(scale)) => (tensor * f64::from(*scale))?,
            _ => tensor,
        };
        self.tally.add(tensor.elem_count() * dtype.size_in_bytes(), overflow);
        let bytes = self.source.stored_bytes(name);
        self.events.on(Event::Progress { done: bytes + self.done_bytes.fetch_add(bytes, Ordering::Relaxed) });
        Ok(tensor)
    }
}

impl SimpleBackend for CandleFeed<'_> {
    fn get(&self, shape: Shape, name: &str, _init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let name = match self.rules.get(name) {
            Some(WeightRule::SameAs(other)) => other,
            _ => name,
        };
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(tensor) = made.get(name).filter(|tensor| tensor.shape() == &shape) {
            return Ok(tensor.clone());
        }
        let tensor = self.read(name, shape.dims(), dtype, device)?;
        made.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> Result<Tensor> {
        bail!("candle's model asks for `{name}` without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.source.shape(name).is_some() || self.rules.contains_key(name)
    }
}

fn message(error: anyhow::Error) -> candle_core::Error {
    candle_core::Error::Msg(format!("{error:#}"))
}
