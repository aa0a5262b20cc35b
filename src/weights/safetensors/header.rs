//! A file's header: 8 bytes of length, then JSON, then the tensors without gaps to the end.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::tensor::Metadata;

use super::{Shard, short};
use crate::error::BadInput;
use crate::weights::sniff;

/// The longest header that the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Opens a file and reads its header. Fails with [`BadInput`] on a file that is not whole, or something else.
pub fn read_header(path: &Path) -> Result<(Shard, Metadata)> {
    let name = short(path);
    if let Some(error) = sniff::not_itself(path) {
        return Err(error.into());
    }
    let bad = |what: String| {
        BadInput::new(format!("`{name}` is not a whole safetensors file: {what}")).hint("download the file again")
    };
    let file = File::open(path).with_context(|| format!("opening `{name}`"))?;
    let bytes = file.metadata().with_context(|| format!("opening `{name}`"))?.len();
    let mut length = [0; 8];
    if bytes < 8 {
        return Err(bad(format!("{bytes} bytes, where the header alone needs 8")).into());
    }
    file.read_exact_at(&mut length, 0).with_context(|| format!("reading `{name}`"))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > bytes - 8 {
        let allowed = MAX_HEADER_BYTES.min(bytes - 8);
        return Err(bad(format!("its header claims {header_bytes} bytes, at most {allowed} are possible")).into());
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8).with_context(|| format!("reading `{name}`"))?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| bad(format!("its header cannot be read: {error}")))?;
    let data_start = 8 + header_bytes;
    let expected = data_start.checked_add(metadata.data_len() as u64);
    match expected {
        Some(expected) if expected == bytes => Ok((Shard { file, name, bytes, data_start }, metadata)),
        Some(expected) if expected > bytes => {
            Err(bad(format!("it is truncated: {bytes} bytes, its header announces {expected}")).into())
        }
        _ => Err(bad(format!("{bytes} bytes, but its tensors end before the file does")).into()),
    }
}
