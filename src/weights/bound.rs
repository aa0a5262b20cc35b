//! A checkpoint's files as the source of one model: each tensor that the plan names is found under the name that it has there.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use half::f16;
use safetensors::Dtype;

use super::bnb::{self, PreQuantized};
use super::names::{candidates, spellings};
use super::safetensors::{Safetensors, Tensor, listed};
use super::spec::{Elsewhere, MatrixSpec, Role, TensorSlice, VectorSpec};
use super::{Source, SourceInfo, packed, unread};
use crate::error::BadInput;
use crate::events::{Event, Listener};
use crate::quant::scheme::Scheme;
use crate::quant::{FormatId, Part, Stored};

/// A source that reads checkpoint files.
pub struct BoundSource {
    files: Arc<Safetensors>,
    /// Name in the plan → place in the files.
    names: HashMap<String, Located>,
    /// What linear layers were quantized into before they were saved.
    quantized: Option<PreQuantized>,
}

/// Place of a tensor of the plan in the files.
pub struct Located {
    /// Name of the tensor.
    pub tensor: String,
    /// The part of it, and the number of its values; `None` is the whole.
    pub slice: Option<(TensorSlice, usize)>,
    /// Whether a method quantized it: then the tensors of its module hold it, and perhaps none of this name.
    pub is_packed: bool,
}

/// Finds the tensors of a plan.
struct Finder<'a> {
    files: &'a Safetensors,
    scheme: Option<&'a dyn Scheme>,
    /// The names that the plan asks for.
    asked: HashSet<&'a str>,
}

impl Finder<'_> {
    /// A tensor or, of a matrix, a module in the form of the scheme.
    fn locate(&self, name: &str, others: &[Elsewhere], len: usize, is_matrix: bool) -> Option<Located> {
        let is_there = |candidate: &String| self.files.get(candidate).is_some();
        let is_packed =
            |module: &str| is_matrix && self.scheme.is_some_and(|scheme| packed::is_packed(self.files, scheme, module));
        let whole = candidates(name, &self.asked).into_iter().find_map(|tensor| {
            let is_packed = tensor.strip_suffix(".weight").is_some_and(is_packed);
            (is_packed || is_there(&tensor)).then_some(Located { tensor, slice: None, is_packed })
        });
        whole.or_else(|| {
            others.iter().find_map(|Elsewhere { tensor, slice }| {
                let slice = slice.map(|slice| (slice, len));
                spellings(tensor).into_iter().find_map(|tensor| {
                    let is_packed = is_packed(tensor.strip_suffix(".weight").unwrap_or(&tensor));
                    (is_packed || is_there(&tensor)).then_some(Located { tensor, slice, is_packed })
                })
            })
        })
    }
}

/// Marks the matrices with the formats that the files of a checkpoint hold them in, where its method says so. Those that are not as they must be
/// stay unmarked: their source says why.
pub fn hold(files: &Safetensors, own: &PreQuantized, matrices: &mut [MatrixSpec]) {
    let Some(scheme) = own.scheme.as_deref() else { return };
    let names: Vec<String> = matrices.iter().map(|spec| spec.name.clone()).collect();
    let asked = names.iter().map(String::as_str).collect();
    let finder = Finder { files, scheme: Some(scheme), asked };
    for spec in matrices {
        let located = finder.locate(&spec.name, &spec.others, spec.n * spec.k, true);
        spec.held = located.and_then(|located| packed::held(files, scheme, spec, &located).ok().flatten());
    }
}

/// What messages call a checkpoint and its model.
pub struct Labels<'a> {
    pub id: &'a str,
    pub model_type: &'a str,
}

impl BoundSource {
    /// Finds every tensor of a model. Fails with [`BadInput`] unless each is there in the right shape and in a dtype that can be
    /// cast. Warns of layers that are not quantized though others are, and of tensors that nobody reads.
    pub fn new(
        files: Arc<Safetensors>,
        quantized: Option<PreQuantized>,
        (matrices, vectors): (&[MatrixSpec], &[VectorSpec]),
        labels: &Labels,
        events: &dyn Listener,
    ) -> Result<Self> {
        let wanted_matrices = matrices.iter().map(|spec| (spec.name.as_str(), &spec.others, spec.n * spec.k, true));
        let wanted_vectors = vectors.iter().map(|spec| (spec.name.as_str(), &spec.others, spec.len, false));
        let wanted: Vec<(&str, &Vec<Elsewhere>, usize, bool)> = wanted_matrices.chain(wanted_vectors).collect();
        let asked: HashSet<&str> = wanted.iter().map(|(name, ..)| *name).collect();
        let mut names = HashMap::new();
        let mut absent = Vec::new();
        let finder = Finder { files: &files, scheme: quantized.as_ref().and_then(|own| own.scheme.as_deref()), asked };
        for &(name, others, len, is_matrix) in &wanted {
            match finder.locate(name, others, len, is_matrix) {
                Some(found) => drop(names.insert(name.to_owned(), found)),
                None => absent.push(name),
            }
        }
        if let Some(first) = absent.first() {
            return Err(absent_error(&files, labels, first, absent.len()).into());
        }
        let bound = Self { files, names, quantized };
        bound.check(matrices, vectors)?;
        bound.check_quantized(matrices, labels, events)?;
        let scheme = bound.scheme();
        if let Some(message) = unread::unread(&bound.files, &bound.names, scheme, labels.model_type)? {
            events.on(Event::Warning { name: "unread_tensors".to_owned(), message });
        }
        Ok(bound)
    }

