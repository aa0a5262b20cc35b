//! A checkpoint as one GGUF file, with which llama.cpp runs the same weights: in F16, or in the types of one of its own recipes.
//!
//! The file has no vocabulary (`no_vocab`): it is for token ids.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use half::f16;
use serde_json::Value;

use super::recipe::{Recipe, plain};
use super::{
    ALIGNMENT, F16, F32, FAMILIES, FLOAT32, Family, MAGIC, ROPE_FREQS, STRING, UINT32, VERSION, gguf_name, is_turned,
    order, recipe,
};
use crate::error::{BadInput, nearest};
use crate::events::{Event, Listener, Unit};
use crate::quant::ggml::GgmlType;
use crate::quant::{FormatId, FormatOptions, HalfMatrix};
use crate::weights::spec::{MatrixSpec, Role, VectorSpec};
use crate::weights::{Checkpoint, Source};

/// A tensor of the file.
struct Tensor {
    name: String,
    /// Its name in the checkpoint; `None` for the divisors of long contexts.
    from: Option<String>,
    /// Rows and their length; a vector has one.
    n: usize,
    k: usize,
    kind: &'static GgmlType,
    /// Rows of a head, where its rows are put in another order.
    head_rows: Option<usize>,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        (self.n * self.kind.row_bytes(self.k).unwrap_or(0)) as u64
    }
}

/// Writes `checkpoint`, whose model needs these tensors, by the recipe of `format` to the new file `output`, which is written atomically. Gives its size and how many
/// finite values became infinite in fp16.
///
/// Fails with [`BadInput`] for a family or a setting that llama.cpp computes otherwise or that is not written yet, for a checkpoint that is
/// quantized already, and where nothing can be written at `output`.
pub fn export(
    checkpoint: &Checkpoint,
    (matrices, vectors): (&[MatrixSpec], &[VectorSpec]),
    format: FormatId,
    output: &Path,
    events: &dyn Listener,
) -> Result<(u64, usize)> {
    let recipe = Recipe::of(format).ok_or_else(|| not_written(format))?;
    if let Some(own) = &checkpoint.quantized {
        let message =
            format!("`{}` is saved in `{}`, and a GGUF is made of plain weights", checkpoint.id, own.precision);
        return Err(BadInput::new(message).hint("name the model that it was made from").into());
    }
    let config = Config(&checkpoint.config);
    let family = config.family()?;
    let factors = config.rope_factors()?;
    let tensors = tensors(family, &config, &recipe, (matrices, vectors), factors.as_deref())?;
    let source = checkpoint.source_with(matrices, vectors, events)?;
    let folder = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let unwritable = |error: std::io::Error| BadInput::new(format!("cannot write `{}`: {error}", output.display()));
    let temporary = tempfile::NamedTempFile::new_in(folder).map_err(unwritable)?;
    let mut file = BufWriter::with_capacity(1 << 20, temporary.as_file());
    let header = header(&config.metadata(family, &recipe, &checkpoint.id)?, &tensors);
    file.write_all(&header)?;
    let total = tensors.iter().map(Tensor::bytes).sum();
    events.on(Event::Begin { label: "export gguf".to_owned(), total, unit: Unit::Bytes });
    let (mut done, mut overflow) = (0, 0);
    for tensor in &tensors {
        overflow += write(&mut file, tensor, source.as_ref(), factors.as_deref().unwrap_or_default())?;
        done += tensor.bytes();
        events.on(Event::Progress { done });
    }
    events.on(Event::End);
    file.flush().context("writing the GGUF file")?;
    drop(file);
    let written = temporary.persist_noclobber(output).map_err(|failed| unwritable(failed.error))?;
    // Temporary files are private; this one is like any other.
    let bytes = written.metadata()?.len();
    make_readable(output)?;
    Ok((bytes, overflow))
}

#[cfg(unix)]
fn make_readable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o644))?)
}

/// Whether LongRoPE has one list of divisors for all lengths, and no other factor.
fn is_one_list(rope: &Value) -> bool {
    rope["short_factor"] == rope["long_factor"] && rope["attention_factor"].as_f64() == Some(1.0)
}

