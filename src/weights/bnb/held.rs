//! Recognizes the format of a checkpoint's quantized tensors by their names and dtypes.

use safetensors::Dtype;

use super::{forms, name_of};
use crate::quant::bnb4::Blocks4;
use crate::quant::{FORMATS, FormatId};
use crate::weights::safetensors::Safetensors;

/// Keys of config.json that describe a quantization.
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

/// Format of quantized matrices.
#[derive(Debug, Default)]
pub struct Held {
    /// Formats that hold any, in the order of the table.
    formats: Vec<FormatId>,
    has_fp4: bool,
    /// The 4 bits of the first matrix, where they are no NF4 in blocks of 64.
    pub other_blocks: Option<Blocks4>,
    /// Tensors that are no plain values and none of these.
    has_others: bool,
}

impl Held {
    pub fn of(files: &Safetensors) -> Self {
        let mut held = Self::default();
        for name in files.names() {
            let has = |suffix: &str| files.get(&name_of(&name, suffix)).is_some();
            let Some(dtype) = files.get(&name).map(|tensor| tensor.dtype) else { continue };
            if let Some((format, _)) = forms().find(|(_, form)| form.holds(dtype, &has)) {
                held.formats.push(format);
            } else if dtype == Dtype::U8 && has(FP4_STATE) {
                held.has_fp4 = true;
            } else if OTHERS.iter().any(|end| name.ends_with(end)) || (name.ends_with("weight") && !is_plain(dtype)) {
                held.has_others = true;
            }
        }
        held.other_blocks = other_blocks(files);
        held.formats.sort_by_key(|format| FORMATS.iter().position(|known| known == format));
        held.formats.dedup();
        held
    }

    /// Whether no matrix is quantized.
    pub fn is_plain(&self) -> bool {
        let Self { formats, has_fp4, has_others, other_blocks: _ } = self;
        formats.is_empty() && !has_fp4 && !has_others
    }

    /// The one format of bitsandbytes that holds weights here.
    pub fn only(&self) -> Option<FormatId> {
        match self.formats[..] {
            [format] if !self.has_fp4 => Some(format),
            _ => None,
        }
    }

    /// The names of what bitsandbytes holds here.
    pub fn names(&self) -> Vec<&'static str> {
        self.formats.iter().map(|format| format.name).chain(self.has_fp4.then_some("fp4")).collect()
    }
}

/// What the first `quant_state` says, where it is no NF4 in blocks of 64; `None` too where it cannot be read, which is said as its matrix is.
fn other_blocks(files: &Safetensors) -> Option<Blocks4> {
    const MOST_BYTES: u64 = 1 << 16;
    let is_state = |name: &&String| name.contains(".quant_state.bitsandbytes__");
    let name = files.names().into_iter().find(|name| is_state(&name))?;
    let bytes = files.get(&name).map(|tensor| tensor.bytes).filter(|bytes| *bytes <= MOST_BYTES)?;
    let blocks = Blocks4::parse(&files.bytes_at(&name, 0, bytes as usize).ok()?).ok()?;
    (blocks.is_fp4 || blocks.block != 64).then_some(blocks)
}

fn is_plain(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}
