//! What config.json and generation_config.json say is computed, harmless, refused or told. Right values by transformers 5.24 (fp16
//! weights, fp32 compute, eager attention), run on the golden models with one change each.

mod families;
mod refused;
mod values;
mod walk;

use std::fs;
use std::path::{Path, PathBuf};

use quantbench::error::BadInput;
use quantbench::events::{Collector, Silent};
use quantbench::harness;
use quantbench::plan::Model;
use quantbench::weights::{self, Checkpoint, ModelRequest};
use serde_json::{Map, Value};
use tempfile::TempDir;

type Object = Map<String, Value>;

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(model)
}

/// A copy of a golden model, which may be changed.
struct Folder(TempDir);

impl Folder {
    fn of(model: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden(model)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        Self(folder)
    }

    /// With one change to config.json.
    fn changed(model: &str, change: impl FnOnce(&mut Object)) -> Self {
        Self::of(model).edit("config.json", change)
    }

    fn edit(self, file: &str, change: impl FnOnce(&mut Object)) -> Self {
        let mut object = object(&self.text(file));
        change(&mut object);
        self.write(file, &Value::Object(object).to_string())
    }

    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.0.path().join(file)).unwrap()
    }

    fn write(self, file: &str, text: &str) -> Self {
        fs::write(self.0.path().join(file), text).unwrap();
        self
    }

    fn without(self, file: &str) -> Self {
        fs::remove_file(self.0.path().join(file)).unwrap();
        self
    }

    fn request(&self) -> ModelRequest {
        ModelRequest::of(self.0.path().display().to_string())
    }

    fn open(&self) -> Checkpoint {
        weights::open(&self.request(), &Silent).unwrap()
    }

    /// The plan, and name and message of each warning.
    fn build(&self) -> Result<(Model, Vec<(String, String)>), BadInput> {
        let collector = Collector::new(&Silent);
        let model = harness::build(&self.open(), &self.request(), &collector)?;
        Ok((model, collector.warnings()))
    }
}

/// An error without what candle appends.
fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

fn object(text: &str) -> Object {
    serde_json::from_str(text).unwrap()
}

/// `{"a": 1}` over a config: each key takes the place of its own, and `remove` keys go.
fn set(keys: Value) -> impl FnOnce(&mut Object) {
    move |config| config.extend(keys.as_object().unwrap().clone())
}
