//! Golden tensors, as modules of a checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantbench::quant::Stored;
use quantbench::quant::bnb4::Blocks4;
use quantbench::quant::scheme::{self, Module, ModuleTensors, Scheme, Section};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

pub fn root() -> PathBuf {
    match std::env::var_os("QUANTBENCH_FORMATS") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/formats"),
    }
}

/// A file of golden tensors.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn open(name: &str) -> Self {
        let path = root().join("tensors").join(format!("{name}.safetensors"));
        Self(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    pub fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).expect("a golden file")
    }

    pub fn get(&self, name: &str) -> Option<(Dtype, Vec<usize>, Vec<u8>)> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).ok()?;
        Some((tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()))
    }

    pub fn f32s(&self, name: &str) -> Vec<f32> {
        let (_, _, bytes) = self.get(name).unwrap_or_else(|| panic!("no `{name}`"));
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    pub fn f64s(&self, name: &str) -> Vec<f64> {
        let (_, _, bytes) = self.get(name).unwrap_or_else(|| panic!("no `{name}`"));
        bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
    }

    /// What stands in front of `.dequant`, sorted.
    pub fn entries(&self) -> Vec<String> {
        let tensors = self.tensors();
        let names = tensors.names().into_iter().filter_map(|name| name.strip_suffix(".dequant"));
        let mut entries: Vec<String> = names.map(str::to_owned).collect();
        entries.sort();
        entries
    }
}

/// Tensors of a module by their names behind the module's.
#[derive(Debug, Clone, Default)]
pub struct Tensors(pub Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    /// Those of a golden entry, without what is expected of it.
    pub fn of(golden: &Golden, entry: &str) -> Self {
        let tensors = golden.tensors();
        let own = tensors.names().into_iter().filter_map(|name| name.strip_prefix(&format!("{entry}.")));
        let own = own.filter(|name| !["dequant", "y"].contains(name));
        let read = |name: &str| {
            let (dtype, shape, bytes) = golden.get(&format!("{entry}.{name}")).expect("named above");
            (name.to_owned(), dtype, shape, bytes)
        };
        Self(own.map(read).collect())
    }

    pub fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.0.iter_mut().find(|tensor| tensor.0 == name).unwrap_or_else(|| panic!("no `{name}`"))
    }

    pub fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.0.push((name.to_owned(), dtype, shape.to_vec(), bytes));
    }

    pub fn without(mut self, name: &str) -> Self {
        self.0.retain(|tensor| tensor.0 != name);
        self
    }

    pub fn renamed(mut self, from: &str, to: &str) -> Self {
        self.tensor(from).0 = to.to_owned();
        self
    }

    /// The matrix of a module `[n, k]`.
    pub fn read(&self, scheme: &dyn Scheme, (n, k): (usize, usize)) -> anyhow::Result<Box<dyn Stored>> {
        let name = "model.layers.0.mlp.up_proj";
        let module = Module { name, planned: name, n, k, slice: None, tensors: self };
        let (format, bytes) = scheme.held(&module)?;
        let stored = scheme.read(&module)?;
        // What is known before it is read is what it takes.
        assert_eq!(stored.parts().iter().map(|part| part.bytes.len()).sum::<usize>() as u64, bytes, "{format}");
        Ok(stored)
    }
}

impl ModuleTensors for Tensors {
    fn find(&self, suffix: &str) -> Option<(Dtype, Vec<usize>)> {
        self.0.iter().find(|tensor| tensor.0 == suffix).map(|(_, dtype, shape, _)| (*dtype, shape.clone()))
    }

    fn read(&self, suffix: &str, first: usize, len: usize) -> anyhow::Result<Vec<u8>> {
        let found = self.0.iter().find(|tensor| tensor.0 == suffix);
        let bytes = found.and_then(|tensor| tensor.3.get(first..first.checked_add(len)?));
        bytes.map(<[u8]>::to_vec).ok_or_else(|| anyhow::anyhow!("`{suffix}` is too short"))
    }
}

/// The scheme of a section.
pub fn scheme(section: &Value) -> anyhow::Result<Arc<dyn Scheme>> {
    let method = section["quant_method"].as_str().unwrap_or_default();
    let keys = section.as_object().expect("an object");
    scheme::method(method).expect("a known method").read(&Section::new(keys))
}

/// bitsandbytes' tensors under the names of a checkpoint.
pub fn of_bitsandbytes(golden: &Golden, entry: &str, shape: (usize, usize)) -> (Tensors, Arc<dyn Scheme>) {
    let kind = entry.strip_prefix("bnb.").expect("bitsandbytes'");
    let (quant_type, block) = kind.split_once("-b").expect("a type and its block");
    let block: usize = block.parse().expect("a size");
    let mut tensors = Tensors::of(golden, entry).renamed("packed", "weight").renamed("absmax", "weight.absmax");
    tensors = tensors.renamed("code", "weight.quant_map");
    let (n, k) = shape;
    let state = serde_json::json!({"quant_type": quant_type, "blocksize": block, "dtype": "float16", "shape": [n, k]});
    let text = state.to_string().into_bytes();
    let scheme = Blocks4::parse(&text).expect("a state").scheme();
    tensors.push(&format!("weight.quant_state.bitsandbytes__{quant_type}"), Dtype::U8, &[text.len()], text);
    (tensors, scheme)
}
