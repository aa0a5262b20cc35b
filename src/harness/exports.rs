//! The same weights for engines that are not our own: the model's folder, or what is written of it, once for all of them.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::open_model::OpenModel;
use super::task::Task;
use crate::engines::ModelForm;
use crate::events::Silent;
use crate::ipc::failure_of;
use crate::protocol::{Encode, Failure};
use crate::quant;
use crate::weights::{export, gguf};

/// What was written, until the case ends.
#[derive(Default)]
pub struct Exports {
    directory: OnceLock<TempDir>,
    folder: OnceLock<Result<PathBuf, Failure>>,
    gguf: OnceLock<Result<PathBuf, Failure>>,
    pixels: OnceLock<Result<PathBuf, Failure>>,
}

impl Exports {
    /// The model in the form that an engine takes; `None`: as it is. Fails where it cannot be written so.
    pub fn model(&self, form: Option<ModelForm>, opened: &OpenModel) -> Result<PathBuf, Failure> {
        let checkpoint = &opened.checkpoint;
        let is_taken = match form {
            None => true,
            Some(ModelForm::Folder) => false,
            // llama.cpp's quantizer makes its other formats of F16.
            Some(ModelForm::Gguf) => checkpoint.quantized.is_some() || checkpoint.is_f16_gguf(),
        };
        if let Some(file) = checkpoint.gguf().filter(|_| is_taken) {
            return file.canonicalize().map_err(|error| Failure::error(format!("finding the GGUF file: {error}")));
        }
        let form = form.unwrap_or(ModelForm::Folder);
        let once = match form {
            ModelForm::Folder => &self.folder,
            ModelForm::Gguf => &self.gguf,
        };
        let make = || self.write(form, opened).map_err(|error| refused(&error));
        once.get_or_init(make).clone()
    }

    /// The task as an engine that computes no pixels takes it.
    pub fn task(&self, task: &Task, pixels: impl FnOnce() -> Result<Vec<f32>>) -> Result<Task, Failure> {
        let Encode::Picture { image, .. } = &task.encode else { return Ok(task.clone()) };
        let make = || self.write_pixels(pixels).map_err(|error| refused(&error));
        let pixels = self.pixels.get_or_init(make).clone()?;
        Ok(Task { encode: Encode::Picture { image: image.clone(), pixels: Some(pixels) }, ..task.clone() })
    }

    /// A file for the logits of a variant.
    pub fn logits_file(&self, label: &str) -> Result<PathBuf> {
        Ok(self.directory()?.join(format!("{label}.logits")))
    }

    fn directory(&self) -> Result<&Path> {
        if self.directory.get().is_none() {
            let made = tempfile::Builder::new().prefix("quantbench-").tempdir().context("making a temporary folder")?;
            let _ = self.directory.set(made);
        }
        Ok(self.directory.get().context("a temporary folder")?.path())
    }

    fn write(&self, form: ModelForm, opened: &OpenModel) -> Result<PathBuf> {
        let OpenModel { checkpoint, model, .. } = opened;
        let tensors = (model.matrices.as_slice(), model.vectors.as_slice());
        match form {
            ModelForm::Folder => {
                if let Some(folder) = checkpoint.folder() {
                    return Ok(folder.canonicalize()?);
                }
                let path = self.directory()?.join("model");
                export::export(checkpoint, tensors, quant::BASELINE, &path, &Silent)?;
                Ok(path)
            }
            ModelForm::Gguf => {
                let path = self.directory()?.join("model-f16.gguf");
                gguf::export(checkpoint, tensors, quant::BASELINE, &path, &Silent)?;
                Ok(path)
            }
        }
    }

    fn write_pixels(&self, pixels: impl FnOnce() -> Result<Vec<f32>>) -> Result<PathBuf> {
        let (values, path) = (pixels()?, self.directory()?.join("pixels.safetensors"));
        let size = (values.len() / 3).isqrt();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![3, size, size], &bytes)?;
        std::fs::write(&path, safetensors::serialize([("pixels", view)], None)?)?;
        Ok(path)
    }
}

/// One engine's row says why; the others go on.
fn refused(error: &anyhow::Error) -> Failure {
    match failure_of(error) {
        Failure::BadInput { message, .. } => Failure::Error { message },
        other => other,
    }
}
