//! The heads of a batch: the logits of each sequence's last row, and its token.

use anyhow::{Context, Result};
use half::f16;

use super::Prefill;
use crate::kernels::cuda::choose::Choice;
use crate::kernels::cuda::launch::dimension;
use crate::kernels::cuda::place::DevicePlace;
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};
use crate::plan::Softcap;

impl Prefill<'_> {
    /// Launches the head of the last row of each sequence, of the rows at `x`. Logits, tokens and places are the session's.
    pub(super) fn choose(&self, x: u64) -> Result<()> {
        let Self { on, shape, launcher, arena, .. } = *self;
        let head = on.model().decoder.head().context("this plan has no head")?;
        let (session, matrix) = (on.session(), on.matrix(head.weight));
        let (sequences, rows) = (shape.batch.sequences, shape.batch.rows_each());
        let of_first = |address: u64, bytes: usize| address + (shape.first * bytes) as u64;
        let last = arena.take::<f16>(sequences * matrix.k)?;
        // SAFETY: x holds the call's rows of k, `last` one for each sequence.
        unsafe { self.kernels().last_rows(sequences, (rows, matrix.k), x, head.scale, last.address) }?;
        let input = SharedInput::new(last.address, sequences, session.outlier_columns, arena);
        let logits = of_first(session.logits, size_of::<f32>() * matrix.n);
        // What a format rounds to fp16 lies elsewhere until it is chosen from.
        let rounded = if matrix.family.rounds_products { Some(arena.take::<f16>(sequences * matrix.n)?) } else { None };
        let products = rounded.as_ref().map_or(logits, |rounded| rounded.address);
        let choice = Choice {
            products,
            logits,
            bias: head.bias.map_or(0, |bias| on.vector(bias)),
            tokens: of_first(session.tokens, size_of::<i32>()),
            places: of_first(session.places, size_of::<DevicePlace>()),
            host: of_first(session.host, size_of::<u64>()),
            softcap: head.softcap.map_or(0.0, |Softcap(cap)| cap),
            is_float: i32::from(rounded.is_none()),
            n: dimension(matrix.n)?,
            advance: dimension(rows)?,
            host_slots: dimension(session.host_slots)?,
            host_sequences: dimension(session.sequences)?,
        };
        // SAFETY: the input holds rows of k, the products rows of n; all else is the session's, which has as many sequences.
        unsafe {
            matrix.multiply_rows(launcher, &input, ProductAt::new(products, rounded.is_none()))?;
            choice.run(launcher, sequences)
        }
        .map_err(Into::into)
    }
}
