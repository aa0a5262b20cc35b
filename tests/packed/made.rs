//! Checkpoints of other families, packed here: fused modules, biases, experts, widths that are no multiples of anything. Each gives the logits of
//! the same values in a plain fp32 checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use quantbench::engine::{self, Device, Setup};
use quantbench::events::{Event, Listener, Silent};
use quantbench::harness;
use quantbench::kernels::isa::Isa;
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::rng::SplitMix64;
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use serde_json::{Value, json};

use crate::models::architectures;

/// Both compute in fp32 with the same values: sums in another order move logits of these models by up to 2.4e-4 (`tests/golden/README.md`).
const LOGIT_TOLERANCE: f32 = 5e-4;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Codes, scales and zeros of a matrix, in groups of inputs.
struct Codes {
    n: usize,
    k: usize,
    group: usize,
    codes: Vec<u32>,
    scales: Vec<f16>,
    zeros: Vec<u32>,
}

impl Codes {
    fn random(rng: &mut SplitMix64, (n, k): (usize, usize), group: usize) -> Self {
        let groups = n * k.div_ceil(group);
        Self {
            n,
            k,
            group,
            codes: (0..n * k).map(|_| rng.below(16) as u32).collect(),
            // Values as large as trained ones: about 1 / √k.
            scales: (0..groups).map(|_| f16::from_f32((0.5 + rng.unit() as f32) * 0.2 / (k as f32).sqrt())).collect(),
            zeros: (0..groups).map(|_| 7 + rng.below(3) as u32).collect(),
        }
    }

    fn groups(&self) -> usize {
        self.k.div_ceil(self.group)
    }

    fn values(&self) -> Vec<u8> {
        let value = |at: usize| {
            let group = at / self.k * self.groups() + at % self.k / self.group;
            (self.codes[at] as f32 - self.zeros[group] as f32) * self.scales[group].to_f32()
        };
        (0..self.n * self.k).flat_map(|at| value(at).to_le_bytes()).collect()
    }
}

/// Words of `[rows, columns]` nibbles that `at` gives, packed along the columns.
fn words(rows: usize, columns: usize, at: impl Fn(usize, usize) -> u32) -> Vec<u8> {
    let word = |row: usize, word: usize| {
        (0..8)
            .map(|i| (i, 8 * word + i))
            .filter(|(_, column)| *column < columns)
            .fold(0, |bits, (i, column)| bits | at(row, column) << (4 * i))
    };
    (0..rows)
        .flat_map(|row| (0..columns.div_ceil(8)).flat_map(move |c| [(row, c)]).collect::<Vec<_>>())
        .flat_map(|(row, c)| word(row, c).to_le_bytes())
        .collect()
}

fn halves<'a>(values: impl Iterator<Item = &'a f16>) -> Vec<u8> {
    values.flat_map(|value| value.to_le_bytes()).collect()
}

/// The tensors of a module under a method.
fn pack(method: &str, module: &str, of: &Codes, tensors: &mut Tensors) {
    let (n, k, groups) = (of.n, of.k, of.groups());
    let mut push = |suffix: &str, dtype, shape: &[usize], bytes| {
        tensors.insert(format!("{module}.{suffix}"), (dtype, shape.to_vec(), bytes));
    };
    let code = |row: usize, column: usize| of.codes[row * k + column];
    let zero = |row: usize, group: usize| of.zeros[row * groups + group];
    let turned: Vec<f16> = (0..n * groups).map(|at| of.scales[at % n * groups + at / n]).collect();
    match method {
        "gptq" => {
            // Words along the inputs: those of a row of outputs, turned.
            let rows = words(n, k, code);
            let word = |at: usize| rows[(at % n * k.div_ceil(8) + at / n) * 4..][..4].to_vec();
            push("qweight", Dtype::I32, &[k.div_ceil(8), n], (0..n * k.div_ceil(8)).flat_map(word).collect());
            // Stored less one.
            push("qzeros", Dtype::I32, &[groups, n.div_ceil(8)], words(groups, n, |group, row| zero(row, group) - 1));
            push("scales", Dtype::F16, &[groups, n], halves(turned.iter()));
        }
        "awq" => {
            const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
            // Field i of a word is the output ORDER[i] of its eight.
            let padded = n.next_multiple_of(8);
            let place = |column: usize| column / 8 * 8 + ORDER[column % 8];
            let of_output =
                |column: usize, at: &dyn Fn(usize) -> u32| if place(column) < n { at(place(column)) } else { 0 };
            push(
                "qweight",
                Dtype::I32,
                &[k, padded / 8],
                words(k, padded, |input, column| of_output(column, &|row| code(row, input))),
            );
            push(
                "qzeros",
                Dtype::I32,
                &[groups, padded / 8],
                words(groups, padded, |group, column| of_output(column, &|row| zero(row, group))),
            );
            push("scales", Dtype::F16, &[groups, n], halves(turned.iter()));
        }
        _ => {
            push("weight_packed", Dtype::I32, &[n, k.div_ceil(8)], words(n, k, code));
            push("weight_scale", Dtype::F16, &[n, groups], halves(of.scales.iter()));
            // Packed along the outputs: words of a group's outputs, turned.
            let by_group = words(groups, n, |group, row| zero(row, group));
            let word = |at: usize| by_group[(at % groups * n.div_ceil(8) + at / groups) * 4..][..4].to_vec();
            push(
                "weight_zero_point",
                Dtype::I32,
                &[n.div_ceil(8), groups],
                (0..groups * n.div_ceil(8)).flat_map(word).collect(),
            );
            push(
                "weight_shape",
                Dtype::I64,
                &[2],
                [n as i64, k as i64].iter().flat_map(|length| length.to_le_bytes()).collect(),
            );
        }
    }
}

