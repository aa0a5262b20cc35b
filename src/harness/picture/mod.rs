//! Pictures: an image file, or a generated test picture, as the pixels that a vision tower reads.
//!
//! The steps are those of transformers' `SiglipImageProcessor` for a path, in the same order: read
//! with Pillow (13), turned upright as its Exif data says, converted to RGB, resized, rescaled, normalised. `resize`
//! is Pillow's arithmetic.

mod jpeg;
mod resize;

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::Result;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Rgb, RgbImage};
use serde_json::Value;

use self::resize::Filter;
use crate::error::BadInput;

/// From pictures to pixels, as the image processor's settings of a model folder say.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    size: u32,
    /// `None`: pictures must have the model's size already.
    filter: Option<Filter>,
    /// The pixel value of each of the 256 steps, of each channel.
    values: [Vec<f32>; 3],
}

/// A picture as a vision tower reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// [3, size, size], channels red, green, blue.
    pub values: Vec<f32>,
    pub size: usize,
}

impl Preprocessor {
    /// For a model whose pictures are `size` × `size`; `config` are the settings of processor_config.json or
    /// preprocessor_config.json where there are any.
    ///
    /// Without them, and for every key they leave out, SigLIP's defaults count: bicubic, 1/255, mean and standard
    /// deviation 0.5. Fails with [`BadInput`] where they ask for another processor, another size, an unknown filter or a
    /// step that is not computed.
    pub fn new(config: Option<&Value>, size: usize) -> Result<Self> {
        let side = u32::try_from(size).ok().filter(|side| (1..=MAX_SIDE).contains(side));
        let side =
            side.ok_or_else(|| BadInput::new(format!("the model's image size must be 1 to {MAX_SIDE}, not {size}")))?;
        let Some(config) = config else {
            return Ok(Self { size: side, filter: Some(Filter::Bicubic), values: steps(&ProcessorConfig::default())? });
        };
        if !config.is_object() {
            return Err(bad_config("cannot be read: they are no JSON object".to_owned()).into());
        }
        let config: ProcessorConfig =
            serde::Deserialize::deserialize(config).map_err(|error| bad_config(format!("cannot be read: {error}")))?;
        config.check_processor()?;
        config.check_steps(size)?;
        let filter = if config.do_resize.unwrap_or(true) { Some(config.filter(size)?) } else { None };
        Ok(Self { size: side, filter, values: steps(&config)? })
    }

    /// The pixels of the picture in the file at `path`, a PNG, JPEG or WebP; its extension is not looked at.
    ///
    /// Fails with [`BadInput`] where there is no such file, or it holds no whole picture of these formats, or one too
    /// large, or one of another size where the config turns resizing off.
    pub fn open(&self, path: &Path) -> Result<Pixels> {
        let picture = read(path).map_err(|why| {
            BadInput::new(format!("cannot read image `{}`: {why}", path.display()))
                .hint("give `--image` a PNG, JPEG or WebP file")
        })?;
        match self.filter {
            Some(filter) => Ok(self.pixels(&resize::resize(&picture, self.size, filter))),
            None if picture.dimensions() == (self.size, self.size) => Ok(self.pixels(&picture)),
            None => Err(BadInput::new(format!(
                "image `{}` is {}x{} pixels, and the image processor's settings turn resizing off",
                path.display(),
                picture.width(),
                picture.height()
            ))
            .hint(format!("give an image of {0}x{0} pixels", self.size))
            .into()),
        }
    }

    /// A test picture, the same on every machine: gradients with a disc, a box and a triangle on them.
    pub fn generated(&self) -> Pixels {
        let size = self.size;
        self.pixels(&RgbImage::from_fn(size, size, |x, y| Rgb(test_color(x, y, size))))
    }

    fn pixels(&self, picture: &RgbImage) -> Pixels {
        let channel = |c: usize| picture.pixels().map(move |pixel| self.values[c][usize::from(pixel.0[c])]);
        Pixels { values: (0..3).flat_map(channel).collect(), size: self.size as usize }
    }
}

/// The settings that `SiglipImageProcessor` reads; `null` counts as left out.
///
/// `do_convert_rgb` is not among them: a vision tower reads three channels whatever it says.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
struct ProcessorConfig {
    image_processor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<Value>,
    /// True where a number or a missing key of `size` means both sides.
    default_to_square: Option<bool>,
    do_center_crop: Option<bool>,
    crop_size: Option<Value>,
    do_pad: Option<bool>,
    pad_size: Option<Value>,
    data_format: Option<String>,
    input_data_format: Option<String>,
    resample: Option<u64>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<PerChannel>,
    image_std: Option<PerChannel>,
}

#[derive(Debug, Clone, Copy, serde::Deserialize)]
#[serde(untagged)]
enum PerChannel {
    Same(f64),
    Each([f64; 3]),
}

