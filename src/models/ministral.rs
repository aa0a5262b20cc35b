//! Ministral as transformers 5 has it: Mistral whose layers attend over a window or over everything, as `layer_types` says.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, NormPlace};
use super::keys::Keys;
use super::mistral::DEFAULTS;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "ministral", doc: "Ministral: Mistral with windows in some layers", build };

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let window = keys.size_or_null("sliding_window", Some(4096))?;
    let windows = config.windows(keys, window, |_| window.is_some())?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock { window: windows[layer], ..config.attention(Some(angles)) },
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
