//! Logits of a window on their way from an engine to the comparison: a safetensors file with one tensor, fp32 `[rows, vocab]`. Writer and
//! reader hold one row, so that no process needs memory for a vocabulary times a text.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Name of the tensor.
const TENSOR: &str = "logits";

/// The header of a file with one tensor is far shorter.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// Most bytes of one window's file. They bound a window's length where the vocabulary is large: 392 rows at 128k.
pub const MAX_FILE_BYTES: usize = 192 << 20;

/// Rows of this vocabulary that one file may hold, at least 1.
pub fn max_rows(vocab: usize) -> usize {
    (MAX_FILE_BYTES / (4 * vocab.max(1))).max(1)
}

pub struct RowWriter {
    file: BufWriter<File>,
    rows_left: usize,
}

impl RowWriter {
    /// A file of exactly `rows` rows.
    pub fn create(path: &Path, rows: usize, vocab: usize) -> Result<Self> {
        let file = File::create(path).context("making the file of the logits")?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let tensor =
            serde_json::json!({ "dtype": "F32", "shape": [rows, vocab], "data_offsets": [0, 4 * rows * vocab] });
        let mut header = serde_json::json!({ TENSOR: tensor }).to_string();
        // The format asks for values at multiples of 8.
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let length = (header.len() as u64).to_le_bytes();
        file.write_all(&length).and_then(|()| file.write_all(header.as_bytes())).context("keeping the logits")?;
        Ok(Self { file, rows_left: rows })
    }

    pub fn write(&mut self, row: &[f32]) -> Result<()> {
        let Some(left) = self.rows_left.checked_sub(1) else { bail!("more logits than the file has room for") };
        self.rows_left = left;
        row.iter().try_for_each(|value| self.file.write_all(&value.to_le_bytes())).context("keeping the logits")
    }

    /// Fails where rows are missing.
    pub fn finish(mut self) -> Result<()> {
        if self.rows_left > 0 {
            bail!("{} rows of logits are missing", self.rows_left);
        }
        self.file.flush().context("keeping the logits")
    }
}

pub struct RowReader {
    file: BufReader<File>,
    rows_left: usize,
    bytes: Vec<u8>,
    row: Vec<f32>,
}

impl RowReader {
    /// Fails on a file that is not safetensors with fp32 rows under the name `logits`.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).context("opening the logits")?);
        let mut length = [0; 8];
        file.read_exact(&mut length).context("reading the logits")?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            bail!("the file of the logits is no safetensors file");
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).context("reading the logits")?;
        let header: Value = serde_json::from_slice(&header).context("reading the header of the logits")?;
        let tensor = &header[TENSOR];
        let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let shape: Vec<usize> = tensor["shape"].as_array().into_iter().flatten().filter_map(number).collect();
        let ("F32", &[rows, vocab]) = (tensor["dtype"].as_str().unwrap_or_default(), shape.as_slice()) else {
            bail!("the file of the logits holds no tensor `{TENSOR}` of fp32 `[rows, vocab]`");
        };
        let skipped = tensor["data_offsets"].get(0).and_then(number).unwrap_or(0);
        let skipped = file.seek_relative(i64::try_from(skipped)?);
        skipped.context("reading the logits")?;
        Ok(Self { file, rows_left: rows, bytes: vec![0; 4 * vocab], row: vec![0.0; vocab] })
    }

    /// Rows that are left.
    pub fn rows_left(&self) -> usize {
        self.rows_left
    }

    /// The next row. Fails where there is none.
    pub fn next_row(&mut self) -> Result<&[f32]> {
        let Some(left) = self.rows_left.checked_sub(1) else { bail!("the file of the logits has too few rows") };
        self.rows_left = left;
        self.file.read_exact(&mut self.bytes).context("reading the logits")?;
        let values = self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        self.row.iter_mut().zip(values).for_each(|(slot, value)| *slot = value);
        Ok(&self.row)
    }
}

/// Whether all rows of a file hold numbers alone.
pub fn all_finite(path: &Path) -> Result<bool> {
    let mut rows = RowReader::open(path)?;
    while rows.rows_left() > 0 {
        if !rows.next_row()?.iter().all(|logit| logit.is_finite()) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let rows = [[1.5f32, -0.0, f32::MIN_POSITIVE], [f32::MAX, 1e-45, -3.25]];
        let mut writer = RowWriter::create(&path, 2, 3).unwrap();
        rows.iter().for_each(|row| writer.write(row).unwrap());
        writer.finish().unwrap();
        let mut reader = RowReader::open(&path).unwrap();
        for row in rows {
            let read: Vec<u32> = reader.next_row().unwrap().iter().map(|value| value.to_bits()).collect();
            assert_eq!(read, row.map(f32::to_bits));
        }
        assert!(reader.next_row().is_err());
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("logits").unwrap().shape(), [2, 3]);
        assert!(RowWriter::create(&path, 2, 3).unwrap().finish().is_err(), "rows are missing");
        std::fs::write(&path, [255; 16]).unwrap();
        assert!(RowReader::open(&path).is_err());
    }

    #[test]
    fn files_stay_below_their_bound() {
        for vocab in [1, 512, 49_152, 128_256, 262_144, 1 << 40] {
            let rows = max_rows(vocab);
            assert!(rows >= 1 && (rows == 1 || 4 * rows * vocab <= MAX_FILE_BYTES), "{vocab}");
        }
    }
}