impl ProcessorConfig {
    /// Other processors crop or pad: their pictures would be wrong here, and only the answers would show it.
    fn check_processor(&self) -> Result<()> {
        match self.image_processor_type.as_deref() {
            Some(seen) if !seen.starts_with("SiglipImageProcessor") => {
                Err(bad_config(format!("ask for the processor `{seen}`; supported is `SiglipImageProcessor`")).into())
            }
            _ => Ok(()),
        }
    }

    /// Steps that are not computed are refused, unless they change nothing: a picture of the model's size is neither cut nor
    /// filled up.
    fn check_steps(&self, size: usize) -> Result<(), BadInput> {
        let cuts = |asked: Option<bool>, to: &Option<Value>| {
            asked == Some(true)
                && !(self.do_resize != Some(false) && to.as_ref().is_some_and(|to| is_square(to, size, true)))
        };
        let shown = |value: &Option<Value>| value.as_ref().map_or("left out".to_owned(), Value::to_string);
        let refused = |what: String| Err(bad_config(format!("{what}, which is not computed here")));
        let is_other = |format: &Option<String>, usual: &str| format.as_ref().is_some_and(|format| format != usual);
        match self {
            _ if cuts(self.do_center_crop, &self.crop_size) => {
                refused(format!("ask for `do_center_crop` with crop_size {}", shown(&self.crop_size)))
            }
            _ if cuts(self.do_pad, &self.pad_size) => {
                refused(format!("ask for `do_pad` with pad_size {}", shown(&self.pad_size)))
            }
            _ if is_other(&self.data_format, "channels_first") => {
                refused(format!("say data_format {:?}", self.data_format))
            }
            _ if is_other(&self.input_data_format, "channels_last") => {
                refused(format!("say input_data_format {:?}", self.input_data_format))
            }
            _ => Ok(()),
        }
    }

    /// The filter to resize with, where the picture size is the model's.
    fn filter(&self, size: usize) -> Result<Filter> {
        let default = Value::from(vec![224, 224]);
        if !is_square(self.size.as_ref().unwrap_or(&default), size, self.default_to_square == Some(true)) {
            let seen = self.size.as_ref().map_or("left out, which is 224x224".to_owned(), Value::to_string);
            let message = format!("say size {seen}, but the model reads images of {size}x{size} pixels");
            let hint = "take preprocessor_config.json or processor_config.json from the same model";
            return Err(bad_config(message).hint(hint).into());
        }
        let number = self.resample.unwrap_or(3);
        let known = Filter::ALL.get(usize::try_from(number).unwrap_or(usize::MAX));
        known.map(|(_, filter)| *filter).ok_or_else(|| {
            let known: Vec<_> = Filter::ALL.iter().enumerate().map(|(i, (name, _))| format!("{i} {name}")).collect();
            bad_config(format!("say resample {number}; supported are {}", known.join(", "))).into()
        })
    }
}

/// True where a size is `size` × `size`: by both sides, or by one number where that means both.
fn is_square(asked: &Value, size: usize, one_means_both: bool) -> bool {
    let is_size = |side: Option<&Value>| side.and_then(Value::as_u64) == Some(size as u64);
    match asked {
        Value::Object(sides) => sides.len() == 2 && is_size(sides.get("height")) && is_size(sides.get("width")),
        Value::Array(sides) => sides.len() == 2 && sides.iter().all(|side| is_size(Some(side))),
        number => one_means_both && is_size(Some(number)),
    }
}

fn bad_config(what: String) -> BadInput {
    BadInput::new(format!("the image processor's settings {what}"))
}

/// `(step · rescale_factor - mean) / std` of the 256 steps, computed in double and rounded once.
fn steps(config: &ProcessorConfig) -> Result<[Vec<f32>; 3]> {
    let factor = if config.do_rescale.unwrap_or(true) { config.rescale_factor.unwrap_or(1.0 / 255.0) } else { 1.0 };
    let normalize = config.do_normalize.unwrap_or(true);
    let each = |given: Option<PerChannel>, off: f64| match given.unwrap_or(PerChannel::Same(0.5)) {
        _ if !normalize => [off; 3],
        PerChannel::Same(value) => [value; 3],
        PerChannel::Each(values) => values,
    };
    let (mean, std) = (each(config.image_mean, 0.0), each(config.image_std, 1.0));
    let channel = |c: usize| (0..256).map(|step| ((f64::from(step) * factor - mean[c]) / std[c]) as f32).collect();
    let values: [Vec<f32>; 3] = [channel(0), channel(1), channel(2)];
    if !values.iter().flatten().all(|value| value.is_finite()) {
        let message = format!("make pixels that are not finite: image_mean {mean:?}, image_std {std:?}");
        return Err(bad_config(message).into());
    }
    Ok(values)
}

