//! A call of many rows: its shape, what it reads and its result.

use anyhow::{Result, bail};
use half::f16;

use crate::call::Batch;
use crate::plan::{EncoderInputKind, Model};
use crate::quant::OutlierColumns;

/// Everything that the launches of a call depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallShape {
    pub kind: CallKind,
    /// The first sequence of the call among the session's.
    pub first: usize,
    /// Its positions begin behind the tokens in the decoder's caches; at 0 for an encoder.
    pub batch: Batch,
    /// Rows of the last encoder call, or of this one.
    pub encoded: usize,
}

impl CallShape {
    pub fn rows(self) -> usize {
        self.batch.rows()
    }

    /// The position of the first row of a sequence; of a step the most that it may be.
    pub fn position(self) -> usize {
        self.batch.positions.start
    }

    /// A step of all sequences, which is the same call wherever each of them stands in a cache of `capacity` positions.
    pub fn step(sequences: usize, capacity: usize, encoded: usize) -> Self {
        let batch = Batch { sequences, ..Batch::step(capacity - 1) };
        Self { kind: CallKind::Step, first: 0, batch, encoded }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    Encoder,
    /// The decoder, and the head of its last row.
    Prompt,
    /// The decoder up to its head.
    Scored,
    /// The decoder and the head of one row of each sequence of a batch: tokens and places are the session's, on the device.
    Step,
}

/// Values that a call reads and the host makes.
pub enum CallInput {
    /// The tokens, then for each row that of the features that it takes, if it stands for a part of a picture.
    Tokens(Vec<i32>),
    /// `[rows, channels · patch²]`
    Patches(Vec<f16>),
    /// Nothing: the tokens of a step are on the device.
    OnDevice,
}

impl CallInput {
    /// The input of a call over `tokens` of each of `sequences` sequences, where the last encoder call had `encoded` rows each.
    ///
    /// # Errors
    /// If more tokens of a sequence stand for parts of a picture than it has.
    pub fn tokens(model: &Model, tokens: &[u32], sequences: usize, encoded: usize) -> Result<Self> {
        let image = match model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => Some(picture.token),
            Some(EncoderInputKind::Tokens) | None => None,
        };
        let mut values: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        for (sequence, tokens) in tokens.chunks(tokens.len().div_ceil(sequences).max(1)).enumerate() {
            let mut n_image = 0;
            values.extend(tokens.iter().map(|token| {
                n_image += usize::from(Some(*token) == image);
                (sequence * encoded + n_image) as i32 - 1
            }));
            if n_image > encoded {
                bail!("the prompt has {n_image} image tokens, more than the picture has features");
            }
        }
        Ok(CallInput::Tokens(values))
    }

    pub fn bytes(&self) -> usize {
        match self {
            CallInput::Tokens(values) => size_of_val(&values[..]),
            CallInput::Patches(values) => size_of_val(&values[..]),
            CallInput::OnDevice => 0,
        }
    }
}

/// The result of a call.
#[derive(Debug, Clone, Copy)]
pub struct CallResult {
    /// Address of the rows that the head reads; 0 for an encoder.
    pub x: u64,
    /// Columns that were examined for outliers; the device counts those it finds.
    pub examined: OutlierColumns,
}