fn section(method: &str, group: usize) -> Value {
    match method {
        "gptq" => json!({"quant_method": "gptq", "bits": 4, "group_size": group, "sym": false, "desc_act": false}),
        "awq" => {
            json!({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "modules_to_not_convert": ["gate", "router"]})
        }
        _ => json!({
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*\\.(gate|router)$"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights":
                {"num_bits": 4, "type": "int", "symmetric": false, "strategy": "group", "group_size": group}}},
        }),
    }
}

fn write(folder: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    serialize_to_file(views, None, &folder.join("model.safetensors")).expect("a file");
}

/// Fails on warnings.
struct Strict;

impl Listener for Strict {
    fn on(&self, event: Event) {
        if let Event::Warning { name, message } = event {
            panic!("{name}: {message}");
        }
    }
}

/// Logits of a prompt and of a step behind it, and the name of the precision.
fn logits(folder: &Path, plain: FormatId) -> (String, Vec<f32>) {
    let request = ModelRequest::of(folder.display().to_string());
    let checkpoint = weights::open(&request, &Strict).expect("a checkpoint");
    let model = harness::build(&checkpoint, &request, &Strict).expect("a model");
    let source = checkpoint.source_with(&model.matrices, &model.vectors, &Strict).expect("weights");
    let precision = checkpoint.quantized.as_ref().map_or(plain, |own| own.precision);
    let setup = Setup {
        model: &model,
        source: source.as_ref(),
        formats: &Formats::new(precision, FormatOptions::default()),
        device: Device::Cpu,
        threads: 2,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: 32,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    let mut session = engine::cpu::load(&setup, Isa::detect(), &Silent).expect("a session").session;
    session.prefill(&[1, 5, 9, 100, 42, 7]).expect("a prompt");
    let mut logits = session.logits().expect("logits");
    session.prefill(&[3]).expect("a step");
    logits.extend(session.logits().expect("logits"));
    (precision.name.to_owned(), logits)
}

/// Whether a tensor is a linear layer that tools quantize.
fn is_linear(name: &str, shape: &[usize]) -> bool {
    let is_left = ["embed", "lm_head", "gate.weight", "router.weight"].iter().any(|word| name.contains(word));
    shape.len() == 2 && name.ends_with(".weight") && !is_left
}

#[test]
fn other_families_give_the_logits_of_their_plain_values() {
    let plain = FormatId::named("fp32").expect("the exact format");
    for (model, method, group, row) in [
        ("phi3-odd", "gptq", 32, "gptq-int4-g32"),
        ("phi3", "awq", 64, "awq-int4-g64"),
        ("qwen2-odd", "awq", 32, "awq-int4-g32"),
        ("qwen2-odd", "gptq", 48, "gptq-int4"),
        ("mixtral-odd", "gptq", 32, "gptq-int4-g32"),
        ("qwen3_moe-odd", "compressed-tensors", 32, "w4a16-g32"),
        ("gemma3-odd", "compressed-tensors", 64, "w4a16-g64"),
        ("smollm3-odd", "compressed-tensors", 24, "w4a16-groups"),
        ("olmo2-odd", "awq", 40, "awq-int4"),
        ("llama-bias-odd", "gptq", 32, "gptq-int4-g32"),
    ] {
        let what = format!("{model} {method} in {group}");
        let from = architectures().join("models").join(model);
        let bytes = std::fs::read(from.join("model.safetensors")).expect("weights");
        let own = SafeTensors::deserialize(&bytes).expect("weights");
        let config: Value =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).expect("a config")).expect("JSON");
        let (mut packed, mut dense) = (Tensors::new(), Tensors::new());
        let mut rng = SplitMix64::new(model.len() as u64);
        for (name, view) in own.tensors() {
            let shape = view.shape().to_vec();
            if is_linear(&name, &shape) {
                let codes = Codes::random(&mut rng, (shape[0], shape[1]), group);
                pack(method, name.trim_end_matches(".weight"), &codes, &mut packed);
                dense.insert(name, (Dtype::F32, shape, codes.values()));
            } else {
                packed.insert(name.clone(), (view.dtype(), shape.clone(), view.data().to_vec()));
                dense.insert(name, (view.dtype(), shape, view.data().to_vec()));
            }
        }
        let (quantized, whole) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let mut with_section = config.clone();
        with_section["quantization_config"] = section(method, group);
        write(quantized.path(), &with_section, &packed);
        write(whole.path(), &config, &dense);
        let ((name, seen), (_, expected)) = (logits(quantized.path(), plain), logits(whole.path(), plain));
        assert_eq!(name, row, "{what}");
        let worst = seen.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= LOGIT_TOLERANCE, "{what}: logits differ by {worst}");
        assert!(expected.iter().any(|logit| logit.abs() > 0.01), "{what}: logits of nothing");
    }
}

