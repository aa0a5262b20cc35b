//! Single matrices against golden values, bit for bit, and golden products.

use std::slice;
use std::sync::Arc;

use quantbench::kernels::isa::Isa;
use quantbench::quant::Stored;
use quantbench::quant::scheme::Scheme;
use quantbench::rng::SplitMix64;
use serde_json::{Value, json};

use crate::golden::{Golden, Tensors, of_bitsandbytes, root, scheme};
use crate::kernels::{assert_products, bits, check, magnitudes, multiply};

/// A golden matrix: its name, shape, tensors and scheme.
pub struct Entry {
    pub name: String,
    pub shape: (usize, usize),
    pub tensors: Tensors,
    pub scheme: Arc<dyn Scheme>,
}

impl Entry {
    pub fn read(&self) -> Box<dyn Stored> {
        self.tensors.read(self.scheme.as_ref(), self.shape).unwrap_or_else(|error| panic!("{}: {error:#}", self.name))
    }
}

fn group(weights: Value, format: &str) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    })
}

/// What a checkpoint with an entry of `float.safetensors` says in its config.
fn section_of(name: &str) -> Value {
    let fp8 = |strategy: &str| {
        group(json!({"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true}), "float-quantized")
    };
    let integers = |bits: u32, strategy: &str, group_size: Value, symmetric: bool, format: &str| {
        let weights = json!({
            "num_bits": bits, "type": "int", "strategy": strategy, "group_size": group_size, "symmetric": symmetric,
        });
        group(weights, format)
    };
    match name {
        "fp8.tensor" => fp8("tensor"),
        "fp8.channel" => fp8("channel"),
        "fp8.scalar" => json!({"quant_method": "fp8", "activation_scheme": "static"}),
        "fp8.channel-f32" => json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        "fp8.block" => json!({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
        "mxfp4" => group(
            json!({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
            "mxfp4-pack-quantized",
        ),
        "nvfp4" => group(
            json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
            "nvfp4-pack-quantized",
        ),
        "nvfp4-modelopt" => json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
        "ct.w8a8-channel" => integers(8, "channel", Value::Null, true, "int-quantized"),
        _ => {
            let (bits, kind) = match name.strip_prefix("ct.") {
                Some(kind) if kind.starts_with("w8a16") => (8, kind),
                Some(kind) => (4, kind),
                None => panic!("what is `{name}`?"),
            };
            let size = kind.split('-').find_map(|part| part.strip_prefix('g')?.parse::<u64>().ok());
            let strategy = if size.is_some() { "group" } else { "channel" };
            integers(bits, strategy, json!(size), !kind.ends_with("-asym"), "pack-quantized")
        }
    }
}

/// The golden matrices of `int4.safetensors` and `float.safetensors`.
pub fn entries(golden: &Golden, file: &str) -> Vec<Entry> {
    let facts = std::fs::read(root().join("tensors/tensors.json")).expect("facts");
    let facts: Value = serde_json::from_slice(&facts).expect("JSON");
    let entry = |name: String| {
        let (_, shape, _) = golden.get(&format!("{name}.dequant")).expect("named");
        let shape = (shape[0], shape[1]);
        if name.starts_with("bnb.") {
            let (tensors, scheme) = of_bitsandbytes(golden, &name, shape);
            return Entry { name, shape, tensors, scheme };
        }
        let section = match file {
            "int4" => {
                let mut section = facts["int4"][&name].clone();
                section["quant_method"] = json!(name.split('.').next());
                section["bits"] = json!(section["bits"].as_u64().unwrap_or(4));
                section
                    .as_object_mut()
                    .expect("facts")
                    .retain(|key, _| !key.contains("error") && !key.contains("stored"));
                section
            }
            _ => section_of(&name),
        };
        let scheme = scheme(&section).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        Entry { tensors: Tensors::of(golden, &name), name, shape, scheme }
    };
    golden.entries().into_iter().map(entry).collect()
}

/// The activations that the products of an entry are of.
fn activations(golden: &Golden, entry: &Entry) -> Vec<f32> {
    let (_, k) = entry.shape;
    let case = entry.name.rsplit_once('.').map_or("", |(_, case)| case);
    let named = format!("{case}.x");
    if golden.get(&named).is_some() {
        return golden.f32s(&named);
    }
    let of_width = ["a.x", "b.x"].into_iter().find(|x| golden.get(x).is_some_and(|(_, shape, _)| shape[1] == k));
    golden.f32s(of_width.unwrap_or_else(|| panic!("{}: no activations of {k}", entry.name)))
}

const FILES: [(&str, usize); 2] = [("int4", 14), ("float", 16)];

#[test]
fn values_are_the_goldens_bit_for_bit() {
    for (file, least) in FILES {
        let golden = Golden::open(file);
        let entries = entries(&golden, file);
        assert!(entries.len() >= least, "{} entries in {file}", entries.len());
        for entry in entries {
            let expected = bits(&golden.f32s(&format!("{}.dequant", entry.name)));
            assert_eq!(bits(&entry.read().dequantize()), expected, "{}", entry.name);
            for isa in Isa::available() {
                let matrix = entry.read().pack(isa);
                let mut values = vec![f32::NAN; expected.len()];
                matrix.dequantize_rows(0..entry.shape.0, &mut values);
                assert_eq!(bits(&values), expected, "{} {}", entry.name, isa.name());
                assert_eq!(bits(&matrix.unpack().dequantize()), expected, "{} {}", entry.name, isa.name());
            }
        }
    }
}

#[test]
fn kernels_equal_the_oracles() {
    for (file, _) in FILES {
        let golden = Golden::open(file);
        entries(&golden, file).iter().for_each(|entry| check(&entry.name, &|| entry.read()));
    }
}

#[test]
fn tables_are_the_goldens() {
    use quantbench::quant::scaled::codes::{E2M1_VALUES, e4m3};
    let golden = Golden::open("float");
    let seen: Vec<u32> = (0..=255u8).map(|code| e4m3(code).to_bits() & 0x7fff_ffff).collect();
    let expected: Vec<u32> = golden.f32s("e4m3_table").iter().map(|value| value.to_bits() & 0x7fff_ffff).collect();
    assert_eq!(seen, expected);
    assert_eq!(bits(&golden.f32s("e2m1_table")), bits(&E2M1_VALUES));
}

#[test]
fn products_are_the_goldens() {
    for (file, _) in FILES {
        let golden = Golden::open(file);
        for entry in entries(&golden, file) {
            let (n, k) = entry.shape;
            let (x, expected) = (activations(&golden, &entry), golden.f64s(&format!("{}.y", entry.name)));
            let m = x.len() / k;
            let stored = entry.read();
            let sums = magnitudes(&stored.dequantize(), k, &x);
            assert_products(&entry.name, &stored.multiply(&x, m), &expected, &sums, k);
            for isa in Isa::available() {
                let matrix = entry.read().pack(isa);
                let what = format!("{} {}", entry.name, isa.name());
                assert_products(&what, &multiply(&*matrix, &x, m, slice::from_ref(&(0..n))), &expected, &sums, k);
                for token in 0..m {
                    let outputs = token * n..(token + 1) * n;
                    let y = multiply(&*matrix, &x[token * k..][..k], 1, slice::from_ref(&(0..n)));
                    assert_products(&what, &y, &expected[outputs.clone()], &sums[outputs], k);
                }
            }
        }
    }
}

/// Made at load by plain rounding: the values that checkpoints made by the same rule hold, bit for bit.
#[test]
fn made_values_are_those_of_rounded_checkpoints() {
    use quantbench::quant::{FormatId, FormatOptions, HalfMatrix};
    let golden = Golden::open("float");
    let (_, shape, bytes) = golden.get("a.weight").expect("weights");
    let data: Vec<half::f16> = bytes.as_chunks::<2>().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes)).collect();
    for (name, entry) in [("fp8", "fp8.channel-f32"), ("w4a16-g128", "ct.w4a16-g128"), ("w8a16", "ct.w8a16-channel")] {
        let format = FormatId::parse(name).unwrap_or_else(|| panic!("`{name}` can be asked for"));
        let format = (format.new)(FormatOptions::default());
        let made = format.quantize(HalfMatrix { n: shape[0], k: shape[1], data: data.clone() }).expect(name);
        let expected = golden.f32s(&format!("{entry}.dequant"));
        let differing = made.dequantize().iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "{name}: {differing} of {} values are not those of {entry}", expected.len());
        let bytes: usize = made.parts().iter().map(|part| part.bytes.len()).sum();
        assert_eq!(bytes, format.stored_bytes(shape[0], shape[1]), "{name}");
    }
}

/// The golden NVFP4 has another factor than the one that brings the largest magnitude to 448 · 6; the rules are checked by what they mean.
#[test]
fn nvfp4_is_made_by_nearest_scales_and_codes() {
    use quantbench::quant::scaled::codes::{E2M1_VALUES, e4m3};
    use quantbench::quant::{FormatId, FormatOptions, HalfMatrix};
    let golden = Golden::open("float");
    let (_, shape, bytes) = golden.get("a.weight").expect("weights");
    let data: Vec<half::f16> = bytes.as_chunks::<2>().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes)).collect();
    let values: Vec<f32> = data.iter().map(|value| value.to_f32()).collect();
    let format = (FormatId::parse("nvfp4").expect("it can be asked for").new)(FormatOptions::default());
    let made = format.quantize(HalfMatrix { n: shape[0], k: shape[1], data }).expect("a matrix");
    let parts = made.parts();
    let part = |name: &str| &parts.iter().find(|part| part.suffix == name).expect("a part").bytes;
    let global = f32::from_le_bytes(std::array::from_fn(|i| part("global")[i]));
    let largest = |values: &[f32]| values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    assert_eq!(global, 448.0 * 6.0 / largest(&values));
    let (decoded, scales) = (made.dequantize(), part("scales"));
    for (at, (block, decoded)) in values.chunks(16).zip(decoded.chunks(16)).enumerate() {
        let (scale, wanted) = (e4m3(scales[at]), largest(block) / 6.0 * global);
        let nearest = (0..0x7f).map(|code| (e4m3(code) - wanted).abs()).fold(f32::INFINITY, f32::min);
        assert_eq!((scale - wanted).abs(), nearest, "block {at}");
        for (value, decoded) in block.iter().zip(decoded) {
            let error = |code: &f32| (code * (scale / global) - value).abs();
            let nearest = E2M1_VALUES.iter().map(error).fold(f32::INFINITY, f32::min);
            // Two codes may be as near but for the rounding of their products.
            assert!(
                (decoded - value).abs() <= nearest * (1.0 + 4.0 * f32::EPSILON),
                "block {at}: {value} is {decoded}"
            );
        }
    }
    let rows = parts[0].bytes.len() + scales.len();
    assert_eq!(rows, format.stored_bytes(shape[0], shape[1]), "without the factor of the matrix");
}

#[test]
fn rows_of_zeros_and_of_extremes_are_made() {
    use quantbench::quant::{FormatId, FormatOptions, HalfMatrix};
    for name in ["fp8", "nvfp4", "w4a16-g128", "w8a16"] {
        let format = (FormatId::parse(name).expect("a precision").new)(FormatOptions::default());
        for value in [half::f16::ZERO, half::f16::from_bits(1), half::f16::MAX] {
            let made = format.quantize(HalfMatrix { n: 3, k: 37, data: vec![value; 111] }).expect(name);
            // An eighth of a step of 6 codes or of 7.5 is the most that a rounded scale adds.
            let decoded = made.dequantize();
            assert!(
                decoded.iter().all(|decoded| (0.0..=value.to_f32() * 1.125).contains(decoded)),
                "{name} of {value}"
            );
        }
        let made = format.quantize(HalfMatrix { n: 1, k: 37, data: vec![half::f16::NAN; 37] }).expect(name);
        assert!(made.dequantize().iter().any(|value| value.is_nan()), "{name}: what is no number stays visible");
    }
}

/// The bytes of expert tensors are those of a linear layer's.
#[test]
fn gpt_oss_blocks_are_the_bytes_of_mxfp4() {
    let golden = Golden::open("float");
    let expected = bits(&golden.f32s("mxfp4.dequant"));
    let mut tensors =
        Tensors::of(&golden, "mxfp4").renamed("weight_packed", "_blocks").renamed("weight_scale", "_scales");
    let (_, shape, _) = golden.get("mxfp4.dequant").expect("values");
    let (n, k) = (shape[0], shape[1]);
    tensors.tensor("_blocks").2 = vec![n, k / 32, 16];
    let scheme = scheme(&json!({"quant_method": "mxfp4"})).expect("a scheme");
    let stored = tensors.read(scheme.as_ref(), (n, k)).expect("a matrix");
    assert_eq!(bits(&stored.dequantize()), expected);
}

/// Words of fields of `bits`, the first in the lowest.
fn words(fields: &[u32], bits: usize) -> Vec<u8> {
    let word = |fields: &[u32]| fields.iter().enumerate().fold(0, |word, (i, field)| word | field << (i * bits));
    fields.chunks(32 / bits).flat_map(|fields| word(fields).to_le_bytes()).collect()
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect()
}

/// Rows, columns and groups that are no multiples of anything, in every layout of integers: the values are those of the rule, written out.
#[test]
fn odd_shapes_are_read_by_the_same_rules() {
    use safetensors::Dtype;
    let mut rng = SplitMix64::new(5);
    for (n, k, group) in [(5usize, 70usize, 32usize), (8, 33, 64), (13, 130, 48), (3, 8, 128), (9, 257, 32)] {
        for bits_of_code in [4usize, 8] {
            let (groups, most) = (k.div_ceil(group), 1usize << bits_of_code);
            let codes: Vec<u32> = (0..n * k).map(|_| rng.below(most) as u32).collect();
            let zeros: Vec<u32> = (0..n * groups).map(|_| rng.below(most) as u32).collect();
            let scales: Vec<f32> = (0..n * groups).map(|_| half::f16::from_f32(rng.unit() as f32).to_f32()).collect();
            let mut listed: Vec<usize> = (0..k).map(|i| i / group).collect();
            let value = |listed: &[usize], row: usize, column: usize| {
                let at = row * groups + listed[column];
                (codes[row * k + column] as f32 - zeros[at] as f32) * scales[at]
            };
            let expected =
                |listed: &[usize]| -> Vec<f32> { (0..n * k).map(|at| value(listed, at / k, at % k)).collect() };
            let turned =
                |values: &[f32]| -> Vec<f32> { (0..n * groups).map(|at| values[at % n * groups + at / n]).collect() };
            let by_group = |group: usize| -> Vec<u32> { (0..n).map(|row| zeros[row * groups + group]).collect() };
            let what = format!("[{n}, {k}] {bits_of_code} bits in {group}");

            // GPTQ: words along the inputs, zeros along the outputs.
            let per_word = 32 / bits_of_code;
            let (word_rows, zero_words) = ((k * bits_of_code).div_ceil(32), (n * bits_of_code).div_ceil(32));
            let columns: Vec<Vec<u8>> = (0..n).map(|row| words(&codes[row * k..][..k], bits_of_code)).collect();
            let qweight: Vec<u8> = (0..word_rows)
                .flat_map(|r| {
                    columns.iter().flat_map(move |bytes| bytes[4 * r..4 * r + 4].to_vec()).collect::<Vec<_>>()
                })
                .collect();
            assert_eq!(columns[0].len(), k.div_ceil(per_word) * 4);
            let mut gptq = Tensors::default();
            gptq.push("qweight", Dtype::I32, &[word_rows, n], qweight);
            gptq.push(
                "qzeros",
                Dtype::I32,
                &[groups, zero_words],
                (0..groups).flat_map(|g| words(&by_group(g), bits_of_code)).collect(),
            );
            gptq.push("scales", Dtype::F16, &[groups, n], halves(&turned(&scales)));
            let section = json!({"quant_method": "gptq", "bits": bits_of_code, "group_size": group, "sym": false, "checkpoint_format": "gptq_v2"});
            let v2 = scheme(&section).expect("a scheme");
            let read = |tensors: &Tensors, scheme: &dyn Scheme| {
                bits(&tensors.read(scheme, (n, k)).unwrap_or_else(|error| panic!("{what}: {error:#}")).dequantize())
            };
            assert_eq!(read(&gptq, v2.as_ref()), bits(&expected(&listed)), "{what} gptq");
            // The same with a list of groups in another order.
            listed.reverse();
            listed.rotate_left(k / 3);
            let mut act = gptq.clone();
            act.push(
                "g_idx",
                Dtype::I32,
                &[k],
                listed.iter().flat_map(|group| (*group as i32).to_le_bytes()).collect(),
            );
            assert_eq!(read(&act, v2.as_ref()), bits(&expected(&listed)), "{what} gptq by list");
            let in_turn: Vec<usize> = (0..k).map(|i| i / group).collect();

            // compressed-tensors: words along the inputs, zeros along the outputs, both from the middle on.
            let mut packed = Tensors::default();
            packed.push("weight_packed", Dtype::I32, &[n, word_rows], columns.concat());
            packed.push("weight_scale", Dtype::F16, &[n, groups], halves(&scales));
            packed.push(
                "weight_shape",
                Dtype::I64,
                &[2],
                [n as i64, k as i64].iter().flat_map(|length| length.to_le_bytes()).collect(),
            );
            let zero_words_of: Vec<Vec<u8>> = (0..groups).map(|g| words(&by_group(g), bits_of_code)).collect();
            let zero_points = (0..zero_words).flat_map(|r| {
                zero_words_of.iter().flat_map(move |bytes| bytes[4 * r..4 * r + 4].to_vec()).collect::<Vec<_>>()
            });
            packed.push("weight_zero_point", Dtype::I32, &[zero_words, groups], zero_points.collect());
            let weights = json!({"num_bits": bits_of_code, "type": "int", "strategy": "group", "group_size": group, "symmetric": false});
            let asymmetric = scheme(&super::tensors::group(weights, "pack-quantized")).expect("a scheme");
            assert_eq!(read(&packed, asymmetric.as_ref()), bits(&expected(&in_turn)), "{what} compressed-tensors");
            packed.push(
                "weight_g_idx",
                Dtype::I32,
                &[k],
                listed.iter().flat_map(|group| (*group as i32).to_le_bytes()).collect(),
            );
            assert_eq!(
                read(&packed, asymmetric.as_ref()),
                bits(&expected(&listed)),
                "{what} compressed-tensors by list"
            );
            for (kind, tensors, scheme) in
                [("gptq", &gptq, &v2), ("gptq by list", &act, &v2), ("compressed-tensors", &packed, &asymmetric)]
            {
                let read = || tensors.read(scheme.as_ref(), (n, k)).expect("a matrix");
                check(&format!("{kind} {bits_of_code} bits in {group}"), &read);
            }

            if bits_of_code == 4 {
                // AWQ: words along the outputs.
                const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
                let along = |at: &dyn Fn(usize) -> u32| -> Vec<u8> {
                    let field = |c: usize, i: usize| if 8 * c + ORDER[i] < n { at(8 * c + ORDER[i]) } else { 0 };
                    (0..n.div_ceil(8))
                        .flat_map(|c| words(&(0..8).map(|i| field(c, i)).collect::<Vec<_>>(), 4))
                        .collect()
                };
                let mut awq = Tensors::default();
                let row = |column: usize| along(&|output| codes[output * k + column]);
                awq.push("qweight", Dtype::I32, &[k, n.div_ceil(8)], (0..k).flat_map(row).collect());
                let row = |g: usize| along(&|output| zeros[output * groups + g]);
                awq.push("qzeros", Dtype::I32, &[groups, n.div_ceil(8)], (0..groups).flat_map(row).collect());
                awq.push("scales", Dtype::F16, &[groups, n], halves(&turned(&scales)));
                let section = json!({"quant_method": "awq", "bits": 4, "group_size": group, "version": "GEMM", "zero_point": true});
                assert_eq!(
                    read(&awq, scheme(&section).expect("a scheme").as_ref()),
                    bits(&expected(&in_turn)),
                    "{what} awq"
                );
            }
        }
    }
}
