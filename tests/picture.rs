//! Pictures against Pillow and transformers: tests/golden/pictures and the paligemma models' own golden files.

use std::path::{Path, PathBuf};

use quantbench::error::BadInput;
use quantbench::harness::picture::{Pixels, Preprocessor};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// Model and the side of its pictures.
const MODELS: [(&str, usize); 2] = [("paligemma-tiny", 224), ("paligemma-odd", 56)];

#[test]
fn pictures_resize_to_the_bytes_of_pillow() {
    for (model, size) in MODELS {
        let path = golden("models").join(model).join("image_100x60.png");
        let expected = std::fs::read(golden("expected").join(model).join("golden.safetensors")).unwrap();
        let seen = bytes(&raw(size, 3).open(&path).unwrap());
        assert_same(model, &seen, &tensor(&expected, "resize.image_100x60.u8_chw"));
    }
}

#[test]
fn every_filter_gives_the_bytes_of_pillow() {
    let path = golden("models").join("paligemma-odd/image_100x60.png");
    let expected = std::fs::read(golden("pictures/filters.safetensors")).unwrap();
    for (number, filter) in ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"].iter().enumerate() {
        for size in [1, 7, 33, 71] {
            let name = format!("{filter}.{size}");
            let seen = bytes(&raw(size, number).open(&path).unwrap());
            assert_same(&name, &seen, &tensor(&expected, &name));
        }
    }
}

