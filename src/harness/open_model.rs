//! Models that are opened but not loaded: files found, plan built, matrices selected.

use anyhow::{Result, bail};

use super::picture::Preprocessor;
use crate::error::{BadInput, without_backtrace};
use crate::events::{Event, Listener};
use crate::models;
use crate::plan::{EncoderInputKind, Model};
use crate::protocol::Encode;
use crate::weights::policy::Selection;
use crate::weights::{self, Checkpoint, ModelRequest, Source};

/// A model whose files were found and whose plan was built; no weights are in memory.
pub struct OpenModel {
    pub checkpoint: Checkpoint,
    pub model: Model,
    pub source: Box<dyn Source>,
}

/// Finds a model's files, downloading what is missing, and checks that they hold what the architecture needs.
pub fn open(request: &ModelRequest, events: &dyn Listener) -> Result<OpenModel> {
    let checkpoint = weights::open(request, events)?;
    let model = build(&checkpoint, request, events)?;
    let source = checkpoint.source_with(&model.matrices, &model.vectors, events)?;
    Ok(OpenModel { checkpoint, model, source })
}

/// Builds the plan of a model and warns of each setting of its files that is not computed. Fails on one that must be, and with
/// `--strict-config` on any.
pub fn build(checkpoint: &Checkpoint, request: &ModelRequest, events: &dyn Listener) -> Result<Model, BadInput> {
    let files = models::Files { config: &checkpoint.config, generation: checkpoint.generation_config.as_ref() };
    let built = models::read(&files).map_err(|error| {
        let model_id = &request.model_id;
        BadInput::new(format!(
            "the config.json of `{model_id}` cannot be used: {}",
            without_backtrace(&error.to_string())
        ))
    })?;
    let unread = checkpoint.notes.iter().map(|message| (models::UNREAD_FILE, message.clone()));
    let quantization = checkpoint.quantized.iter().flat_map(|own| &own.notes);
    let unread = unread.chain(quantization.map(|message| ("quantization_config", message.clone())));
    for (name, message) in unread.chain(built.notes.into_iter().map(|note| (note.name, note.message))) {
        if request.strict_config {
            return Err(BadInput::new(format!("`--strict-config`: {message}"))
                .hint("drop `--strict-config` to run with a warning in the record instead"));
        }
        events.on(Event::Warning { name: name.to_owned(), message });
    }
    let mut model = built.model;
    checkpoint.hold(&mut model.matrices);
    Ok(model)
}

impl OpenModel {
    /// See [`select`].
    pub fn select(&mut self, selection: &Selection) -> Result<(), BadInput> {
        select(&mut self.model, &self.checkpoint, selection)
    }
}

/// Marks the matrices of `model` that `selection` quantizes. Fails where a pattern matches no linear layer, and where the weights were
/// quantized already.
pub fn select(model: &mut Model, checkpoint: &Checkpoint, selection: &Selection) -> Result<(), BadInput> {
    if let (Selection::Without(patterns), Some(own)) = (selection, &checkpoint.quantized) {
        let message = format!("`--keep-fp16 {}`: the weights were saved in `{}`", patterns.join(","), own.precision);
        return Err(BadInput::new(message).hint("drop `--keep-fp16`, or name the model that they were made from"));
    }
    selection.apply(&mut model.matrices).map_err(|pattern| {
        let message = format!("`--keep-fp16 {pattern}` matches no linear layer of `{}`", checkpoint.id);
        BadInput::new(message).hint(format!(
            "a pattern is one or more components of a name such as `{}`; `*` matches any text within one",
            last_linear(model)
        ))
    })
}

/// The name of a linear layer, to show how they are spelled.
fn last_linear(model: &Model) -> &str {
    let linear = model.matrices.iter().rev().find(|spec| spec.role.is_quantized());
    linear.map_or("model.layers.0.mlp.down_proj", |spec| spec.name.trim_end_matches(".weight"))
}

/// The pixels of a task's picture, `[3, size, size]`; empty without one. Fails on a picture that cannot be used.
pub fn pixels(model: &Model, checkpoint: &Checkpoint, encode: &Encode) -> Result<Vec<f32>> {
    let Encode::Picture { image, .. } = encode else { return Ok(Vec::new()) };
    let Some(EncoderInputKind::Picture(picture)) = model.encoder.as_ref().map(|encoder| encoder.input) else {
        bail!("`{}` has no image input", model.architecture)
    };
    let preprocessor = Preprocessor::new(checkpoint.preprocessor_config.as_ref(), picture.size)?;
    let pixels = match image {
        Some(path) => preprocessor.open(path)?,
        None => preprocessor.generated(),
    };
    Ok(pixels.values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::needs::stored_bytes;
    use crate::events::Silent;
    use crate::quant::{FormatOptions, fp16, fp32, nf4};
    use crate::weights::WeightsChoice;
    use crate::weights::policy::Formats;

    #[test]
    fn bytes_of_a_selection_are_known_before_it_runs() {
        let request = ModelRequest {
            model_id: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny").to_owned(),
            revision: None,
            offline: true,
            weights: WeightsChoice::Auto,
            seed: 0,
            outlier_channels: 0,
            strict_config: false,
        };
        let model = open(&request, &Silent).unwrap().model;
        let formats = |precision| Formats::new(precision, FormatOptions::default());
        let stored = |precision| stored_bytes(&model, &formats(precision));
        let selected = |selection: Selection, precision| {
            let mut model = model.clone();
            selection.apply(&mut model.matrices).unwrap();
            stored_bytes(&model, &formats(precision))
        };
        assert_eq!(selected(Selection::Usual, nf4::ID), stored(nf4::ID));
        assert_eq!(selected(Selection::Only(Vec::new()), nf4::ID), stored(fp16::ID));
        let one = selected(Selection::Only(vec!["model.layers.0.mlp.down_proj.weight".to_owned()]), nf4::ID);
        assert!(stored(nf4::ID) < one && one < stored(fp16::ID));
        // The reference holds matrices in fp32; vectors count 2 bytes a value wherever they are.
        let matrices = |precision| stored(precision) - model.vector_bytes() as u64;
        assert_eq!(matrices(fp32::ID), 2 * matrices(fp16::ID));
    }
}
