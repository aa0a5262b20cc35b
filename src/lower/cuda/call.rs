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
    /// Its positions begin behind the tokens in the decoder's caches; at 0 for an encoder.
    pub batch: Batch,
    /// Rows of the last encoder call, or of this one.
    pub encoded: usize,
}

impl CallShape {
    pub fn rows(self) -> usize {
        self.batch.rows()
    }

    /// The position of the first row.
    pub fn position(self) -> usize {
        self.batch.positions.start
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    Encoder,
    /// The decoder, and the head of its last row.
    Prompt,
    /// The decoder up to its head.
    Scored,
}

/// Values that a call reads and the host makes.
pub enum CallInput {
    /// The tokens, then for each row that of the features that it takes, if it stands for a part of a picture.
    Tokens(Vec<i32>),
    /// `[rows, channels · patch²]`
    Patches(Vec<f16>),
}

impl CallInput {
    /// The input of a call over `tokens`, where the last encoder call had `encoded` rows.
    ///
    /// # Errors
    /// If more tokens stand for parts of a picture than it has.
    pub fn tokens(model: &Model, tokens: &[u32], encoded: usize) -> Result<Self> {
        let image = match model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => Some(picture.token),
            Some(EncoderInputKind::Tokens) | None => None,
        };
        let mut n_image = 0;
        let feature_of_row = tokens.iter().map(|token| {
            n_image += i32::from(Some(*token) == image);
            n_image - 1
        });
        let feature_of_row: Vec<i32> = feature_of_row.collect();
        if n_image as usize > encoded {
            bail!("the prompt has {n_image} image tokens, more than the picture has features");
        }
        Ok(CallInput::Tokens(tokens.iter().map(|token| *token as i32).chain(feature_of_row).collect()))
    }

    pub fn bytes(&self) -> usize {
        match self {
            CallInput::Tokens(values) => size_of_val(&values[..]),
            CallInput::Patches(values) => size_of_val(&values[..]),
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