/// Longest side: JPEG's bound. It also bounds what lies between the two passes of a resize.
const MAX_SIDE: u32 = 65_535;
/// Largest decoded picture, about the 179 million pixels at which Pillow calls a file a decompression bomb.
const MAX_DECODED_BYTES: u64 = 512 << 20;
/// Largest file, which is held whole while it is decoded.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// The upright RGB picture in a file, or why there is none.
fn read(path: &Path) -> std::result::Result<RgbImage, String> {
    let about = fs::metadata(path).map_err(|error| error.to_string())?;
    if !about.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if about.len() > MAX_FILE_BYTES {
        return Err(format!("it has {} bytes, at most {MAX_FILE_BYTES} are read", about.len()));
    }
    let file = fs::read(path).map_err(|error| error.to_string())?;
    match image::guess_format(&file) {
        Ok(ImageFormat::Jpeg) => {
            let jpeg::Decoded { picture, exif, xmp } = jpeg::decode(&file, MAX_DECODED_BYTES)?;
            Ok(upright(picture.into(), exif.as_deref(), xmp.as_deref()).into_rgb8())
        }
        Ok(format @ (ImageFormat::Png | ImageFormat::WebP)) => decode(&file, format).map_err(reason),
        Ok(other) => Err(format!("its format is {other:?}; PNG, JPEG and WebP are supported")),
        Err(_) => Err("its content is not PNG, JPEG or WebP".to_owned()),
    }
}

fn decode(file: &[u8], format: ImageFormat) -> image::ImageResult<RgbImage> {
    let mut reader = ImageReader::with_format(Cursor::new(file), format);
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder()?;
    limits.reserve(decoder.total_bytes())?;
    let (exif, xmp) = (decoder.exif_metadata()?, decoder.xmp_metadata()?);
    Ok(rgb(upright(DynamicImage::from_decoder(decoder)?, exif.as_deref(), xmp.as_deref())))
}

/// Turned as the Exif data says, or XMP where that says nothing, as Pillow's `exif_transpose` does.
fn upright(mut picture: DynamicImage, exif: Option<&[u8]>, xmp: Option<&[u8]>) -> DynamicImage {
    let orientation = exif.and_then(Orientation::from_exif_chunk).or_else(|| xmp.and_then(xmp_orientation));
    picture.apply_orientation(orientation.unwrap_or(Orientation::NoTransforms));
    picture
}

/// The digit after `tiff:Orientation="` or `tiff:Orientation>`.
fn xmp_orientation(xmp: &[u8]) -> Option<Orientation> {
    let text = String::from_utf8_lossy(xmp);
    let rest = text
        .split("tiff:Orientation")
        .skip(1)
        .find_map(|rest| rest.strip_prefix("=\"").or_else(|| rest.strip_prefix('>')))?;
    let digit = rest.chars().next().and_then(|digit| digit.to_digit(10))?;
    Orientation::from_exif(digit as u8)
}

fn reason(error: ImageError) -> String {
    match error {
        ImageError::Limits(_) => {
            format!("it is too large: at most {MAX_SIDE} pixels a side and {MAX_DECODED_BYTES} bytes decoded are read")
        }
        other => format!("it is corrupt or of an unsupported kind: {other}"),
    }
}

/// Converts as Pillow's `convert("RGB")`: alpha dropped, grey repeated. Of 16 bits colour keeps the high byte, but grey is cut
/// off at 255. Scaling it, as the `image` crate does, would look better and differ from what the model gets elsewhere.
fn rgb(picture: DynamicImage) -> RgbImage {
    let high = |value: u16| (value >> 8) as u8;
    match picture {
        DynamicImage::ImageLuma16(grey) => map(&grey, |p| [p.0[0].min(255) as u8; 3]),
        DynamicImage::ImageLumaA16(grey) => map(&grey, |p| [high(p.0[0]); 3]),
        DynamicImage::ImageRgb16(color) => map(&color, |p| p.0.map(high)),
        DynamicImage::ImageRgba16(color) => map(&color, |p| [high(p.0[0]), high(p.0[1]), high(p.0[2])]),
        eight_bits => eight_bits.into_rgb8(),
    }
}

fn map<P: image::Pixel<Subpixel = u16>>(
    picture: &image::ImageBuffer<P, Vec<u16>>,
    color: impl Fn(&P) -> [u8; 3],
) -> RgbImage {
    RgbImage::from_fn(picture.width(), picture.height(), |x, y| Rgb(color(picture.get_pixel(x, y))))
}

/// The test picture's colour at (x, y), in whole numbers so that every machine agrees.
fn test_color(x: u32, y: u32, size: u32) -> [u8; 3] {
    let at = |value: u32| i64::from(value) * 256 / i64::from(size);
    let (x, y) = (at(x), at(y));
    let in_disc = (x - 88).pow(2) + (y - 96).pow(2) < 52 * 52;
    let in_box = (150..226).contains(&x) && (44..108).contains(&y);
    let in_triangle = (140..232).contains(&y) && (x - 160).abs() * 2 < y - 140;
    match () {
        () if in_disc => [224, 64, 48],
        () if in_box => [40, 96, 216],
        () if in_triangle => [48, 176, 72],
        // `at` is below 256, so a byte holds it and the mean of two.
        () => [x as u8, y as u8, (255 - (x + y) / 2) as u8],
    }
}
