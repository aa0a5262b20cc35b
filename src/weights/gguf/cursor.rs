//! A file read from its beginning, with a bound on everything that it may claim: nothing is allocated for bytes that are not there.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use crate::error::BadInput;

/// Bytes of a header at most. The largest vocabularies take a tenth of it.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

/// Reads the header of a file.
pub struct Cursor<'a> {
    file: BufReader<&'a File>,
    /// For messages.
    name: &'a str,
    at: u64,
    /// Where reading ends: with the file, or with the longest header.
    end: u64,
    is_whole: bool,
}

impl<'a> Cursor<'a> {
    /// From byte `at` on, of a file of `bytes`.
    pub fn new(file: &'a File, name: &'a str, at: u64, bytes: u64) -> Result<Self, BadInput> {
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let moved = reader.seek(SeekFrom::Start(at));
        let (end, is_whole) = (bytes.min(at.saturating_add(MAX_HEADER_BYTES)), bytes <= MAX_HEADER_BYTES);
        moved.map_err(|error| BadInput::new(format!("`{name}` cannot be read: {error}")))?;
        Ok(Self { file: reader, name, at, end, is_whole })
    }

    /// The byte that is read next.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The error of a file that says what cannot be.
    pub fn bad(&self, what: impl std::fmt::Display) -> BadInput {
        bad(self.name, what)
    }

    /// Fails where fewer than `bytes` are left.
    fn need(&self, bytes: u64, what: &str) -> Result<(), BadInput> {
        let left = self.end - self.at;
        if bytes <= left {
            return Ok(());
        }
        Err(self.bad(match self.is_whole {
            true => format!("{what} at byte {} takes {bytes} bytes, and {left} are left: it is truncated", self.at),
            false => format!(
                "{what} at byte {} takes {bytes} bytes, and a header has {} MiB at most",
                self.at,
                MAX_HEADER_BYTES >> 20
            ),
        }))
    }

    /// Fails where `count` items of `size` bytes or more cannot be there.
    pub fn need_all(&self, count: u64, size: u64, what: &str) -> Result<(), BadInput> {
        self.need(count.saturating_mul(size), what)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], BadInput> {
        self.need(N as u64, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), BadInput> {
        self.file.read_exact(bytes).map_err(|error| self.bad(format!("reading at byte {}: {error}", self.at)))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    pub fn u8(&mut self, what: &str) -> Result<u8, BadInput> {
        Ok(self.fixed::<1>(what)?[0])
    }

    pub fn u16(&mut self, what: &str) -> Result<u16, BadInput> {
        Ok(u16::from_le_bytes(self.fixed(what)?))
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, BadInput> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, BadInput> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    /// A text behind its length of 8 bytes, of at most `most` bytes.
    pub fn text(&mut self, what: &str, most: u64) -> Result<String, BadInput> {
        let length = self.u64(what)?;
        if length > most {
            return Err(
                self.bad(format!("{what} at byte {} claims {length} bytes; at most {most} are possible", self.at))
            );
        }
        self.need(length, what)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.bad(format!("{what} before byte {} is not UTF-8", self.at)))
    }

    pub fn skip(&mut self, bytes: u64, what: &str) -> Result<(), BadInput> {
        self.need(bytes, what)?;
        let moved = self.file.seek_relative(bytes as i64);
        moved.map_err(|error| self.bad(format!("reading at byte {}: {error}", self.at)))?;
        self.at += bytes;
        Ok(())
    }
}

/// The error of a file that says what cannot be.
pub fn bad(name: &str, what: impl std::fmt::Display) -> BadInput {
    BadInput::new(format!("`{name}` is not a whole GGUF file: {what}")).hint("download the file again")
}
