//! The markers of a JPEG file (ITU T.81, annex B): whether it is all there, and what its samples mean.

use std::ops::Range;

/// Meaning of the samples of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colors {
    Grey,
    YCbCr,
    Rgb,
    Cmyk,
    Ycck,
}

/// A segment between two markers.
struct Segment<'a> {
    marker: u8,
    /// Bytes after the length.
    content: &'a [u8],
    /// In the file, marker and length included.
    place: Range<usize>,
}

const START_OF_IMAGE_LEN: usize = 2;
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;
const APP0: u8 = 0xe0;
const APP14: u8 = 0xee;

/// False for what may follow 0xff inside coded data: a stuffed zero, a restart, a fill byte.
fn starts_segment(marker: u8) -> bool {
    !matches!(marker, 0x00 | 0x01 | 0xd0..=0xd7 | 0xff)
}

/// The segments of a file, up to one that is cut. The end of the image is one without content.
fn segments(file: &[u8]) -> impl Iterator<Item = Segment<'_>> {
    let mut at = START_OF_IMAGE_LEN;
    std::iter::from_fn(move || {
        let rest = file.get(at..)?;
        let start = at + rest.windows(2).position(|pair| pair[0] == 0xff && starts_segment(pair[1]))?;
        let marker = file[start + 1];
        if marker == END_OF_IMAGE {
            at = start + 2;
            return Some(Segment { marker, content: &[], place: start..at });
        }
        let length = file.get(start + 2..)?.first_chunk().map(|length| usize::from(u16::from_be_bytes(*length)))?;
        let content = file.get(start + 4..start + 2 + length)?;
        at = start + 2 + length;
        Some(Segment { marker, content, place: start..at })
    })
}

/// True where the markers of `file` lead to the end of the image. The decoder fills missing data with grey, where Pillow
/// refuses it.
///
/// Walking the markers separates the picture's own end from that of a thumbnail in its Exif data, and lets bytes follow it as
/// cameras write them.
pub fn is_whole(file: &[u8]) -> bool {
    segments(file).any(|segment| segment.marker == END_OF_IMAGE)
}

/// Meaning of the samples by libjpeg's rules (`default_decompress_parms`), which Pillow follows: JFIF counts before Adobe's
/// marker, and that before the components' names. `None` where there are two components or none.
pub fn colors(file: &[u8]) -> Option<Colors> {
    let mut is_jfif = false;
    let mut adobe = None;
    let mut components = Vec::new();
    for segment in segments(file).take_while(|segment| segment.marker != START_OF_SCAN) {
        match segment.marker {
            APP0 if segment.content.len() >= 14 => is_jfif |= segment.content.starts_with(b"JFIF\0"),
            APP14 => adobe = adobe_transform(&segment).or(adobe),
            // Frames; the three others in that range are tables and arithmetic conditioning.
            0xc0..=0xcf if ![0xc4, 0xc8, 0xcc].contains(&segment.marker) => {
                components = segment.content.get(6..).unwrap_or_default().chunks_exact(3).map(|part| part[0]).collect();
            }
            _ => {}
        }
    }
    match (components.len(), adobe) {
        (1, _) => Some(Colors::Grey),
        (3, _) if is_jfif => Some(Colors::YCbCr),
        (3, Some(0)) => Some(Colors::Rgb),
        (3, None) if components == *b"RGB" => Some(Colors::Rgb),
        (3, _) => Some(Colors::YCbCr),
        (4, None | Some(0)) => Some(Colors::Cmyk),
        (4, Some(_)) => Some(Colors::Ycck),
        _ => None,
    }
}

/// The color transform of Adobe's marker.
fn adobe_transform(segment: &Segment) -> Option<u8> {
    let is_adobe = segment.marker == APP14 && segment.content.starts_with(b"Adobe");
    segment.content.get(11).copied().filter(|_| is_adobe)
}

/// The file without Adobe's markers, which the decoder would go by.
pub fn without_adobe(file: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(file.len());
    let mut from = 0;
    for segment in segments(file).take_while(|segment| segment.marker != START_OF_SCAN) {
        if segment.marker == APP14 && segment.content.starts_with(b"Adobe") {
            plain.extend_from_slice(&file[from..segment.place.start]);
            from = segment.place.end;
        }
    }
    plain.extend_from_slice(&file[from..]);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pictures_own_end_counts() {
        let exif = b"\xff\xe1\x00\x06\xff\xd8\xff\xd9";
        let scan = b"\xff\xda\x00\x03\x01\x11\xff\x00\x22\xff\xd0\x33";
        let cases: [(&[&[u8]], bool); 7] = [
            (&[b"\xff\xd8", scan, b"\xff\xd9"], true),
            (&[b"\xff\xd8", exif, scan, b"\xff\xd9"], true),
            (&[b"\xff\xd8", exif, scan, b"\xff\xff\xd9\0\0\0"], true),
            (&[b"\xff\xd8", exif, scan], false),
            (&[b"\xff\xd8", exif, scan, b"\xff"], false),
            (&[b"\xff\xd8", b"\xff\xe1\xff\xff\xff\xd9"], false),
            (&[b"\xff"], false),
        ];
        for (parts, whole) in cases {
            assert_eq!(is_whole(&parts.concat()), whole, "{parts:x?}");
        }
    }

    #[test]
    fn samples_mean_what_libjpeg_says() {
        let jfif: &[u8] = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0";
        let adobe = |transform: u8| [b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0", &[transform][..]].concat();
        let frame = |ids: &[u8]| {
            let parts: Vec<u8> = ids.iter().flat_map(|id| [*id, 0x11, 0]).collect();
            let head = [0xff, 0xc2, 0, 8 + parts.len() as u8, 8, 0, 8, 0, 8, ids.len() as u8];
            [&head[..], &parts, b"\xff\xda\x00\x02"].concat()
        };
        let (names, letters, four) = (frame(&[1, 2, 3]), frame(b"RGB"), frame(&[1, 2, 3, 4]));
        let cases: [(&[&[u8]], Option<Colors>); 15] = [
            (&[&frame(&[1])], Some(Colors::Grey)),
            (&[&adobe(2), &frame(&[7])], Some(Colors::Grey)),
            (&[&frame(&[1, 2])], None),
            (&[&names], Some(Colors::YCbCr)),
            (&[&frame(&[0, 1, 2])], Some(Colors::YCbCr)),
            (&[&letters], Some(Colors::Rgb)),
            (&[jfif, &letters], Some(Colors::YCbCr)),
            (&[&adobe(0), &names], Some(Colors::Rgb)),
            (&[&adobe(0), jfif, &names], Some(Colors::YCbCr)),
            (&[&adobe(1), &letters], Some(Colors::YCbCr)),
            (&[&adobe(9), &names], Some(Colors::YCbCr)),
            (&[&four], Some(Colors::Cmyk)),
            (&[jfif, &adobe(0), &four], Some(Colors::Cmyk)),
            (&[&adobe(2), &four], Some(Colors::Ycck)),
            (&[&adobe(1), &four], Some(Colors::Ycck)),
        ];
        for (parts, expected) in cases {
            let file = [b"\xff\xd8", &parts.concat()[..]].concat();
            assert_eq!(colors(&file), expected, "{file:x?}");
            let plain = without_adobe(&file);
            assert!(!plain.windows(5).any(|word| word == b"Adobe") && plain.ends_with(&file[file.len() - 4..]));
        }
    }
}
