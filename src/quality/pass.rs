//! One window of a text through a session, by either path.

use anyhow::{Result, bail};

use super::CallPath;
use crate::engine::Session;

/// Input of a window: everything that its rows of logits follow from.
#[derive(Debug, Clone, Copy)]
pub struct WindowInput<'a> {
    /// Goes in first, in one call of its own: a picture's tokens and its prompt. May be empty.
    pub prefix: &'a [u32],
    /// At least one, and two without a prefix.
    pub tokens: &'a [u32],
    /// The first of `tokens` that is scored.
    pub first: usize,
    pub path: CallPath,
}

/// Runs a window from an empty cache. `on_row` gets each scored token, an index into the feed's tokens, with the logits
/// that predict it. Fails where the session or `on_row` does; whatever an encoder holds stays.
pub fn run(
    session: &mut dyn Session,
    feed: WindowInput,
    on_row: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let WindowInput { prefix, tokens, first, path } = feed;
    session.rewind(0);
    if !prefix.is_empty() {
        session.prefill(prefix)?;
    }
    if first == 0 {
        if prefix.is_empty() {
            bail!("nothing stands before the first token, so nothing predicts it");
        }
        on_row(0, &session.logits()?)?;
    }
    // The last token predicts what the window does not hold.
    let Some((_, fed)) = tokens.split_last() else { bail!("a window needs tokens") };
    match path {
        _ if fed.is_empty() => Ok(()),
        CallPath::Prefill => prefill(session, fed, first, on_row),
        CallPath::Decode => decode(session, fed, first, on_row),
    }
}

fn prefill(
    session: &mut dyn Session,
    fed: &[u32],
    first: usize,
    on_row: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let mut outcome = Ok(());
    session.score(fed, &mut |row, logits| {
        if row + 1 >= first && outcome.is_ok() {
            outcome = on_row(row + 1, logits);
        }
    })?;
    outcome
}

fn decode(
    session: &mut dyn Session,
    fed: &[u32],
    first: usize,
    on_row: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    for (row, token) in fed.iter().enumerate() {
        session.prefill(std::slice::from_ref(token))?;
        if row + 1 >= first {
            on_row(row + 1, &session.logits()?)?;
        }
    }
    Ok(())
}

/// Index of the first token where two greedy texts differ; `None` where the shorter one begins the longer.
pub fn departure(reference: &[u32], measured: &[u32]) -> Option<usize> {
    reference.iter().zip(measured).position(|(a, b)| a != b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{FakeRun, FakeSession, FakeTime};

    fn rows(feed: WindowInput) -> Result<Vec<usize>> {
        let mut session = FakeSession::new(FakeTime::default(), [FakeRun::default()]);
        let mut seen = Vec::new();
        run(&mut session, feed, &mut |token, _| {
            seen.push(token);
            Ok(())
        })?;
        Ok(seen)
    }

    #[test]
    fn both_paths_give_every_scored_token_one_row() {
        let cases: [(&[u32], &[u32], usize, &[usize]); 4] = [
            (&[], &[1, 2, 3, 4], 1, &[1, 2, 3]),
            (&[], &[1, 2, 3, 4], 3, &[3]),
            (&[9, 9], &[1, 2], 0, &[0, 1]),
            (&[9], &[1], 0, &[0]),
        ];
        for (prefix, tokens, first, expected) in cases {
            for path in [CallPath::Prefill, CallPath::Decode] {
                assert_eq!(rows(WindowInput { prefix, tokens, first, path }).unwrap(), expected, "{path:?}");
            }
        }
        assert!(rows(WindowInput { prefix: &[], tokens: &[1], first: 0, path: CallPath::Prefill }).is_err());
    }

    #[test]
    fn a_row_that_cannot_be_used_ends_the_window() {
        for path in [CallPath::Prefill, CallPath::Decode] {
            let mut session = FakeSession::new(FakeTime::default(), [FakeRun::default()]);
            let mut calls = 0;
            let feed = WindowInput { prefix: &[], tokens: &[1, 2, 3], first: 1, path };
            let outcome = run(&mut session, feed, &mut |_, _| {
                calls += 1;
                bail!("no")
            });
            assert!(outcome.is_err() && calls == 1, "{path:?}");
        }
    }

    #[test]
    fn greedy_texts_part_where_they_differ() {
        assert_eq!(departure(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(departure(&[1, 2, 3], &[1, 4, 3]), Some(1));
    }
}
