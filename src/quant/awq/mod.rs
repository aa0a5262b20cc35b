//! AWQ (Lin et al. 2023) in its GEMM layout: 4-bit integers with a scale and a zero for each group of inputs.
//!
//! Field i of word `[k, c]` of `qweight` is the code of input k and output `8 · c + ORDER[i]`, and so in `qzeros` for a group. A value is
//! `(code − zero) · scale`. Layout: AutoAWQ.

use std::sync::Arc;

use anyhow::Result;
use safetensors::Dtype;

use super::scaled::codes::{Fields, UNSIGNED};
use super::scaled::scales::Groups;
use super::scaled::{NominalSize, ScaledStored, Scaling, scaled_formats};
use super::scheme::{Module, Patterns, QuantMethod, Scheme, Section};
use super::{FormatId, Stored};
use crate::quant::words::by_output;

const fn size(group: usize) -> NominalSize {
    NominalSize { code_bits: 4, group, scale_bits: 16 + 4 }
}

scaled_formats! {
    INT4, "awq-int4", "AWQ, 4-bit integers in one group or in groups of another size than the following", size(0);
    INT4_G32, "awq-int4-g32", "AWQ, 4-bit integers with a scale and a zero for 32", size(32);
    INT4_G64, "awq-int4-g64", "AWQ, 4-bit integers with a scale and a zero for 64", size(64);
    INT4_G128, "awq-int4-g128", "AWQ, 4-bit integers with a scale and a zero for 128", size(128);
    INT4_G256, "awq-int4-g256", "AWQ, 4-bit integers with a scale and a zero for 256", size(256);
}

/// The output of each field of a word, among its eight.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

pub struct Awq;

impl QuantMethod for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        if section.integer("bits")? != Some(4) {
            return Err(section.refused("bits", "4"));
        }
        section.one_of("version", &["gemm"], "gemm")?;
        section.one_of("format", &["gemm"], "gemm")?;
        section.one_of("backend", &["autoawq", "auto"], "autoawq")?;
        // The zeros lie in the files, also those of symmetric weights.
        section.harmless(&[
            "quant_method",
            "zero_point",
            "do_fuse",
            "fuse_max_seq_len",
            "modules_to_fuse",
            "exllama_config",
            "pack_dtype",
            "meta",
            "desc_act",
            "sym",
            "lm_head",
        ]);
        let key = "modules_to_not_convert";
        Ok(Arc::new(AwqScheme {
            group: section.group("group_size")?,
            skipped: Patterns::of_transformers(key, section.words(key)?)?,
        }))
    }
}

#[derive(Debug)]
struct AwqScheme {
    group: Option<usize>,
    skipped: Patterns,
}

impl AwqScheme {
    fn format(&self) -> FormatId {
        match self.group {
            Some(32) => INT4_G32,
            Some(64) => INT4_G64,
            Some(128) => INT4_G128,
            Some(256) => INT4_G256,
            _ => INT4,
        }
    }

    /// Groups of a module's inputs, once the shapes are right.
    fn groups(&self, module: &Module) -> Result<usize> {
        let (n, k) = (module.n, module.k);
        let groups = self.group.map_or(1, |group| k.div_ceil(group));
        module.expect("qweight", &[Dtype::I32, Dtype::U32], &[&[k, n.div_ceil(8)]])?;
        module.expect("qzeros", &[Dtype::I32, Dtype::U32], &[&[groups, n.div_ceil(8)]])?;
        module.expect("scales", &[Dtype::F16, Dtype::BF16, Dtype::F32], &[&[groups, n]])?;
        Ok(groups)
    }
}

/// `[n, rows]` codes of `[rows, ⌈n / 8⌉]` words.
fn codes(words: &[u32], (rows, n): (usize, usize)) -> Vec<u8> {
    let row_words = n.div_ceil(8);
    let mut codes = vec![0; n * rows];
    for (row, words) in words.chunks_exact(row_words).enumerate() {
        for (c, word) in words.iter().enumerate() {
            for (i, place) in ORDER.into_iter().enumerate() {
                let output = 8 * c + place;
                if output < n {
                    codes[output * rows + row] = (word >> (4 * i)) as u8 & 15;
                }
            }
        }
    }
    codes
}

impl Scheme for AwqScheme {
    fn precision(&self, _: &[String]) -> FormatId {
        self.format()
    }

    fn marks(&self) -> &'static [&'static str] {
        &["qweight"]
    }

    fn companions(&self) -> &'static [&'static str] {
        &["qweight", "qzeros", "scales"]
    }

    fn skips(&self, module: &str) -> bool {
        self.skipped.matches(module)
    }

    fn skip_key(&self) -> &'static str {
        "modules_to_not_convert"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        let scales = module.n * self.groups(module)?;
        let scale_bytes = module.get("scales")?.0.bitsize() / 8;
        let bytes = module.n * UNSIGNED.row_bytes(module.k) + scales * scale_bytes + scales.div_ceil(2);
        Ok((self.format(), bytes as u64))
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        let (n, k, groups) = (module.n, module.k, self.groups(module)?);
        let rows = codes(&module.words("qweight")?, (k, n));
        let bytes = rows.chunks_exact(k).flat_map(|row| Fields::new(4, row).bytes().to_vec()).collect();
        let zeros = codes(&module.words("qzeros")?, (groups, n));
        let scaling = Scaling {
            format: self.format(),
            n,
            k,
            meaning: UNSIGNED,
            groups: Groups::of_row(self.group, k),
            scales: by_output(module.scales("scales")?, (groups, n)),
            zeros: Some(Fields::new(4, &zeros)),
        };
        Ok(Box::new(ScaledStored::new(scaling, bytes)?))
    }
}
