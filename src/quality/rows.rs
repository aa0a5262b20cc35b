//! The reference's logits on their way to the precisions: fp32 rows in a file, little-endian, one after the other. A reader
//! holds one row, so that a process needs no memory for a vocabulary times a text.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// Most bytes of one window's file. They bound a window's length where the vocabulary is large: 392 rows at 128k.
pub const MAX_FILE_BYTES: usize = 192 << 20;

/// Rows of this vocabulary that one file may hold, at least 1.
pub fn max_rows(vocab: usize) -> usize {
    (MAX_FILE_BYTES / (4 * vocab.max(1))).max(1)
}

pub struct RowWriter(BufWriter<File>);

impl RowWriter {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).context("making the file of the reference's logits")?;
        Ok(Self(BufWriter::with_capacity(1 << 20, file)))
    }

    pub fn write(&mut self, row: &[f32]) -> Result<()> {
        row.iter()
            .try_for_each(|value| self.0.write_all(&value.to_le_bytes()))
            .context("keeping the reference's logits")
    }

    pub fn finish(mut self) -> Result<()> {
        self.0.flush().context("keeping the reference's logits")
    }
}

pub struct RowReader {
    file: BufReader<File>,
    bytes: Vec<u8>,
    row: Vec<f32>,
}

impl RowReader {
    pub fn open(path: &Path, vocab: usize) -> Result<Self> {
        let file = File::open(path).context("opening the reference's logits")?;
        Ok(Self { file: BufReader::new(file), bytes: vec![0; 4 * vocab], row: vec![0.0; vocab] })
    }

    /// The next row. Fails where the file ends.
    pub fn next_row(&mut self) -> Result<&[f32]> {
        self.file.read_exact(&mut self.bytes).context("reading the reference's logits")?;
        let values = self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        self.row.iter_mut().zip(values).for_each(|(slot, value)| *slot = value);
        Ok(&self.row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let rows = [[1.5f32, -0.0, f32::MIN_POSITIVE], [f32::MAX, 1e-45, -3.25]];
        let mut writer = RowWriter::create(&path).unwrap();
        rows.iter().for_each(|row| writer.write(row).unwrap());
        writer.finish().unwrap();
        let mut reader = RowReader::open(&path, 3).unwrap();
        for row in rows {
            let read: Vec<u32> = reader.next_row().unwrap().iter().map(|value| value.to_bits()).collect();
            assert_eq!(read, row.map(f32::to_bits));
        }
        assert!(reader.next_row().is_err());
    }

    #[test]
    fn files_stay_below_their_bound() {
        for vocab in [1, 512, 49_152, 128_256, 262_144, 1 << 40] {
            let rows = max_rows(vocab);
            assert!(rows >= 1 && (rows == 1 || 4 * rows * vocab <= MAX_FILE_BYTES), "{vocab}");
        }
    }
}
