//! NVIDIA's ModelOpt: matrices in NVFP4 or FP8 under its names. What it says stands in config.json or in `hf_quant_config.json`.

use std::sync::Arc;

use anyhow::Result;

use super::scheme::{Module, Patterns, QuantMethod, Scheme, Section};
use super::{FormatId, Stored, fp8, nvfp4};

pub struct ModelOpt;

impl QuantMethod for ModelOpt {
    fn name(&self) -> &'static str {
        "modelopt"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        section.harmless(&["quant_method", "producer", "quantization_status", "version"]);
        let inner = section.inner("quantization")?;
        let own = inner.as_ref().unwrap_or(section);
        let scheme = scheme(own)?;
        if let Some(inner) = inner {
            section.absorb(inner);
        }
        Ok(scheme)
    }
}

fn scheme(section: &Section) -> Result<Arc<dyn Scheme>> {
    let algorithm = section.one_of("quant_algo", &["NVFP4", "FP8"], "")?;
    if algorithm.is_empty() {
        return Err(section.refused("quant_algo", "`NVFP4` and `FP8`"));
    }
    let is_nvfp4 = algorithm == "NVFP4";
    if is_nvfp4 && section.group("group_size")?.is_some_and(|size| size != 16) {
        return Err(section.refused("group_size", "16"));
    }
    // The same again, as compressed-tensors writes it.
    section.harmless(&["quant_method", "config_groups", "group_size", "producer"]);
    section.refuse(&["quantized_layers"], "only checkpoints of one `quant_algo`")?;
    section.refuse(&["has_zero_point", "pre_quant_scale"], "only checkpoints without it")?;
    if section.value("kv_cache_quant_algo").is_some() || section.value("kv_cache_scheme").is_some() {
        section.note(fp8::NOTE_OF_CACHE);
    }
    section.note(fp8::note_of_activations("quant_algo", algorithm));
    let words = section.words("exclude_modules")?.into_iter().chain(section.words("ignore")?).collect();
    Ok(Arc::new(ModelOptScheme { is_nvfp4, skipped: Patterns::of_wildcards("exclude_modules", words)? }))
}

#[derive(Debug)]
struct ModelOptScheme {
    is_nvfp4: bool,
    skipped: Patterns,
}

impl Scheme for ModelOptScheme {
    fn precision(&self, _: &[String]) -> FormatId {
        if self.is_nvfp4 { nvfp4::ID } else { fp8::ID }
    }

    fn marks(&self) -> &'static [&'static str] {
        &["weight_scale"]
    }

    fn companions(&self) -> &'static [&'static str] {
        &["weight", "weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale"]
    }

    fn skips(&self, module: &str) -> bool {
        self.skipped.matches(module)
    }

    fn skip_key(&self) -> &'static str {
        "exclude_modules"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        if self.is_nvfp4 { nvfp4::held(module, &nvfp4::MODELOPT) } else { fp8::held(module, None) }
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        if self.is_nvfp4 { nvfp4::read(module, &nvfp4::MODELOPT) } else { fp8::read(module, None) }
    }
}
