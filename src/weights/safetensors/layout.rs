//! Which files of a folder are the checkpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{INDEX, SINGLE, short};
use crate::error::BadInput;
use crate::weights::{foreign, sniff};

/// The files of a checkpoint, in order of their names, with the index where there is one.
pub struct FileLayout {
    pub(super) files: Vec<PathBuf>,
    /// Tensor name → file name.
    pub(super) weight_map: Option<HashMap<String, String>>,
    /// Safetensors files of the folder that are not part of the checkpoint.
    pub(super) others: Vec<PathBuf>,
}

impl FileLayout {
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

/// Finds the weights of a folder: `model.safetensors`, else the shards that the index names. Fails with [`BadInput`] that names
/// what is there instead.
pub fn layout(folder: &Path) -> Result<FileLayout> {
    let single = folder.join(SINGLE);
    let (files, weight_map) = match single.is_file() {
        true => (vec![single], None),
        false => {
            let weight_map = index_of(folder)?;
            let files = shards(&weight_map).iter().map(|file| folder.join(file)).collect::<Vec<_>>();
            (files, Some(weight_map))
        }
    };
    let missing: Vec<&PathBuf> = files.iter().filter(|file| !file.is_file()).collect();
    if let Some(first) = missing.first() {
        return Err(BadInput::new(format!(
            "`{}`, which `{INDEX}` names, is missing, as are {} of {} files in all",
            short(first),
            missing.len(),
            files.len()
        ))
        .hint("download the missing files into the folder")
        .into());
    }
    let mut others: Vec<PathBuf> = foreign::names_in(folder).into_iter().map(|name| folder.join(name)).collect();
    others.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors") && !files.contains(path));
    Ok(FileLayout { files, weight_map, others })
}

fn index_of(folder: &Path) -> Result<HashMap<String, String>> {
    let index = folder.join(INDEX);
    match index.is_file() {
        true => read_index(&index),
        false => Err(foreign::no_weights(folder).into()),
    }
}

/// Tensor name → file name of a `model.safetensors.index.json`.
pub fn read_index(path: &Path) -> Result<HashMap<String, String>> {
    let bad = |what: String| BadInput::new(format!("`{}` is not an index of shards: {what}", short(path)));
    if let Some(error) = sniff::not_itself(path) {
        return Err(error.into());
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading `{}`", short(path)))?;
    let index: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map = index.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("no `weight_map`".to_owned()))?;
    let mut weight_map = HashMap::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| bad(format!("the file of `{tensor}` is not a string")))?;
        // An index comes from whoever made the checkpoint: it may name files beside itself and no others.
        if Path::new(file).components().any(|part| !matches!(part, std::path::Component::Normal(_))) || file.is_empty()
        {
            return Err(bad(format!("`{file}` is not a file inside the folder")).into());
        }
        weight_map.insert(tensor.clone(), file.to_owned());
    }
    match weight_map.is_empty() {
        true => Err(bad("`weight_map` is empty".to_owned()).into()),
        false => Ok(weight_map),
    }
}

/// The files of an index, each once, sorted.
pub fn shards(weight_map: &HashMap<String, String>) -> Vec<String> {
    let mut files: Vec<String> = weight_map.values().cloned().collect();
    files.sort();
    files.dedup();
    files
}