/// Where config.json says nothing, the files that tools wrote beside it do.
#[test]
fn settings_beside_config_json_are_read() {
    let models = crate::golden::root().join("models");
    for (model, file, section) in [
        (
            "tiny-gptq-act",
            "quantize_config.json",
            json!({"bits": 4, "group_size": 128, "desc_act": true, "sym": false}),
        ),
        (
            "tiny-awq",
            "quant_config.json",
            json!({"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}),
        ),
    ] {
        let place = tempfile::tempdir().expect("a folder");
        let copy = |name: &str| std::fs::copy(models.join(model).join(name), place.path().join(name)).expect("a copy");
        copy("model.safetensors");
        let text = std::fs::read(models.join(model).join("config.json")).expect("a config");
        let mut config: Value = serde_json::from_slice(&text).expect("JSON");
        config.as_object_mut().expect("an object").remove("quantization_config");
        std::fs::write(place.path().join("config.json"), config.to_string()).expect("a file");
        std::fs::write(place.path().join(file), section.to_string()).expect("a file");
        let plain = FormatId::named("fp32").expect("the exact format");
        assert_eq!(logits(place.path(), plain), logits(&models.join(model), plain), "{model}");
    }
}

/// NVFP4 as ModelOpt saves it, with what it says in a file beside config.json.
#[test]
fn a_modelopt_folder_is_read_by_its_own_file() {
    let models = crate::golden::root().join("models");
    let bytes = std::fs::read(models.join("tiny-w4a16/model.safetensors")).expect("weights");
    let own = SafeTensors::deserialize(&bytes).expect("weights");
    let text = std::fs::read(models.join("tiny-w4a16/config.json")).expect("a config");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    config.as_object_mut().expect("an object").remove("quantization_config");
    let (mut packed, mut dense, mut rng) = (Tensors::new(), Tensors::new(), SplitMix64::new(9));
    for (name, view) in own.tensors() {
        let Some(module) = name.strip_suffix(".weight_packed") else {
            if !name.contains("_proj.") {
                for tensors in [&mut packed, &mut dense] {
                    tensors.insert(name.clone(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
                }
            }
            continue;
        };
        let (n, k) = (view.shape()[0], view.shape()[1] * 8);
        let codes: Vec<u8> = (0..n * k / 2).map(|_| rng.below(256) as u8).collect();
        // 0.5 to 1, by an E4M3 code.
        let scales: Vec<u8> = (0..n * k / 16).map(|_| 0x30 + rng.below(9) as u8).collect();
        let global = 0.03f32;
        let value = |at: usize| {
            let code = codes[at / 2] >> (at % 2 * 4) & 15;
            let scale = quantbench::quant::scaled::codes::e4m3(scales[at / 16]) * global;
            quantbench::quant::scaled::codes::E2M1_VALUES[usize::from(code)] * scale
        };
        let values = (0..n * k).flat_map(|at| value(at).to_le_bytes()).collect();
        dense.insert(format!("{module}.weight"), (Dtype::F32, vec![n, k], values));
        packed.insert(format!("{module}.weight"), (Dtype::U8, vec![n, k / 2], codes));
        packed.insert(format!("{module}.weight_scale"), (Dtype::F8_E4M3, vec![n, k / 16], scales));
        packed.insert(format!("{module}.weight_scale_2"), (Dtype::F32, vec![], global.to_le_bytes().to_vec()));
        packed.insert(format!("{module}.input_scale"), (Dtype::F32, vec![], 1f32.to_le_bytes().to_vec()));
    }
    let quantized = tempfile::tempdir().expect("a folder");
    write(quantized.path(), &config, &packed);
    let said = json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}});
    std::fs::write(quantized.path().join("hf_quant_config.json"), said.to_string()).expect("a file");
    let request = ModelRequest::of(quantized.path().display().to_string());
    let checkpoint = weights::open(&request, &Silent).expect("a checkpoint");
    let own = checkpoint.quantized.as_ref().expect("a quantization");
    assert_eq!(own.precision.name, "nvfp4");
    assert!(own.notes.iter().any(|note| note.contains("activations")), "{:?}", own.notes);
    let model = harness::build(&checkpoint, &request, &Silent).expect("a model");
    let source = checkpoint.source_with(&model.matrices, &model.vectors, &Strict).expect("nothing is unread");
    for spec in &model.matrices {
        let stored = source.stored(spec).expect("stored").expect("a matrix");
        let (dtype, _, bytes) = &dense[&spec.name];
        let expected: Vec<f32> = match dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            _ => bytes.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        };
        assert!(stored.dequantize() == expected, "{}", spec.name);
    }
}

