//! compressed-tensors (llm-compressor): which modules are in which format is said by groups of targets in config.json. Integers of 4 and 8 bits are
//! read here (`integers.rs`); FP8, NVFP4 and MXFP4 are other folders', under this method's names.

mod integers;

use std::sync::Arc;

use anyhow::Result;

use self::integers::Integers;
use super::scheme::{Module, Patterns, QuantMethod, Scheme, Section};
use super::{FormatId, Stored, fp8, mxfp4, nvfp4};

pub use integers::FORMATS;

pub struct CompressedTensors;

/// Keys that change no value.
const HARMLESS: &[&str] = &[
    "quant_method",
    "quantization_status",
    "global_compression_ratio",
    "version",
    "run_compressed",
    "ignore",
    "format",
];

/// `format` names of files whose tensors are read; groups say what is in each.
const LAYOUTS: &[&str] = &[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
];

impl QuantMethod for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        section.one_of("format", LAYOUTS, "")?;
        // Older files of llm-compressor say `frozen` and are compressed; tensors of plain values are refused as they are found.
        section.one_of("quantization_status", &["compressed", "frozen"], "compressed")?;
        section.harmless(HARMLESS);
        if let Some(sparsity) = section.inner("sparsity_config")? {
            sparsity.one_of("format", &["dense"], "dense")?;
        }
        section.refuse(&["transform_config"], "only checkpoints without rotations")?;
        if section.value("kv_cache_scheme").is_some() {
            section.note(fp8::NOTE_OF_CACHE);
        }
        let Some(groups) = section.inner("config_groups")? else {
            return Err(section.refused("config_groups", "objects"));
        };
        let mut found = Vec::new();
        for key in groups.keys() {
            if let Some(group) = groups.inner(key)? {
                found.push(target_group(&group)?);
                groups.absorb(group);
            }
        }
        section.absorb(groups);
        if found.is_empty() {
            return Err(section.refused("config_groups", "at least one group"));
        }
        let ignored = Patterns::of_compressed_tensors("ignore", section.words("ignore")?)?;
        Ok(Arc::new(Groups { groups: found, ignored }))
    }
}

/// Modules that are held alike.
#[derive(Debug)]
struct TargetGroup {
    /// Names of classes, of which `Linear` is every linear layer.
    is_every_linear: bool,
    targets: Patterns,
    kind: TargetKind,
}

#[derive(Debug, Clone, Copy)]
enum TargetKind {
    Integers(Integers),
    Fp8(fp8::Fp8Tile),
    Nvfp4,
    Mxfp4,
}

fn target_group(group: &Section) -> Result<TargetGroup> {
    let targets = group.words("targets")?;
    group.harmless(&["format"]);
    for key in ["input_activations", "output_activations"] {
        if let Some(activations) = group.inner(key)? {
            let (bits, kind) = (activations.integer("num_bits")?, activations.word("type")?);
            let seen = format!("{} of {} bits", kind.unwrap_or("int"), bits.unwrap_or(8));
            group.note(fp8::note_of_activations(key, &seen));
        }
    }
    let Some(weights) = group.inner("weights")? else { return Err(group.refused("weights", "objects")) };
    let kind = target_kind(&weights)?;
    group.absorb(weights);
    Ok(TargetGroup {
        is_every_linear: targets.iter().any(|target| target == "Linear"),
        targets: Patterns::of_compressed_tensors("targets", targets)?,
        kind,
    })
}

fn target_kind(weights: &Section) -> Result<TargetKind> {
    // How scales were chosen, and in which type they are.
    weights.harmless(&["observer", "observer_kwargs", "block_structure", "actorder", "scale_dtype", "zp_dtype"]);
    if weights.value("dynamic").is_some_and(|dynamic| dynamic != &serde_json::Value::Bool(false)) {
        return Err(weights.refused("dynamic", "only weights whose scales are saved"));
    }
    let bits = weights.integer("num_bits")?;
    let kind = weights.one_of("type", &["int", "float"], "int")?;
    let strategies = ["tensor", "channel", "group", "tensor_group", "block"];
    let strategy = weights.one_of("strategy", &strategies, "tensor")?;
    let size = weights.group("group_size")?;
    let is_symmetric = weights.flag("symmetric", true)?;
    let group = || size.ok_or_else(|| weights.refused("group_size", "positive numbers"));
    match (kind, bits) {
        ("int", Some(bits @ (4 | 8))) => {
            let group = match strategy {
                "tensor" | "channel" => None,
                "group" => Some(group()?),
                _ => return Err(weights.refused("strategy", "`tensor`, `channel` and `group`")),
            };
            Ok(TargetKind::Integers(Integers { bits: bits as usize, group, is_symmetric }))
        }
        ("float", Some(8)) => Ok(TargetKind::Fp8(match strategy {
            "block" => Some(block(weights)?),
            "group" => Some((1, group()?)),
            "tensor_group" => return Err(weights.refused("strategy", "others for 8 bits")),
            _ => None,
        })),
        ("float", Some(4)) => match (strategy, group()?) {
            ("tensor_group" | "group", 16) => Ok(TargetKind::Nvfp4),
            ("group", 32) => Ok(TargetKind::Mxfp4),
            _ => Err(weights.refused("group_size", "16 (NVFP4) and 32 (MXFP4)")),
        },
        _ => Err(weights.refused("num_bits", "integers of 4 and 8 bits and floats of 4 and 8")),
    }
}

