//! One window of a text in a worker: the reference's logits go into a file, a precision's are compared with that file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::engine::{OutlierColumns, Session};
use crate::quality::CallPath;
use crate::quality::cost::{self, TokenCost};
use crate::quality::pass::{self, Feed};
use crate::quality::rows::{RowReader, RowWriter};

/// What a worker does with one window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scoring {
    pub prefix: Vec<u32>,
    pub tokens: Vec<u32>,
    /// The first of `tokens` that is scored.
    pub first: usize,
    pub path: CallPath,
    pub logits: LogitsFile,
    pub greedy: Greedy,
}

/// Where the reference's logits of the scored tokens are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum LogitsFile {
    Write(PathBuf),
    Compare(PathBuf),
}

/// A greedy text behind the window's first tokens, for where it departs from the reference's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Greedy {
    pub n_prompt: usize,
    /// 0: none.
    pub n_gen: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// Of each scored token; empty for the reference.
    pub costs: Vec<TokenCost>,
    pub greedy_ids: Vec<u32>,
    /// Of all calls since the worker began.
    pub outliers: OutlierColumns,
}

/// Runs a window behind what the session's encoder holds. Fails where a logit is not finite.
pub fn score(session: &mut dyn Session, scoring: &Scoring) -> Result<Scored> {
    let costs = match &scoring.logits {
        LogitsFile::Write(path) => write(session, scoring, RowWriter::create(path)?).map(|()| Vec::new())?,
        LogitsFile::Compare(path) => compare(session, scoring, path)?,
    };
    let outliers = session.outlier_columns()?;
    Ok(Scored { costs, greedy_ids: greedy(session, scoring)?, outliers })
}

fn feed(scoring: &Scoring) -> Feed<'_> {
    Feed { prefix: &scoring.prefix, tokens: &scoring.tokens, first: scoring.first, path: scoring.path }
}

fn write(session: &mut dyn Session, scoring: &Scoring, mut rows: RowWriter) -> Result<()> {
    pass::run(session, feed(scoring), &mut |_, logits| {
        cost::check_finite("the reference's", logits)?;
        rows.write(logits)
    })?;
    rows.finish()
}

fn compare(session: &mut dyn Session, scoring: &Scoring, path: &std::path::Path) -> Result<Vec<TokenCost>> {
    let (mut rows, mut costs) = (None, Vec::new());
    pass::run(session, feed(scoring), &mut |token, logits| {
        let rows = match &mut rows {
            Some(rows) => rows,
            none => none.insert(RowReader::open(path, logits.len())?),
        };
        let compared = cost::compare(rows.next_row()?, logits, scoring.tokens[token]);
        costs.push(compared.with_context(|| format!("token {token} of the window"))?);
        Ok(())
    })?;
    Ok(costs)
}

fn greedy(session: &mut dyn Session, scoring: &Scoring) -> Result<Vec<u32>> {
    let Greedy { n_prompt, n_gen } = scoring.greedy;
    if n_gen == 0 {
        return Ok(Vec::new());
    }
    session.rewind(0);
    if !scoring.prefix.is_empty() {
        session.prefill(&scoring.prefix)?;
    }
    let mut ids = vec![session.prefill(&scoring.tokens[..n_prompt])?];
    session.decode(n_gen - 1, &mut |id| ids.push(id))?;
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{FakeSession, FakeTime, Run};

    fn scoring(logits: LogitsFile) -> Scoring {
        Scoring {
            prefix: vec![],
            tokens: vec![0, 1, 1, 0],
            first: 1,
            path: CallPath::Prefill,
            logits,
            greedy: Greedy { n_prompt: 2, n_gen: 2 },
        }
    }

    fn session(logits: &[f32]) -> FakeSession {
        FakeSession::new(FakeTime::default(), [Run { logits: logits.to_vec(), ..Run::default() }])
    }

    #[test]
    fn a_precision_is_held_against_the_reference_token_by_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let reference = score(&mut session(&[0.0, 0.5]), &scoring(LogitsFile::Write(path.clone()))).unwrap();
        assert_eq!((reference.costs.len(), reference.greedy_ids), (0, vec![5, 6]));
        let same = score(&mut session(&[0.0, 0.5]), &scoring(LogitsFile::Compare(path.clone()))).unwrap();
        assert!(same.costs.len() == 3 && same.costs.iter().all(|cost| cost.kl == 0.0 && cost.agrees));
        let other = score(&mut session(&[0.75, 0.5]), &scoring(LogitsFile::Compare(path.clone()))).unwrap();
        assert!(other.costs.iter().all(|cost| cost.kl > 0.0 && !cost.agrees && cost.logit_error == 0.75));
        for (logits, file) in [(f32::NAN, LogitsFile::Write(path.clone())), (f32::INFINITY, LogitsFile::Compare(path))]
        {
            assert!(score(&mut session(&[logits, 0.5]), &scoring(file)).is_err());
        }
    }
}
