//! Folders made of the golden models, and what the executors make of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use quantbench::engine::{self, Device, EncoderInput, Setup};
use quantbench::error;
use quantbench::events::{Event, Listener, Silent};
use quantbench::harness::picture::Preprocessor;
use quantbench::kernels::isa::Isa;
use quantbench::plan::{EncoderInputKind, Model};
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// What the values of the field's reports were asked with.
pub const IDS: [u32; 8] = [1, 2, 3, 40, 50, 60, 70, 80];

/// Printed values are rounded to 4 digits, and fp32 sums in another order move logits by 3e-5 (tests/golden/README.md).
pub const LOGIT_TOLERANCE: f32 = 2e-4;

pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// fp16 values that are not all the same.
    pub fn half(shape: &[usize]) -> Self {
        let n: usize = shape.iter().product();
        let value = |i: usize| half::f16::from_f32((i % 13) as f32 / 8.0 - 0.7);
        Self { dtype: "F16", shape: shape.to_vec(), bytes: (0..n).flat_map(|i| value(i).to_le_bytes()).collect() }
    }

    /// The rows from the last to the first.
    pub fn reversed(&self) -> Self {
        let row = self.bytes.len() / self.shape[0];
        Self { bytes: self.bytes.chunks(row).rev().flatten().copied().collect(), ..self.clone() }
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

/// A model's folder that a test changes.
pub struct Folder {
    place: tempfile::TempDir,
    pub config: Value,
    pub tensors: Tensors,
}

pub fn golden(kind: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(kind).join(name)
}

impl Folder {
    pub fn of(model: &str) -> Self {
        Self::of_kind("models", model)
    }

    /// `kind` is `models`, or `bnb` for one that was saved quantized.
    pub fn of_kind(kind: &str, name: &str) -> Self {
        let (from, place) = (golden(kind, name), tempfile::tempdir().unwrap());
        for file in fs::read_dir(&from).unwrap().map(|file| file.unwrap()) {
            fs::copy(file.path(), place.path().join(file.file_name())).unwrap();
        }
        let config = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
        let bytes = fs::read(from.join(SINGLE)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let owned = |view: &safetensors::tensor::TensorView| Tensor {
            dtype: match view.dtype() {
                Dtype::F16 => "F16",
                Dtype::F32 => "F32",
                Dtype::U8 => "U8",
                Dtype::I8 => "I8",
                other => panic!("{other} in a golden model"),
            },
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        let tensors = tensors.tensors().iter().map(|(name, view)| (name.clone(), owned(view))).collect();
        Self { place, config, tensors }
    }

    pub fn path(&self) -> &Path {
        self.place.path()
    }

    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub fn with(mut self, name: &str, tensor: Tensor) -> Self {
        assert!(self.tensors.insert(name.to_owned(), tensor).is_none(), "`{name}` is there");
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        assert!(self.tensors.remove(name).is_some(), "no `{name}`");
        self
    }

    pub fn renamed(mut self, rename: impl Fn(&str) -> String) -> Self {
        self.tensors = self.tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        self
    }

    /// One file of weights.
    pub fn write(self) -> Self {
        self.write_file(SINGLE, &self.tensors);
        self.write_config()
    }

    pub fn write_config(self) -> Self {
        fs::write(self.path().join("config.json"), self.config.to_string()).unwrap();
        self
    }

    pub fn write_file(&self, name: &str, tensors: &Tensors) {
        fs::write(self.path().join(name), file_of(tensors)).unwrap();
    }

    /// Shards with an index that gives tensors to files.
    pub fn write_shards(self, shards: &[(&str, Tensors)], weight_map: &BTreeMap<String, String>) -> Self {
        fs::remove_file(self.path().join(SINGLE)).unwrap();
        for (name, tensors) in shards {
            self.write_file(name, tensors);
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        fs::write(self.path().join(INDEX), index.to_string()).unwrap();
        self.write_config()
    }
}

/// A safetensors file.
fn file_of(tensors: &Tensors) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, Tensor { dtype, shape, bytes }) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// Keeps warnings.
#[derive(Default)]
struct Heard(Mutex<Vec<(String, String)>>);

impl Listener for Heard {
    fn on(&self, event: Event) {
        if let Event::Warning { name, message } = event {
            self.0.lock().unwrap().push((name, message));
        }
    }
}

/// A greedy run of four tokens.
#[derive(Debug)]
pub struct Run {
    pub ids: Vec<u32>,
    /// Of the first step.
    pub logits: Vec<f32>,
    pub model: Model,
    pub weights_bytes: u64,
    /// Name and message.
    pub warnings: Vec<(String, String)>,
}

impl Run {
    /// Fails unless ids and logits are these.
    pub fn is(&self, ids: [u32; 4], logits: [f32; 4]) -> &Self {
        assert_eq!(self.ids, ids);
        for (seen, expected) in self.logits.iter().zip(logits) {
            assert!((seen - expected).abs() <= LOGIT_TOLERANCE, "{:?}, not {logits:?}", &self.logits[..4]);
        }
        self
    }

    /// Fails unless the warnings have these names, in order.
    pub fn warns(&self, names: &[&str]) -> &Self {
        let seen: Vec<&str> = self.warnings.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(seen, names, "{:#?}", self.warnings);
        self
    }

    pub fn message(&self, name: &str) -> &str {
        let found = self.warnings.iter().find(|(seen, _)| seen == name);
        &found.unwrap_or_else(|| panic!("no `{name}` in {:?}", self.warnings)).1
    }
}

impl Folder {
    pub fn request(&self) -> ModelRequest {
        ModelRequest::of(self.path().display().to_string())
    }

    pub fn run(&self, precision: &str) -> Run {
        let [reference, cpu] = [false, true].map(|on_cpu| self.try_run(precision, on_cpu).unwrap());
        assert_eq!(reference.ids, cpu.ids, "the executors disagree");
        for (a, b) in reference.logits.iter().zip(&cpu.logits) {
            assert!((a - b).abs() <= LOGIT_TOLERANCE, "the executors disagree: {a} and {b}");
        }
        assert_eq!(reference.warnings, cpu.warnings);
        cpu
    }

    /// The model from a file of the folder, opened as a worker opens it.
    pub fn try_run(&self, precision: &str, on_cpu: bool) -> anyhow::Result<Run> {
        let heard = Heard::default();
        let checkpoint = weights::open(&self.request(), &heard)?;
        let model = quantbench::models::build(&checkpoint.config)?;
        let source = checkpoint.source_with(&model.matrices, &model.vectors, &heard)?;
        let setup = Setup {
            model: &model,
            source: source.as_ref(),
            formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
            device: Device::Cpu,
            threads: 2,
            sequences: 1,
            kv_format: Device::Cpu.kv_format(),
            capacity: 320,
            encoder_capacity: 256,
            cuda_graph: true,
        };
        let loaded = match on_cpu {
            true => engine::cpu::load(&setup, Isa::detect(), &Silent)?,
            false => engine::reference::load(&setup, &Silent)?,
        };
        let mut session = loaded.session;
        let first = match model.encoder.as_ref().map(|encoder| encoder.input) {
            None => session.prefill(&IDS)?,
            Some(EncoderInputKind::Tokens) => {
                session.encode(EncoderInput::Tokens(&IDS))?;
                session.prefill(&[model.decoder_start.unwrap()])?
            }
            Some(EncoderInputKind::Picture(picture)) => {
                let config = checkpoint.preprocessor_config.as_ref();
                let pixels = Preprocessor::new(config, picture.size)?.open(&self.path().join("image.png"))?.values;
                session.encode(EncoderInput::Pixels(&pixels))?;
                let image = vec![picture.token; picture.patches()];
                session.prefill(&[image, vec![2, 5, 6, 7]].concat())?
            }
        };
        let (mut ids, logits) = (vec![first], session.logits()?);
        session.decode(3, &mut |id| ids.push(id))?;
        let (weights_bytes, warnings) = (session.footprint().weights_bytes, heard.0.into_inner().unwrap());
        Ok(Run { ids, logits, weights_bytes, warnings, model })
    }

    /// The error of opening it, which must hold these words; message and hint.
    pub fn refused(&self, words: &[&str]) -> String {
        let error = self.try_run("fp16", true).expect_err(words[0]);
        refused(&error, words)
    }
}

/// Fails unless `error` is the user's to mend, holds these words in message or hint, and names no path.
pub fn refused(error: &anyhow::Error, words: &[&str]) -> String {
    assert!(error.is::<error::BadInput>(), "{error:#}");
    let said = format!("{error:#}\nhint: {}", error::hint(error).expect("a hint"));
    for word in words {
        assert!(said.contains(word), "`{word}` is not in `{said}`");
    }
    said
}

/// The binary with a folder as its model.
pub fn quantbench(folder: &Folder, args: &[&str]) -> Output {
    let place = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.args(args).args(["--model-id", &folder.path().display().to_string()]).current_dir(place.path());
    command.env("HF_HOME", place.path()).output().unwrap()
}