#[test]
fn tall_pictures_take_the_passes_in_the_order_of_pillow() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let file = std::fs::read(golden("pictures/orders.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let inputs = tensors.iter().filter_map(|(name, input)| Some((name.strip_suffix(".in")?, input)));
    for (name, input) in inputs {
        let (height, width) = (input.shape()[0] as u32, input.shape()[1] as u32);
        image::save_buffer(&path, input.data(), width, height, image::ColorType::Rgb8).unwrap();
        let seen = bytes(&raw(16, 3).open(&path).unwrap());
        assert_same(name, &seen, &tensor(&file, &format!("{name}.out")));
    }
}

#[test]
fn every_pixel_kind_becomes_the_rgb_of_pillow() {
    let expected = std::fs::read(golden("pictures/kinds.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    assert_eq!(expected.len(), 13);
    for (name, tensor) in expected.tensors() {
        let seen = bytes(&raw(16, 3).open(&golden("pictures/kinds").join(&name)).unwrap());
        // A conforming inverse DCT is off by at most 1 per sample (IEEE 1180). Grey differs by that alone; the largest
        // factor from luma and chroma to a colour is 1 + 1.772, and rounding the sum adds at most 1.
        let tolerance = match name.as_str() {
            "grey.jpg" => 1,
            "color.jpg" => 3,
            _ => 0,
        };
        let off = seen.iter().zip(tensor.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(seen.len() == tensor.data().len() && off <= tolerance, "{name}: off by {off} of {tolerance}");
    }
}

#[test]
fn markers_and_names_say_what_the_samples_of_a_jpeg_mean() {
    let expected = std::fs::read(golden("pictures/jpegs.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    assert_eq!(expected.len(), 21);
    for (name, tensor) in expected.tensors() {
        let seen = bytes(&raw(16, 3).open(&golden("pictures/jpegs").join(&name)).unwrap());
        // A sample is off by at most 1 and a colour made of luma and chroma by at most 3, as above. Four inks make
        // `k - (255 - c) k / 255`: off by 1 for k, as much as c is, and 1 for the two roundings.
        let tolerance = match name.as_str() {
            "grey_adobe1.jpg" | "adobe0.jpg" | "named_rgb.jpg" | "progressive_adobe0.jpg" => 1,
            "four.jpg" | "four_jfif.jpg" | "four_adobe0.jpg" => 3,
            "four_adobe1.jpg" | "four_adobe2.jpg" => 5,
            _ => 3,
        };
        let off = seen.iter().zip(tensor.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(seen.len() == tensor.data().len() && off <= tolerance, "{name}: off by {off} of {tolerance}");
    }
}

#[test]
fn pixel_values_equal_those_of_transformers() {
    // Near 1 transformers rounds step/255 to half an ulp (2^-25), subtracts without error and doubles: 2^-24 off the exact
    // value. Rounding ours adds as much.
    const TOLERANCE: f32 = 1.0 / (1 << 23) as f32;
    for (model, size) in MODELS {
        let folder = golden("models").join(model);
        let config = serde_json::from_slice(&std::fs::read(folder.join("preprocessor_config.json")).unwrap()).unwrap();
        let expected = std::fs::read(golden("expected").join(model).join("golden.safetensors")).unwrap();
        let expected = tensor(&expected, "pixel_values.small");
        let with_config = Preprocessor::new(Some(&config), size).unwrap();
        assert_eq!(with_config, Preprocessor::new(None, size).unwrap(), "{model}: SigLIP's defaults are the config");
        let pixels = with_config.open(&folder.join("image.png")).unwrap();
        assert_eq!(pixels.values.len(), 3 * size * size);
        for (i, value) in expected.chunks_exact(4).enumerate() {
            let value = f32::from_le_bytes(value.try_into().unwrap());
            let (channel, y, x) = (i / 64, i / 8 % 8, i % 8);
            let seen = pixels.values[(channel * size + y) * size + x];
            assert!((seen - value).abs() <= TOLERANCE, "{model} [{channel}, {y}, {x}]: {seen} is not {value}");
        }
    }
}

#[test]
fn the_config_sets_scale_mean_and_std() {
    let path = golden("models").join("paligemma-odd/image.png");
    let steps = bytes(&raw(56, 3).open(&path).unwrap());
    let cases: [(Value, [(f64, f64); 3]); 8] = [
        (json!({}), [(2.0 / 255.0, -1.0); 3]),
        (json!({"do_normalize": false}), [(1.0 / 255.0, 0.0); 3]),
        (json!({"do_rescale": false, "image_mean": 127.5, "image_std": null}), [(2.0, -255.0); 3]),
        (
            json!({"rescale_factor": 0.25, "image_mean": [1, 2, 3], "image_std": [1, 2, 4]}),
            [(0.25, -1.0), (0.125, -1.0), (0.0625, -0.75)],
        ),
        (json!({"do_resize": false, "size": {"shortest_edge": 7}}), [(2.0 / 255.0, -1.0); 3]),
        // Steps that change nothing where they stand.
        (json!({"do_center_crop": true, "crop_size": 56, "do_convert_rgb": false}), [(2.0 / 255.0, -1.0); 3]),
        (json!({"do_pad": true, "pad_size": {"height": 56, "width": 56}, "size": [56, 56]}), [(2.0 / 255.0, -1.0); 3]),
        (json!({"size": 56, "default_to_square": true, "data_format": "channels_first"}), [(2.0 / 255.0, -1.0); 3]),
    ];
    for (mut config, lines) in cases {
        let sized = config.get("size").is_some();
        if !sized {
            config["size"] = json!({"height": 56, "width": 56});
        }
        let pixels = Preprocessor::new(Some(&config), 56).unwrap().open(&path).unwrap();
        for (i, (value, step)) in pixels.values.iter().zip(&steps).enumerate() {
            let (factor, offset) = lines[i / (56 * 56)];
            let expected = f64::from(*step) * factor + offset;
            // Half an ulp of f32 for the one rounding, and as much again for double arithmetic near 0.
            assert!(
                (f64::from(*value) - expected).abs() <= expected.abs() * 2f64.powi(-24) + 1e-13,
                "{config}: {value}"
            );
        }
    }
}

#[test]
fn the_generated_picture_fills_any_size() {
    for size in [1, 14, 56, 224, 448] {
        let Pixels { values, size: seen } = Preprocessor::new(None, size).unwrap().generated();
        assert_eq!((seen, values.len()), (size, 3 * size * size));
        assert!(values.iter().all(|value| (-1.0..=1.0).contains(value)));
        let mut distinct = values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(size < 56 || distinct.len() > 50, "{size}: {} distinct values", distinct.len());
    }
}

#[test]
fn unusable_configs_are_bad_input() {
    let cases = [
        (json!({"size": {"height": 448, "width": 448}}), "reads images of 224x224"),
        (json!({"size": {"height": 224, "width": 56}}), "reads images of 224x224"),
        (json!({"size": {"shortest_edge": 224}}), "shortest_edge"),
        (json!({"size": 224}), "size 224"),
        (json!({"size": {"height": -1, "width": 1e300}}), "reads images of 224x224"),
        (json!({"size": {"shortest_edge": 224, "longest_edge": 224}}), "longest_edge"),
        (json!({"size": {"height": 224, "width": 224, "shortest_edge": 7}}), "shortest_edge"),
        (json!({"do_center_crop": true}), "`do_center_crop` with crop_size left out"),
        (json!({"do_center_crop": true, "crop_size": {"height": 200, "width": 224}}), "`do_center_crop`"),
        (json!({"do_resize": false, "do_center_crop": true, "crop_size": 224}), "`do_center_crop`"),
        (json!({"do_pad": true, "pad_size": {"height": 448, "width": 448}}), "`do_pad`"),
        (json!({"data_format": "channels_last"}), "data_format"),
        (json!({"input_data_format": "channels_first"}), "input_data_format"),
        (json!({"resample": 6}), "resample 6; supported are 0 nearest, 1 lanczos"),
        (json!({"resample": "bicubic"}), "cannot be read"),
        (json!({"image_std": 0}), "not finite"),
        (json!({"image_mean": [0.5, 0.5]}), "cannot be read"),
        (json!({"image_processor_type": "CLIPImageProcessor"}), "`CLIPImageProcessor`"),
        (json!([]), "cannot be read"),
        (json!("siglip"), "cannot be read"),
    ];
    for (config, part) in cases {
        expect_bad_input(Preprocessor::new(Some(&config), 224), part);
    }
    expect_bad_input(Preprocessor::new(Some(&json!({})), 448), "left out, which is 224x224");
    for size in [0, 65_536, usize::MAX] {
        expect_bad_input(Preprocessor::new(None, size), "image size must be 1 to 65535");
    }
}

#[test]
fn unusable_files_are_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let preprocessor = Preprocessor::new(None, 224).unwrap();
    expect_bad_input(preprocessor.open(&folder.path().join("absent.png")), "No such file");
    expect_bad_input(preprocessor.open(folder.path()), "not a regular file");
    expect_bad_input(preprocessor.open(&write("empty.png", b"")), "not PNG, JPEG or WebP");
    expect_bad_input(preprocessor.open(&write("text.png", b"not a picture at all")), "not PNG, JPEG or WebP");
    expect_bad_input(preprocessor.open(&write("named.png", b"GIF89a\x01\0\x01\0\0\0\0;")), "format is Gif");
    expect_bad_input(preprocessor.open(&write("huge.png", &png_header(65_535, 65_535))), "too large");
    expect_bad_input(preprocessor.open(&write("long.png", &png_header(1, 70_000))), "too large");

    for (name, part) in [("rgb.png", "corrupt"), ("color.jpg", "cut short"), ("lossless.webp", "corrupt")] {
        let whole = std::fs::read(golden("pictures/kinds").join(name)).unwrap();
        for length in [20, whole.len() / 2, whole.len() - 20] {
            expect_bad_input(preprocessor.open(&write(name, &whole[..length])), part);
        }
    }
    let mut flipped = std::fs::read(golden("pictures/kinds/rgb.png")).unwrap();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    expect_bad_input(preprocessor.open(&write("flipped.png", &flipped)), "corrupt");

    let fixed = Preprocessor::new(Some(&json!({"do_resize": false})), 224).unwrap();
    expect_bad_input(fixed.open(&golden("pictures/kinds/rgb.png")), "is 21x13 pixels");
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A preprocessor whose values are the picture's 8-bit steps.
fn raw(size: usize, resample: usize) -> Preprocessor {
    let size_key = json!({"height": size, "width": size});
    let config = json!({"do_rescale": false, "do_normalize": false, "resample": resample, "size": size_key});
    Preprocessor::new(Some(&config), size).unwrap()
}

fn bytes(pixels: &Pixels) -> Vec<u8> {
    pixels.values.iter().map(|value| *value as u8).collect()
}

fn tensor(file: &[u8], name: &str) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    assert!(matches!(tensor.dtype(), Dtype::U8 | Dtype::F32), "{name}");
    tensor.data().to_vec()
}

fn assert_same(what: &str, seen: &[u8], expected: &[u8]) {
    assert_eq!(seen.len(), expected.len(), "{what}");
    let differing = seen.iter().zip(expected).filter(|(a, b)| a != b).count();
    assert_eq!(differing, 0, "{what}: {differing} of {} bytes differ", seen.len());
}

fn expect_bad_input<T>(result: anyhow::Result<T>, part: &str) {
    let Err(error) = result else { panic!("expected an error with `{part}`") };
    assert!(error.is::<BadInput>(), "{error} is no BadInput");
    assert!(error.to_string().contains(part), "`{error}` lacks `{part}`");
}

/// The start of an RGB PNG of this size; its check sum is right, its pixels are absent.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    file.extend(&chunk);
    file.extend(crc32(&chunk).to_be_bytes());
    file.extend(b"\0\0\0\0IDAT");
    file.extend(crc32(b"IDAT").to_be_bytes());
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    let bit = |sum: u32| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 };
    !bytes.iter().fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), |sum, _| bit(sum)))
}
