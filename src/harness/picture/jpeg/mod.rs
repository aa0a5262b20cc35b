//! JPEG files to the RGB that Pillow makes of them. The decoder gives the samples as they are stored; what they mean, and how they
//! become RGB, is libjpeg's and Pillow's.

mod markers;

use image::RgbImage;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::options::DecoderOptions;

use self::markers::Colors;

/// A picture as it is stored, with its orientation.
pub struct Decoded {
    pub picture: RgbImage,
    pub exif: Option<Vec<u8>>,
    pub xmp: Option<Vec<u8>>,
}

/// Decodes a whole file. Fails where it is cut, broken, of a kind that is not read, or has more than `max_bytes` of samples.
pub fn decode(file: &[u8], max_bytes: u64) -> Result<Decoded, String> {
    if !markers::is_whole(file) {
        return Err("it is a JPEG cut short".to_owned());
    }
    let broken = |error: zune_jpeg::errors::DecodeErrors| format!("it is corrupt or of an unsupported kind: {error:?}");
    let colors = markers::colors(file).ok_or("it is a JPEG of neither one, three nor four components")?;
    let plain = markers::without_adobe(file);
    let options = DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(plain.as_slice()), options);
    decoder.decode_headers().map_err(broken)?;
    let stored = decoder.input_colorspace().ok_or("it has no header")?;
    // The same space on both sides: samples are copied.
    decoder.set_options(options.jpeg_set_out_colorspace(stored));
    let (width, height) = decoder.dimensions().ok_or("it has no size")?;
    let n_components = if colors == Colors::Grey { 1 } else { stored.num_components() };
    let (width, height) = (width as u32, height as u32);
    if u64::from(width) * u64::from(height) * n_components as u64 > max_bytes {
        return Err(format!("it is too large: at most {max_bytes} bytes decoded are read"));
    }
    let samples = decoder.decode().map_err(broken)?;
    let (exif, xmp) = (decoder.exif().cloned(), decoder.xmp().cloned());
    let rgb: Vec<u8> = samples.chunks_exact(n_components).flat_map(|pixel| rgb(colors, pixel)).collect();
    let picture = RgbImage::from_raw(width, height, rgb).ok_or("its samples do not fill it")?;
    Ok(Decoded { picture, exif, xmp })
}

fn rgb(colors: Colors, pixel: &[u8]) -> [u8; 3] {
    match (colors, pixel) {
        (Colors::YCbCr, &[y, cb, cr, ..]) => from_ycc(y, cb, cr),
        (Colors::Rgb, &[red, green, blue, ..]) => [red, green, blue],
        (Colors::Cmyk, &[cyan, magenta, yellow, black, ..]) => from_inverted_cmyk([cyan, magenta, yellow], black),
        // libjpeg makes CMYK of it: each ink is what is missing of a colour.
        (Colors::Ycck, &[y, cb, cr, black, ..]) => {
            from_inverted_cmyk(from_ycc(y, cb, cr).map(|color| 255 - color), black)
        }
        (_, &[grey, ..]) => [grey; 3],
        (_, &[]) => [0; 3],
    }
}

/// libjpeg's `ycc_rgb_convert`: 16 bits after the point, the two parts of green rounded together.
fn from_ycc(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let fixed = |factor: f64| (factor * 65_536.0 + 0.5) as i32;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((fixed(1.402) * cr + HALF) >> 16);
    let green = y + ((-fixed(0.344_14) * cb - fixed(0.714_14) * cr + HALF) >> 16);
    let blue = y + ((fixed(1.772) * cb + HALF) >> 16);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}

/// Pillow's `cmyk2rgb`, of inks that are stored inverted as Adobe's programs do: Pillow takes every CMYK JPEG so.
fn from_inverted_cmyk(inks: [u8; 3], black: u8) -> [u8; 3] {
    let white = u32::from(black);
    inks.map(|ink| {
        let product = u32::from(255 - ink) * white + 128;
        let part = ((product >> 8) + product) >> 8;
        white.saturating_sub(part) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colors_are_those_of_libjpeg_and_pillow() {
        assert_eq!(from_ycc(128, 128, 128), [128; 3]);
        assert_eq!(from_ycc(76, 85, 255), [254, 0, 0]);
        assert_eq!(from_ycc(255, 0, 255), [255, 208, 28]);
        // Full white in inverted inks is no ink at all.
        assert_eq!(from_inverted_cmyk([255; 3], 255), [255; 3]);
        assert_eq!(from_inverted_cmyk([0, 255, 128], 255), [0, 255, 128]);
        assert_eq!(from_inverted_cmyk([255; 3], 0), [0; 3]);
    }
}