    /// The name in the files; a name that is none of the plan's stands for itself.
    fn name_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.names.get(name).map_or(name, |located| located.tensor.as_str())
    }

    /// The part that the tensor of this name is of one of the files.
    fn slice_of(&self, name: &str) -> Option<&(TensorSlice, usize)> {
        self.names.get(name)?.slice.as_ref()
    }

    fn scheme(&self) -> Option<&dyn Scheme> {
        self.quantized.as_ref()?.scheme.as_deref()
    }

    /// Whether the method of the checkpoint holds a matrix.
    fn is_packed(&self, name: &str) -> bool {
        self.names.get(name).is_some_and(|located| located.is_packed)
    }

    fn get(&self, name: &str) -> Option<&Tensor> {
        self.files.get(self.name_of(name))
    }

    fn check(&self, matrices: &[MatrixSpec], vectors: &[VectorSpec]) -> Result<()> {
        for spec in matrices {
            if let (Some(scheme), Some(located)) = (self.scheme(), self.names.get(&spec.name).filter(|at| at.is_packed))
            {
                packed::held(&self.files, scheme, spec, located)?;
                continue;
            }
            match self.stored_precision(spec) {
                Some(precision) => bnb::check(&self.renamed(spec), precision, self.files.as_ref())?,
                None => self.check_tensor(&spec.name, &[spec.n, spec.k])?,
            }
        }
        vectors.iter().try_for_each(|spec| self.check_tensor(&spec.name, &[spec.len]))
    }

    /// The spec by its name in the files, where what belongs to a quantized matrix lies beside it.
    fn renamed(&self, spec: &MatrixSpec) -> MatrixSpec {
        MatrixSpec { name: self.name_of(&spec.name).to_owned(), ..spec.clone() }
    }

    /// The precision that a matrix is stored in, `None` where its values are plain.
    fn stored_precision(&self, spec: &MatrixSpec) -> Option<FormatId> {
        let is_whole = self.slice_of(&spec.name).is_none();
        let is_packed = is_whole && matches!(self.get(&spec.name)?.dtype, Dtype::U8 | Dtype::I8);
        let quantized = self.quantized.as_ref().filter(|_| is_packed && bnb::may_be_quantized(spec.role))?;
        quantized.scheme.is_none().then_some(quantized.precision)
    }

    fn check_tensor(&self, name: &str, shape: &[usize]) -> Result<()> {
        let slice = self.slice_of(name).map(|(slice, _)| slice.shape_around(shape));
        let name = self.name_of(name);
        let Some(tensor) = self.files.get(name) else { anyhow::bail!("no tensor is named `{name}`") };
        let file = self.files.file_of(tensor);
        if !tensor.is_plain() {
            return Err(BadInput::new(format!(
                "tensor `{name}` in `{file}` is {}, which cannot be cast to fp16; allowed are F16, BF16 and F32",
                tensor.dtype
            ))
            .hint(hint_of(tensor.dtype))
            .into());
        }
        let (rows, columns) = tensor.matrix();
        let fits = match shape {
            _ if slice.is_some() => slice.as_ref() == Some(&tensor.shape),
            [len] => tensor.shape.iter().product::<usize>() == *len && tensor.shape.len() <= 1,
            _ => tensor.shape.len() > 1 && shape == [rows, columns],
        };
        match fits {
            true => Ok(()),
            false => Err(BadInput::new(format!(
                "tensor `{name}` in `{file}` has shape {:?}, the model of config.json needs {:?}",
                tensor.shape,
                slice.as_deref().unwrap_or(shape)
            ))
            .hint("check that config.json and the weights belong together")
            .into()),
        }
    }

    /// A record must not be called by a precision that holds none of its weights.
    fn check_quantized(&self, matrices: &[MatrixSpec], labels: &Labels, events: &dyn Listener) -> Result<()> {
        let Some(own) = &self.quantized else { return Ok(()) };
        let linear = matrices.iter().filter(|spec| spec.role.is_quantized());
        let (packed, plain): (Vec<_>, Vec<_>) =
            linear.partition(|spec| self.is_packed(&spec.name) || self.stored_precision(spec).is_some());
        if packed.is_empty() && !plain.is_empty() {
            return Err(BadInput::new(format!(
                "config.json's quantization_config says `{}`, but none of the {} linear layers of `{}` is held in it",
                own.precision,
                plain.len(),
                labels.id
            ))
            .hint("remove `quantization_config` from config.json to measure the plain weights")
            .into());
        }
        // transformers 5 leaves experts and routers as they are, without saying so.
        let is_left = |spec: &&&MatrixSpec| spec.role != Role::Projection || own.skips(&spec.name);
        let forgotten: Vec<String> =
            plain.iter().filter(|spec| !is_left(spec)).map(|spec| format!("`{}`", spec.name)).collect();
        if !forgotten.is_empty() {
            let message = format!(
                "{} of {} linear layers are held in plain values and not in `{}`, which config.json's {} \
                 does not say: {}",
                forgotten.len(),
                packed.len() + plain.len(),
                own.precision,
                own.scheme.as_ref().map_or("llm_int8_skip_modules", |scheme| scheme.skip_key()),
                listed(&forgotten)
            );
            events.on(Event::Warning { name: "partly_quantized".to_owned(), message });
        }
        Ok(())
    }
}

