//! GPTQ (Frantar et al. 2022): integers of 4 or 8 bits, a scale and a zero for each group of inputs, perhaps of inputs that a list
//! (`g_idx`) brings together. Layout: AutoGPTQ and GPTQModel.
//!
//! Field i of word `[r, c]` of `qweight` is the code of input `32 / bits · r + i` and output c; field i of word `[g, c]` of `qzeros` is the zero
//! of output `32 / bits · c + i`. A value is `(code − zero) · scale` of its input's group.

use std::sync::Arc;

use anyhow::Result;
use safetensors::Dtype;

use super::scaled::codes::{Fields, Meaning, UNSIGNED};
use super::scaled::scales::Groups;
use super::scaled::{NominalSize, ScaledStored, Scaling, scaled_formats};
use super::scheme::{Module, QuantMethod, Scheme, Section};
use super::{FormatId, Stored};
use crate::quant::words::{by_output, fields, transposed};

const fn size(code_bits: usize, group: usize) -> NominalSize {
    // An fp16 scale and a zero.
    NominalSize { code_bits, group, scale_bits: 16 + code_bits }
}

scaled_formats! {
    INT4, "gptq-int4", "GPTQ, 4-bit integers in one group or in groups of another size than the following", size(4, 0);
    INT4_G32, "gptq-int4-g32", "GPTQ, 4-bit integers with a scale and a zero for 32", size(4, 32);
    INT4_G64, "gptq-int4-g64", "GPTQ, 4-bit integers with a scale and a zero for 64", size(4, 64);
    INT4_G128, "gptq-int4-g128", "GPTQ, 4-bit integers with a scale and a zero for 128", size(4, 128);
    INT4_G256, "gptq-int4-g256", "GPTQ, 4-bit integers with a scale and a zero for 256", size(4, 256);
    INT4_G1024, "gptq-int4-g1024", "GPTQ, 4-bit integers with a scale and a zero for 1024", size(4, 1024);
    INT8, "gptq-int8", "GPTQ, 8-bit integers in one group or in groups of another size than the following", size(8, 0);
    INT8_G32, "gptq-int8-g32", "GPTQ, 8-bit integers with a scale and a zero for 32", size(8, 32);
    INT8_G64, "gptq-int8-g64", "GPTQ, 8-bit integers with a scale and a zero for 64", size(8, 64);
    INT8_G128, "gptq-int8-g128", "GPTQ, 8-bit integers with a scale and a zero for 128", size(8, 128);
    INT8_G256, "gptq-int8-g256", "GPTQ, 8-bit integers with a scale and a zero for 256", size(8, 256);
    INT8_G1024, "gptq-int8-g1024", "GPTQ, 8-bit integers with a scale and a zero for 1024", size(8, 1024);
}

fn format(bits: usize, group: Option<usize>) -> FormatId {
    match (bits, group) {
        (4, Some(32)) => INT4_G32,
        (4, Some(64)) => INT4_G64,
        (4, Some(128)) => INT4_G128,
        (4, Some(256)) => INT4_G256,
        (4, Some(1024)) => INT4_G1024,
        (4, _) => INT4,
        (_, Some(32)) => INT8_G32,
        (_, Some(64)) => INT8_G64,
        (_, Some(128)) => INT8_G128,
        (_, Some(256)) => INT8_G256,
        (_, Some(1024)) => INT8_G1024,
        (_, _) => INT8,
    }
}

pub struct Gptq;

/// Keys that say how the weights were found, what the tools do with them, or what each tensor says by itself.
const HARMLESS: &[&str] = &[
    "quant_method",
    "damp_percent",
    "damp_auto_increment",
    "true_sequential",
    "static_groups",
    "lm_head",
    "mse",
    "meta",
    "model_name_or_path",
    "model_file_base_name",
    "dataset",
    "tokenizer",
    "batch_size",
    "pad_token_id",
    "backend",
    "use_cuda_fp16",
    "use_exllama",
    "disable_exllama",
    "exllama_config",
    "use_cuda_kernel",
    "max_input_length",
    "model_seqlen",
    "cache_block_outputs",
    "block_name_to_quantize",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "act_group_aware",
    "gptaq",
    "hyb_act",
    "offload_to_disk",
    "parallel_packing",
    "pack_impl",
    "quantizer",
    "packer",
];

impl QuantMethod for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        let bits = match section.integer("bits")? {
            Some(4) => 4,
            Some(8) => 8,
            _ => return Err(section.refused("bits", "4 and 8")),
        };
        let group = section.group("group_size")?;
        let stored = ["gptq", "gptq_v2"];
        let layout = section.one_of("checkpoint_format", &stored, "gptq")?;
        section.one_of("format", &stored, "gptq")?;
        section.one_of("pack_dtype", &["int32"], "int32")?;
        section.refuse(&["is_marlin_format", "adapter"], "only checkpoints without it")?;
        section.harmless(HARMLESS);
        Ok(Arc::new(GptqScheme {
            bits,
            group,
            sym: section.flag("sym", true)?,
            desc_act: section.flag("desc_act", false)?,
            stores_zeros: layout == "gptq_v2" || section.word("format")? == Some("gptq_v2"),
            // Bits and groups of such modules are read off their tensors.
            is_dynamic: section.value("dynamic").is_some(),
        }))
    }
}

