//! The tensors of one module of a checkpoint, looked up, checked and read.

use anyhow::{Result, bail};
use half::{bf16, f16};
use safetensors::Dtype;

use super::super::scaled::scales::Scales;
use crate::error::BadInput;

/// Where the tensors of a module are looked up, by their names behind the module's.
pub trait ModuleTensors {
    /// `None` where there is no such tensor.
    fn find(&self, suffix: &str) -> Option<(Dtype, Vec<usize>)>;

    /// Little-endian bytes of a tensor that is there, from byte `first` on. Fails on an I/O error.
    fn read(&self, suffix: &str, first: usize, len: usize) -> Result<Vec<u8>>;
}

/// One matrix of a tensor of several: rows `start`, `start + step`, … of matrix `index` of `count`, of `rows` rows each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuleSlice {
    pub index: usize,
    pub count: usize,
    pub start: usize,
    pub step: usize,
    pub rows: usize,
}

/// A linear layer of a checkpoint.
pub struct Module<'a> {
    /// In the files, without `.weight`.
    pub name: &'a str,
    /// In plans, without `.weight`.
    pub planned: &'a str,
    pub n: usize,
    pub k: usize,
    /// Of tensors that hold the matrices of all experts.
    pub slice: Option<ModuleSlice>,
    pub tensors: &'a dyn ModuleTensors,
}

impl Module<'_> {
    pub fn has(&self, suffix: &str) -> bool {
        self.tensors.find(suffix).is_some()
    }

    /// The name of a tensor.
    pub fn tensor(&self, suffix: &str) -> String {
        match suffix.starts_with('_') {
            true => format!("{}{suffix}", self.name),
            false => format!("{}.{suffix}", self.name),
        }
    }

    /// Dtype and shape. Fails with [`BadInput`] where the tensor is absent.
    pub fn get(&self, suffix: &str) -> Result<(Dtype, Vec<usize>)> {
        self.tensors.find(suffix).ok_or_else(|| {
            self.fault(format!(
                "tensor `{}` is absent, which [{}, {}] quantized weights need",
                self.tensor(suffix),
                self.n,
                self.k
            ))
        })
    }

    /// Fails with [`BadInput`] unless the tensor is there in one of these dtypes and shapes.
    pub fn expect(&self, suffix: &str, dtypes: &[Dtype], shapes: &[&[usize]]) -> Result<(Dtype, Vec<usize>)> {
        let (dtype, shape) = self.get(suffix)?;
        if dtypes.contains(&dtype) && shapes.iter().any(|allowed| *allowed == shape) {
            return Ok((dtype, shape));
        }
        let dtypes: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
        let mut known: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
        known.dedup();
        Err(self.fault(format!(
            "tensor `{}` must be {} of shape {}; it is {dtype} of shape {shape:?}",
            self.tensor(suffix),
            dtypes.join(" or "),
            known.join(" or ")
        )))
    }

    /// An error about the tensors of the module.
    pub fn fault(&self, message: String) -> anyhow::Error {
        BadInput::new(message).hint("check that config.json and the weights belong together").into()
    }

    /// All bytes of a tensor that is there.
    pub fn bytes(&self, suffix: &str) -> Result<Vec<u8>> {
        let (dtype, shape) = self.get(suffix)?;
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, length| bits.checked_mul(*length));
        match bits {
            Some(bits) => self.tensors.read(suffix, 0, bits / 8),
            None => bail!(self.fault(format!("tensor `{}` of shape {shape:?} cannot be counted", self.tensor(suffix)))),
        }
    }

    /// Words of 32 bits.
    pub fn words(&self, suffix: &str) -> Result<Vec<u32>> {
        Ok(self.bytes(suffix)?.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    /// Scales in the dtype that they are stored in. Fails with [`BadInput`] where one is no finite number.
    pub fn scales(&self, suffix: &str) -> Result<Scales> {
        let (dtype, _) = self.get(suffix)?;
        let bytes = self.bytes(suffix)?;
        let pairs = || bytes.as_chunks::<2>().0.iter();
        let scales = match dtype {
            Dtype::F32 => {
                Scales::F32(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
            Dtype::F16 => Scales::F16(pairs().map(|bytes| f16::from_le_bytes(*bytes)).collect()),
            Dtype::BF16 => Scales::Bf16(pairs().map(|bytes| bf16::from_le_bytes(*bytes)).collect()),
            Dtype::F8_E8M0 | Dtype::U8 => Scales::E8m0(bytes),
            other => {
                return Err(self.fault(format!("tensor `{}` is {other}, which holds no scales", self.tensor(suffix))));
            }
        };
        finite(self, suffix, scales)
    }

    /// The one fp32 value of a tensor.
    pub fn scalar(&self, suffix: &str) -> Result<f32> {
        self.expect(suffix, &[Dtype::F32], &[&[], &[1]])?;
        let bytes = self.bytes(suffix)?;
        let value = bytes.as_chunks::<4>().0.first().map(|bytes| f32::from_le_bytes(*bytes));
        match value.filter(|value| value.is_finite() && *value != 0.0) {
            Some(value) => Ok(value),
            None => Err(self.fault(format!("tensor `{}` is no finite number but 0", self.tensor(suffix)))),
        }
    }
}

/// `scales`, where all are finite numbers.
pub fn finite(module: &Module, suffix: &str, scales: Scales) -> Result<Scales> {
    match (0..scales.count()).find(|at| !scales.get(*at).is_finite()) {
        None => Ok(scales),
        Some(at) => Err(module.fault(format!("scale {at} of `{}` is {}", module.tensor(suffix), scales.get(at)))),
    }
}