fn floats(list: &Value) -> Vec<f32> {
    list.as_array().into_iter().flatten().filter_map(Value::as_f64).map(|value| value as f32).collect()
}

/// As messages list them.
fn families() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}

/// config.json, read for llama.cpp's metadata.
struct Config<'a>(&'a Value);

impl Config<'_> {
    fn family(&self) -> Result<&'static Family, BadInput> {
        let own = self.0["model_type"].as_str().unwrap_or_default();
        let found = FAMILIES.iter().find(|family| family.model_type == own);
        found.ok_or_else(|| {
            let near = nearest(own, FAMILIES.iter().map(|family| family.model_type));
            let near = near.map_or(String::new(), |near| format!("; the nearest is `{near}`"));
            BadInput::new(format!("no GGUF is written for `{own}`"))
                .hint(format!("`--format gguf` writes {}{near}", families()))
        })
    }

    fn number(&self, key: &str) -> Option<u32> {
        self.0[key].as_u64().and_then(|n| u32::try_from(n).ok())
    }

    fn needed(&self, key: &str) -> Result<u32, BadInput> {
        self.number(key).ok_or_else(|| BadInput::new(format!("config.json has no number `{key}`")))
    }

    fn float(&self, key: &str) -> Option<f64> {
        let of_rope = || self.0["rope_parameters"][key].as_f64();
        self.0[key].as_f64().or_else(of_rope)
    }

    fn head_dim(&self) -> Result<u32, BadInput> {
        let by_width = || Ok(self.needed("hidden_size")? / self.needed("num_attention_heads")?.max(1));
        self.number("head_dim").map_or_else(by_width, Ok)
    }

    /// Elements of a head that turn.
    fn turned(&self) -> Result<u32, BadInput> {
        let share = self.float("partial_rotary_factor").unwrap_or(1.0);
        Ok((f64::from(self.head_dim()?) * share) as u32)
    }

    fn theta(&self) -> f64 {
        self.float("rope_theta").unwrap_or(10_000.0)
    }

    /// Llama 3's divisors of the frequencies, one for each pair of elements; `None` without scaling. Other scalings are refused.
    fn rope_factors(&self) -> Result<Option<Vec<f32>>, BadInput> {
        let of = |key: &str| self.0.get(key).filter(|rope| rope.is_object());
        let Some(rope) = of("rope_scaling").or_else(|| of("rope_parameters")) else { return Ok(None) };
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
        match kind {
            "default" => return Ok(None),
            "llama3" => {}
            // As a file with divisors of its own is read.
            "longrope" if is_one_list(rope) => return Ok(Some(floats(&rope["long_factor"]))),
            other => return Err(BadInput::new(format!("no GGUF is written with the rope scaling `{other}`"))),
        }
        let number = |key: &str| {
            rope[key]
                .as_f64()
                .ok_or_else(|| BadInput::new(format!("config.json has no number `{key}` of rope scaling")))
        };
        let (factor, low, high) = (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
        let (context, turned) = (number("original_max_position_embeddings")?, self.turned()?);
        let (low_wavelength, high_wavelength) = (context / low, context / high);
        let divisor = |pair: u32| {
            let wavelength = 2.0 * std::f64::consts::PI * self.theta().powf(f64::from(2 * pair) / f64::from(turned));
            if wavelength < high_wavelength {
                1.0
            } else if wavelength > low_wavelength {
                factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        Ok(Some((0..turned / 2).map(|pair| divisor(pair) as f32).collect()))
    }

    fn metadata(&self, family: &Family, recipe: &Recipe, name: &str) -> Result<Vec<(String, Meta)>, BadInput> {
        let of = |key: &str, value| (format!("{}.{key}", family.name), value);
        let (heads, head_dim) = (self.needed("num_attention_heads")?, self.head_dim()?);
        let mut all = vec![
            ("general.architecture".to_owned(), Meta::Text(family.name.to_owned())),
            ("general.name".to_owned(), Meta::Text(name.to_owned())),
            ("general.quantization_version".to_owned(), Meta::Number(2)),
            of("vocab_size", Meta::Number(self.needed("vocab_size")?)),
            of("context_length", Meta::Number(self.needed("max_position_embeddings")?)),
            of("embedding_length", Meta::Number(self.needed("hidden_size")?)),
            of("block_count", Meta::Number(self.needed("num_hidden_layers")?)),
            of("feed_forward_length", Meta::Number(self.needed("intermediate_size")?)),
            of("attention.head_count", Meta::Number(heads)),
            of("attention.head_count_kv", Meta::Number(self.number("num_key_value_heads").unwrap_or(heads))),
            of("attention.key_length", Meta::Number(head_dim)),
            of("attention.value_length", Meta::Number(head_dim)),
            of("rope.dimension_count", Meta::Number(self.turned()?)),
            of("rope.freq_base", Meta::Float(self.theta() as f32)),
            ("tokenizer.ggml.model".to_owned(), Meta::Text("no_vocab".to_owned())),
        ];
        all.extend(recipe.file_type.map(|number| ("general.file_type".to_owned(), Meta::Number(number))));
        all.push(match self.float("rms_norm_eps") {
            Some(eps) => of("attention.layer_norm_rms_epsilon", Meta::Float(eps as f32)),
            None => {
                of("attention.layer_norm_epsilon", Meta::Float(self.float("layer_norm_eps").unwrap_or(1e-5) as f32))
            }
        });
        Ok(all)
    }
}

enum Meta {
    Number(u32),
    Float(f32),
    Text(String),
}

/// Fails for a tensor that no name is known for.
fn tensors(
    family: &Family,
    config: &Config,
    recipe: &Recipe,
    (matrices, vectors): (&[MatrixSpec], &[VectorSpec]),
    factors: Option<&[f32]>,
) -> Result<Vec<Tensor>, BadInput> {
    let head_dim = config.head_dim()? as usize;
    let layers = config.needed("num_hidden_layers")? as usize;
    let has_head = matrices.iter().any(|spec| spec.role == Role::Head);
    let of = |from: &String| gguf_name(from).ok_or_else(|| BadInput::new(format!("no GGUF has a tensor for `{from}`")));
    let mut all = Vec::new();
    for spec in matrices {
        let (name, n, k) = (of(&spec.name)?, spec.n, spec.k);
        let is_kept = spec.role == Role::Kept;
        let kind = if is_kept { plain(F16) } else { recipe.kind(&name, k, layers, has_head) };
        let head_rows = is_turned(family, &name).then_some(head_dim);
        all.push(Tensor { name, from: Some(spec.name.clone()), n, k, kind, head_rows });
    }
    for spec in vectors {
        let name = of(&spec.name)?;
        let head_rows = is_turned(family, &name).then_some(head_dim);
        all.push(Tensor { name, from: Some(spec.name.clone()), n: 1, k: spec.len, kind: plain(F32), head_rows });
    }
    if let Some(factors) = factors {
        let (name, k) = (ROPE_FREQS.to_owned(), factors.len());
        all.push(Tensor { name, from: None, n: 1, k, kind: plain(F32), head_rows: None });
    }
    Ok(all)
}

fn header(metadata: &[(String, Meta)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Meta::Number(n) => out.extend([UINT32.to_le_bytes(), n.to_le_bytes()].concat()),
            Meta::Float(x) => out.extend([FLOAT32.to_le_bytes(), x.to_le_bytes()].concat()),
            Meta::Text(value) => {
                out.extend(STRING.to_le_bytes());
                text(&mut out, value);
            }
        }
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        // The length of a row first.
        let dims: &[usize] = if tensor.kind.number == F32 { &[tensor.k] } else { &[tensor.k, tensor.n] };
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        out.extend(tensor.kind.number.to_le_bytes());
        out.extend(u64::to_le_bytes(offset));
        offset = (offset + tensor.bytes()).next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

/// Writes the values and the gap behind them; gives how many became infinite.
fn write(file: &mut impl Write, tensor: &Tensor, source: &dyn Source, factors: &[f32]) -> Result<usize> {
    let mut overflow = 0;
    match (&tensor.from, tensor.kind.number) {
        (None, _) => factors.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))?,
        (Some(from), F16) => {
            let mut values = vec![f16::ZERO; tensor.n * tensor.k];
            overflow = source.read_rows(from, 0..tensor.n, &mut values)?;
            for row in order(tensor.n, tensor.head_rows)? {
                let row = &values[row * tensor.k..(row + 1) * tensor.k];
                file.write_all(bytemuck::cast_slice(row))?;
            }
        }
        (Some(from), F32) => {
            // Of vectors, too, the values that our fp16 has.
            let mut values = vec![f16::ZERO; tensor.k];
            let rows = source.shape(from).and_then(|shape| shape.first().copied()).unwrap_or(tensor.k);
            overflow = source.read_rows(from, 0..rows, &mut values)?;
            for at in order(tensor.k, tensor.head_rows)? {
                file.write_all(&values[at].to_f32().to_le_bytes())?;
            }
        }
        (Some(from), _) => overflow = write_blocks(file, tensor, from, source)?,
    }
    let gap = tensor.bytes().next_multiple_of(ALIGNMENT) - tensor.bytes();
    file.write_all(&[0; ALIGNMENT as usize][..gap as usize])?;
    Ok(overflow)
}

/// Writes a matrix in blocks; gives how many values became infinite in fp16, of which the blocks are made.
fn write_blocks(file: &mut impl Write, tensor: &Tensor, from: &str, source: &dyn Source) -> Result<usize> {
    let (n, k) = (tensor.n, tensor.k);
    let mut values = vec![f16::ZERO; n * k];
    let overflow = source.read_rows(from, 0..n, &mut values)?;
    // Rows are quantized by themselves, so that threads share them in any way.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = n.div_ceil(threads).max(1);
    let make = |values: &[f16]| -> Result<Vec<u8>> {
        let format = (tensor.kind.format.new)(FormatOptions::default());
        let weight = HalfMatrix { n: values.len() / k, k, data: values.to_vec() };
        let parts = format.quantize(weight).with_context(|| format!("quantizing `{from}`"))?.parts();
        Ok(parts.into_iter().flat_map(|part| part.bytes).collect())
    };
    let made: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = values.chunks(rows * k).map(|values| scope.spawn(move || make(values))).collect();
        let failed = |_| Err(anyhow::anyhow!("a thread that quantized `{from}` ended early"));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(failed)).collect()
    });
    let bytes = made.into_iter().collect::<Result<Vec<_>>>()?.concat();
    let row_bytes = bytes.len() / n;
    for row in order(n, tensor.head_rows)? {
        file.write_all(&bytes[row * row_bytes..(row + 1) * row_bytes])?;
    }
    Ok(overflow)
}

/// The error for a format that no file is written in.
pub fn not_written(format: FormatId) -> BadInput {
    let names: Vec<&str> = recipe::names().collect();
    BadInput::new(format!("`--format gguf` writes {}, and `{format}` was asked for", names.join(", ")))
        .hint("write one of these; llama.cpp's own quantizer makes its other formats of an fp16 file")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between both wavelengths the divisor goes smoothly from 1 to the factor; the frequencies are those that our rope has.
    #[test]
    fn divisors_of_llama_3_go_from_1_to_the_factor() {
        let shape = crate::weights::builtin_models().iter().find(|shape| shape.name == "llama-3.2-1b").unwrap();
        let config = shape.config();
        let factors = Config(&config).rope_factors().unwrap().unwrap();
        assert_eq!((factors.len(), factors[0], factors[31]), (32, 1.0, 32.0));
        assert!(factors.windows(2).all(|pair| pair[0] <= pair[1]));
        let other = serde_json::json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}});
        assert!(Config(&other).rope_factors().unwrap_err().to_string().contains("`yarn`"));
    }
}