#[derive(Debug)]
struct GptqScheme {
    bits: usize,
    group: Option<usize>,
    sym: bool,
    desc_act: bool,
    /// And not the zeros less one, as the first layout did.
    stores_zeros: bool,
    /// Modules may have other bits and groups.
    is_dynamic: bool,
}

/// What the shapes of a module's tensors say.
struct Shapes {
    bits: usize,
    /// `None` for one group.
    group: Option<usize>,
    groups: usize,
}

const INTEGERS: &[Dtype] = &[Dtype::I32, Dtype::U32];
const FLOATS: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];

impl GptqScheme {
    fn shapes(&self, module: &Module) -> Result<Shapes> {
        let (n, k) = (module.n, module.k);
        let words = |values: usize, bits: usize| (values * bits).div_ceil(32);
        let rows = module.get("qweight")?.1.first().copied();
        let of_rows = [4, 8].into_iter().find(|bits| rows == Some(words(k, *bits)));
        let bits = if self.is_dynamic { of_rows.unwrap_or(self.bits) } else { self.bits };
        module.expect("qweight", INTEGERS, &[&[words(k, bits), n]])?;
        let mut group = self.group;
        if self.is_dynamic
            && let Some(&[groups, _]) = module.get("scales")?.1.first_chunk::<2>()
        {
            group = if groups > 1 { Some(k.div_ceil(groups)) } else { None };
        }
        let groups = group.map_or(1, |group| k.div_ceil(group));
        module.expect("scales", FLOATS, &[&[groups, n]])?;
        module.expect("qzeros", INTEGERS, &[&[groups, words(n, bits)]])?;
        if module.has("g_idx") || self.desc_act {
            module.expect("g_idx", INTEGERS, &[&[k]])?;
        }
        Ok(Shapes { bits, group, groups })
    }

    /// Which inputs share a scale.
    fn groups(&self, module: &Module, shapes: &Shapes) -> Result<Groups> {
        let in_turn = Groups::of_row(shapes.group, module.k);
        if !module.has("g_idx") {
            return Ok(in_turn);
        }
        let of_column = module.words("g_idx")?;
        if let Some((at, group)) = of_column.iter().enumerate().find(|(_, group)| **group as usize >= shapes.groups) {
            let (name, seen) = (module.tensor("g_idx"), group.cast_signed());
            return Err(module.fault(format!(
                "input {at} of `{name}` is in group {seen}; there are groups 0 to {}",
                shapes.groups - 1
            )));
        }
        let size = shapes.group.unwrap_or(module.k);
        let is_in_turn = of_column.iter().enumerate().all(|(column, group)| column / size == *group as usize);
        Ok(if is_in_turn { in_turn } else { Groups::Listed { count: shapes.groups, of_column } })
    }

    /// The zeros by output and group.
    fn zeros(&self, module: &Module, shapes: &Shapes) -> Result<Vec<u8>> {
        let Shapes { bits, groups, .. } = *shapes;
        let mask = if bits == 4 { 15 } else { 255 };
        let by_group = fields(&module.words("qzeros")?, bits, (groups, module.n));
        // Some tools say that they store zeros less one, and store zeros: those of symmetric weights are in the middle.
        let middle = 1u8 << (bits - 1);
        let are_stored = self.stores_zeros || (self.sym && by_group.iter().all(|zero| *zero == middle));
        // A zero of 0, stored less one, has all bits set.
        let zero = |stored: u8| if are_stored { stored } else { stored.wrapping_add(1) & mask };
        Ok((0..module.n * groups).map(|at| zero(by_group[at % groups * module.n + at / groups])).collect())
    }
}

impl Scheme for GptqScheme {
    fn precision(&self, _: &[String]) -> FormatId {
        format(self.bits, self.group)
    }

    fn marks(&self) -> &'static [&'static str] {
        &["qweight"]
    }

    fn companions(&self) -> &'static [&'static str] {
        &["qweight", "qzeros", "scales", "g_idx"]
    }

    fn skips(&self, _: &str) -> bool {
        false
    }

    fn skip_key(&self) -> &'static str {
        "dynamic"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        let shapes = self.shapes(module)?;
        let (codes, scales) = (module.n * meaning(shapes.bits).row_bytes(module.k), module.n * shapes.groups);
        let scale_bytes = module.get("scales")?.0.bitsize() / 8;
        let listed = self.groups(module, &shapes)?.bytes();
        let bytes = codes + scales * scale_bytes + (scales * shapes.bits).div_ceil(8) + listed;
        Ok((format(shapes.bits, shapes.group), bytes as u64))
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        let shapes = self.shapes(module)?;
        let (n, k, groups) = (module.n, module.k, shapes.groups);
        let meaning = meaning(shapes.bits);
        let codes = transposed(&module.words("qweight")?, n, meaning.row_bytes(k));
        let scaling = Scaling {
            format: format(shapes.bits, shapes.group),
            n,
            k,
            groups: self.groups(module, &shapes)?,
            scales: by_output(module.scales("scales")?, (groups, n)),
            zeros: Some(Fields::new(shapes.bits, &self.zeros(module, &shapes)?)),
            meaning,
        };
        Ok(Box::new(ScaledStored::new(scaling, codes)?))
    }
}

fn meaning(bits: usize) -> Meaning {
    if bits == 4 { UNSIGNED } else { Meaning::Bytes { offset: 0.0 } }
}