fn hint_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::U8 | Dtype::I8 | Dtype::U32 | Dtype::I32 => {
            "the checkpoint is quantized in a way that config.json does not describe; name the one that it was made from"
        }
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => {
            "the checkpoint is quantized to fp8 in a way that config.json does not describe; name the one that it was made from"
        }
        _ => "save the weights in one of these dtypes",
    }
}

fn absent_error(files: &Safetensors, labels: &Labels, name: &str, count: usize) -> BadInput {
    let others = match count - 1 {
        0 => String::new(),
        others => format!(" and {others} others"),
    };
    let names = files.names();
    let nearest = names.iter().min_by_key(|have| (strsim::levenshtein(have, name), have.as_str()));
    let nearest = nearest.map(|nearest| format!("; nearest is `{nearest}`")).unwrap_or_default();
    let trace = files.trace_of(&spellings(name)).map(|trace| format!("; {trace}")).unwrap_or_default();
    let hint = if !trace.is_empty() {
        "save the model again, so that the index and its files belong together"
    } else if names.iter().any(|have| have.ends_with(".qweight") || have.ends_with(".weight_packed")) {
        "the checkpoint is quantized by GPTQ, AWQ or the like, and config.json's quantization_config does not say how; name the model that it \
         was made from"
    } else if names.iter().any(|have| have.contains(".lora_A.") || have.contains(".base_layer.")) {
        "the checkpoint holds a LoRA adapter that is not merged; merge it (`merge_and_unload()` in PEFT) and save the model"
    } else if name.ends_with("lm_head.weight") {
        "config.json says that the head is not tied (`tie_word_embeddings`), so the checkpoint must hold it"
    } else {
        "check that config.json and the weights belong together"
    };
    BadInput::new(format!(
        "`{}` needs tensor `{name}`{others}, absent from `{}`: {} tensors read{nearest}{trace}",
        labels.model_type,
        labels.id,
        files.count()
    ))
    .hint(hint)
}

impl Source for BoundSource {
    fn info(&self) -> &SourceInfo {
        self.files.info()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.get(name).filter(|_| self.slice_of(name).is_none()).map(|tensor| tensor.shape.clone())
    }

    fn names(&self) -> Vec<String> {
        self.files.names()
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> Result<usize> {
        match self.slice_of(name) {
            Some((slice, _)) => self.files.read_slice(self.name_of(name), slice, rows, out),
            None => self.files.read_rows(self.name_of(name), rows, out),
        }
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        match self.slice_of(name) {
            Some((slice, _)) => self.files.read_slice_f32(self.name_of(name), slice, rows, out),
            None => self.files.read_rows_f32(self.name_of(name), rows, out),
        }
    }

    fn raw_dtype(&self, name: &str) -> Option<Dtype> {
        let is_whole = self.slice_of(name).is_none();
        self.get(name).filter(|tensor| is_whole && tensor.is_plain()).map(|tensor| tensor.dtype)
    }

    fn read_raw(&self, name: &str, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        self.files.read_raw(self.name_of(name), rows, out)
    }

    fn is_quantized(&self) -> bool {
        self.quantized.is_some()
    }

    fn parts(&self, spec: &MatrixSpec) -> Option<Result<Vec<Part>>> {
        let precision = self.stored_precision(spec)?;
        Some(bnb::parts(&self.renamed(spec), precision, self.files.as_ref()))
    }

    fn stored(&self, spec: &MatrixSpec) -> Option<Result<Box<dyn Stored>>> {
        packed::read(&self.files, self.quantized.as_ref()?, spec, self.names.get(&spec.name)?)
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        if let (Some(scheme), Some(located)) = (self.scheme(), self.names.get(name).filter(|at| at.is_packed)) {
            return packed::bytes(&self.files, scheme, located);
        }
        let bytes = self.get(name).map_or(0, |tensor| tensor.bytes);
        match (self.slice_of(name), self.get(name)) {
            (Some((_, len)), Some(tensor)) => {
                let all: usize = tensor.shape.iter().product();
                bytes * *len as u64 / all.max(1) as u64
            }
            _ => bytes,
        }
    }
}
