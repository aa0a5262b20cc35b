//! What a checkpoint's tensors are quantized into, told by their names and dtypes.

use safetensors::Dtype;

use super::{QUANT_STATE, name_of};
use crate::weights::safetensors::Safetensors;

/// Keys of config.json that tell of a quantization.
pub const SECTIONS: &[&str] = &["quantization_config", "compression_config", "quantization"];

/// What bitsandbytes saves of a 4-bit matrix in floating-point codes, which no format here has.
const FP4_STATE: &str = "quant_state.bitsandbytes__fp4";

/// Ends of names that other methods' tensors have.
const OTHERS: &[&str] = &[
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    "_blocks",
    ".codebooks",
    ".W_q",
];

/// Counts of quantized matrices by what they are held in.
#[derive(Debug, Default)]
pub struct Held {
    int8: usize,
    nf4: usize,
    nf4_nodq: usize,
    fp4: usize,
    /// Tensors that are no plain values and none of these.
    others: usize,
}

impl Held {
    pub fn of(files: &Safetensors) -> Self {
        let mut held = Self::default();
        for name in files.names() {
            let has = |suffix: &str| files.get(&name_of(&name, suffix)).is_some();
            let dtype = files.get(&name).map(|tensor| tensor.dtype);
            match dtype {
                Some(Dtype::I8) if has("SCB") => held.int8 += 1,
                Some(Dtype::U8) if has(QUANT_STATE) && has("nested_absmax") => held.nf4 += 1,
                Some(Dtype::U8) if has(QUANT_STATE) => held.nf4_nodq += 1,
                Some(Dtype::U8) if has(FP4_STATE) => held.fp4 += 1,
                _ if OTHERS.iter().any(|end| name.ends_with(end)) => held.others += 1,
                Some(dtype) if name.ends_with("weight") && !is_plain(dtype) => held.others += 1,
                _ => {}
            }
        }
        held
    }

    /// Whether no matrix is quantized.
    pub fn is_plain(&self) -> bool {
        let Self { int8, nf4, nf4_nodq, fp4, others } = self;
        int8 + nf4 + nf4_nodq + fp4 + others == 0
    }

    /// The names of what bitsandbytes holds here.
    pub fn precisions(&self) -> Vec<&'static str> {
        let all = [("int8", self.int8), ("nf4", self.nf4), ("nf4-nodq", self.nf4_nodq), ("fp4", self.fp4)];
        all.into_iter().filter(|(_, count)| *count > 0).map(|(name, _)| name).collect()
    }
}

fn is_plain(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}
