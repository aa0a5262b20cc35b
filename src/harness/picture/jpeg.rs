//! Whether a JPEG file is all there: the decoder fills what is missing with grey, where Pillow refuses the file.

/// Whether the markers of `file` (ITU T.81, annex B) lead to the end of the image.
///
/// Walking them, not looking for the last two bytes, tells the picture's own end from that of a thumbnail in its Exif
/// data, and lets bytes follow it as cameras write them.
pub fn is_whole(file: &[u8]) -> bool {
    const END_OF_IMAGE: u8 = 0xd9;
    let mut rest = file.get(START_OF_IMAGE_LEN..).unwrap_or_default();
    while let Some(at) = rest.windows(2).position(|pair| pair[0] == 0xff && starts_segment(pair[1])) {
        if rest[at + 1] == END_OF_IMAGE {
            return true;
        }
        let segment = &rest[at + 2..];
        let length = segment.first_chunk().map_or(0, |length| usize::from(u16::from_be_bytes(*length)));
        rest = segment.get(length..).unwrap_or_default();
    }
    false
}

const START_OF_IMAGE_LEN: usize = 2;

/// False for what may follow 0xff inside coded data: a stuffed zero, a restart, a fill byte.
fn starts_segment(marker: u8) -> bool {
    !matches!(marker, 0x00 | 0x01 | 0xd0..=0xd7 | 0xff)
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
}
