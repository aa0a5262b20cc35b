//! Which file each tensor is read from, whatever the index says.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use anyhow::Result;

use super::header::read_header;
use super::{INDEX, SINGLE, Safetensors, Tensor, short};
use crate::error::BadInput;

impl Safetensors {
    /// Settles which file each tensor is read from.
    pub(super) fn place(
        &mut self,
        places: BTreeMap<String, Vec<Tensor>>,
        weight_map: Option<&HashMap<String, String>>,
    ) -> Result<()> {
        let named = |name: &str| weight_map.and_then(|map| map.get(name));
        let mut twice = Vec::new();
        for (name, mut at) in places {
            // transformers and vLLM read file after file, so that the last one's values stay.
            let Some(last) = at.pop() else { continue };
            let differing = self.differing(&at, &last)?;
            let is_twice = differing.is_some();
            if let Some(other) = differing {
                let [first, last_file] = [other, &last].map(|tensor| self.files[tensor.shard].name.clone());
                if !named(&name).is_some_and(|file| self.is_file(&last, file)) {
                    return Err(BadInput::new(format!(
                        "tensor `{name}` lies in `{first}` and in `{last_file}` with differing values, and `{INDEX}` does not name \
                         the second, which transformers would take"
                    ))
                    .hint("save the model again, or remove the file that does not belong to it")
                    .into());
                }
                twice.push(format!("`{name}` (read from `{last_file}`, not from `{first}`)"));
            }
            // Of copies it is the index's choice.
            let chosen = named(&name).and_then(|file| at.iter().find(|tensor| self.is_file(tensor, file)));
            let tensor = chosen.filter(|_| !is_twice).cloned().unwrap_or(last);
            self.tensors.insert(name, tensor);
        }
        if !twice.is_empty() {
            let message = format!("two files hold a tensor with differing values: {}", listed(&twice));
            self.remarks.push(("duplicate_tensors", message));
        }
        self.compare_with_index(weight_map);
        Ok(())
    }

    /// The first of `others` with other values than `tensor`.
    fn differing<'a>(&self, others: &'a [Tensor], tensor: &Tensor) -> Result<Option<&'a Tensor>> {
        for other in others {
            if !self.same_bytes(other, tensor)? {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    fn compare_with_index(&mut self, weight_map: Option<&HashMap<String, String>>) {
        let Some(map) = weight_map else { return };
        let (mut elsewhere, mut nowhere) = (Vec::new(), Vec::new());
        for (name, file) in map.iter().collect::<BTreeMap<_, _>>() {
            match self.tensors.get(name) {
                Some(tensor) if self.is_file(tensor, file) => {}
                Some(tensor) => elsewhere.push(format!("`{name}` (in `{}`)", self.files[tensor.shard].name)),
                None => {
                    nowhere.push(format!("`{name}`"));
                    self.misplaced.insert(name.clone(), file.clone());
                }
            }
        }
        let mut said = Vec::new();
        if !elsewhere.is_empty() {
            said.push(format!(
                "gives {} to another file than the one that holds it, which is read",
                listed(&elsewhere)
            ));
        }
        if !nowhere.is_empty() {
            said.push(format!("names {}, which no file holds", listed(&nowhere)));
        }
        if !said.is_empty() {
            self.remarks.push(("index_disagrees", format!("`{INDEX}` {}", said.join("; it "))));
        }
    }

    /// Where a tensor that is in no file of the checkpoint might be, for a message: what the index says, or a file beside it.
    pub fn trace_of(&self, names: &[String]) -> Option<String> {
        if let Some(file) = names.iter().find_map(|name| self.misplaced.get(name)) {
            return Some(format!("`{INDEX}` gives it to `{file}`, which does not hold it"));
        }
        let holds = |path: &&PathBuf| {
            let header = read_header(path).ok();
            header.is_some_and(|(_, metadata)| names.iter().any(|name| metadata.info(name).is_some()))
        };
        let other = self.others.iter().find(holds)?;
        let why = match other.with_file_name(SINGLE).is_file() {
            true => format!("is not read beside `{SINGLE}`"),
            false => format!("is not named by `{INDEX}`"),
        };
        Some(format!("it lies in `{}`, which {why}", short(other)))
    }
}

/// The first few of many.
pub fn listed(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let first = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => first,
        1 => format!("{first} and 1 other"),
        rest => format!("{first} and {rest} others"),
    }
}