/// FP4, and NF4 in blocks of 128: config.json says no block, the files do.
#[test]
fn bitsandbytes_in_other_blocks_is_named_by_its_files() {
    let models = crate::golden::root().join("models");
    let bytes = std::fs::read(models.join("tiny-w4a16/model.safetensors")).expect("weights");
    let own = SafeTensors::deserialize(&bytes).expect("weights");
    let text = std::fs::read(models.join("tiny-w4a16/config.json")).expect("a config");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    for (quant_type, block, expected) in
        [("fp4", 64, "bnb-fp4"), ("fp4", 256, "bnb-fp4-b256"), ("nf4", 128, "bnb-nf4-b128")]
    {
        config["quantization_config"] = json!({
            "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": false, "bnb_4bit_quant_storage": "uint8",
        });
        let (mut packed, mut dense, mut rng) = (Tensors::new(), Tensors::new(), SplitMix64::new(block as u64));
        let table: Vec<f32> = (0..16).map(|code| (code as f32 - 7.5) / 7.5).collect();
        for (name, view) in own.tensors() {
            let Some(module) = name.strip_suffix(".weight_packed") else {
                if !name.contains("_proj.") {
                    for tensors in [&mut packed, &mut dense] {
                        tensors.insert(name.clone(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
                    }
                }
                continue;
            };
            let (n, k) = (view.shape()[0], view.shape()[1] * 8);
            let codes: Vec<u8> = (0..n * k / 2).map(|_| rng.below(256) as u8).collect();
            let absmax: Vec<f32> = (0..(n * k).div_ceil(block)).map(|_| 0.05 + 0.1 * rng.unit() as f32).collect();
            // The first of two in the high nibble.
            let value = |at: usize| table[usize::from(codes[at / 2] >> (4 - at % 2 * 4) & 15)] * absmax[at / block];
            let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
            let values: Vec<f32> = (0..n * k).map(value).collect();
            dense.insert(format!("{module}.weight"), (Dtype::F32, vec![n, k], floats(&values)));
            let state =
                json!({"quant_type": quant_type, "blocksize": block, "dtype": "float16", "shape": [n, k]}).to_string();
            let mut push = |suffix: &str, dtype, shape: Vec<usize>, bytes| {
                packed.insert(format!("{module}.{suffix}"), (dtype, shape, bytes))
            };
            push("weight", Dtype::U8, vec![n * k / 2, 1], codes);
            push("weight.absmax", Dtype::F32, vec![absmax.len()], floats(&absmax));
            push("weight.quant_map", Dtype::F32, vec![16], floats(&table));
            let text = state.into_bytes();
            push(&format!("weight.quant_state.bitsandbytes__{quant_type}"), Dtype::U8, vec![text.len()], text);
        }
        let (quantized, whole) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        write(quantized.path(), &config, &packed);
        let mut plain_config = config.clone();
        plain_config.as_object_mut().expect("an object").remove("quantization_config");
        write(whole.path(), &plain_config, &dense);
        let plain = FormatId::named("fp32").expect("the exact format");
        let ((name, seen), (_, of_plain)) = (logits(quantized.path(), plain), logits(whole.path(), plain));
        assert_eq!(name, expected);
        let worst = seen.iter().zip(&of_plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= LOGIT_TOLERANCE, "{expected}: logits differ by {worst}");
    }
}