/// Rows and columns of a block.
fn block(weights: &Section) -> Result<(usize, usize)> {
    let size = |value: &serde_json::Value| usize::try_from(value.as_u64()?).ok().filter(|size| *size > 0);
    let pair = weights.value("block_structure").and_then(|value| value.as_array());
    let pair: Option<Vec<usize>> = pair.and_then(|pair| pair.iter().map(size).collect());
    match pair.as_deref() {
        Some(&[rows, columns]) => Ok((rows, columns)),
        _ => Err(weights.refused("block_structure", "pairs of positive numbers")),
    }
}

#[derive(Debug)]
struct Groups {
    groups: Vec<TargetGroup>,
    ignored: Patterns,
}

impl Groups {
    /// How the module of these names is held. A name decides before a class.
    fn kind(&self, names: [&str; 2]) -> Option<TargetKind> {
        let is_named = |group: &&TargetGroup| names.iter().any(|name| group.targets.matches(name));
        let by_class = || self.groups.iter().find(|group| group.is_every_linear);
        self.groups.iter().find(is_named).or_else(by_class).map(|group| group.kind)
    }

    fn kind_of(&self, module: &Module) -> Result<TargetKind> {
        self.kind([module.name, module.planned]).ok_or_else(|| {
            let what = "is quantized, but no group of config.json's quantization_config targets it";
            module.fault(format!("`{}` {what}", module.name))
        })
    }
}

impl TargetKind {
    fn format(self) -> FormatId {
        match self {
            TargetKind::Integers(integers) => integers.format(),
            TargetKind::Fp8(_) => fp8::ID,
            TargetKind::Nvfp4 => nvfp4::ID,
            TargetKind::Mxfp4 => super::ggml::MXFP4,
        }
    }
}

impl Scheme for Groups {
    fn precision(&self, modules: &[String]) -> FormatId {
        let mut commonest = (0, self.groups[0].kind.format());
        let formats: Vec<FormatId> =
            modules.iter().filter_map(|name| self.kind([name, name])).map(TargetKind::format).collect();
        for format in &formats {
            let count = formats.iter().filter(|other| *other == format).count();
            if count > commonest.0 {
                commonest = (count, *format);
            }
        }
        commonest.1
    }

    fn marks(&self) -> &'static [&'static str] {
        &["weight_packed", "weight_scale"]
    }

    fn companions(&self) -> &'static [&'static str] {
        &[
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
            "weight_global_scale",
            "input_scale",
            "input_zero_point",
            "input_global_scale",
            "output_scale",
            "output_zero_point",
            "k_scale",
            "v_scale",
        ]
    }

    fn skips(&self, module: &str) -> bool {
        let is_target = |group: &TargetGroup| group.is_every_linear || group.targets.matches(module);
        self.ignored.matches(module) || !self.groups.iter().any(is_target)
    }

    fn skip_key(&self) -> &'static str {
        "ignore"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        match self.kind_of(module)? {
            TargetKind::Integers(integers) => integers.held(module),
            TargetKind::Fp8(tile) => fp8::held(module, tile),
            TargetKind::Nvfp4 => nvfp4::held(module, &nvfp4::COMPRESSED_TENSORS),
            TargetKind::Mxfp4 => mxfp4::held(module),
        }
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        match self.kind_of(module)? {
            TargetKind::Integers(integers) => integers.read(module),
            TargetKind::Fp8(tile) => fp8::read(module, tile),
            TargetKind::Nvfp4 => nvfp4::read(module, &nvfp4::COMPRESSED_TENSORS),
            TargetKind::Mxfp4 => mxfp4::read(module),
        }
    }
}
