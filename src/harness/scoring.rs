//! One window of a text in a worker: the reference's logits go into a file, a precision's are compared with that file.

use anyhow::{Context, Result};

use crate::engine::Session;
use crate::protocol::{Greedy, LogitsFile, ScoreReport, ScoreRequest};
use crate::quality::cost::{self, TokenCost};
use crate::quality::pass::{self, WindowInput};
use crate::quality::rows::{RowReader, RowWriter};

/// Runs a window with the input that the session's encoder holds. Fails where a logit is not finite.
pub fn score(session: &mut dyn Session, request: &ScoreRequest) -> Result<ScoreReport> {
    let costs = match &request.logits {
        LogitsFile::Write(path) => write(session, request, RowWriter::create(path)?).map(|()| Vec::new())?,
        LogitsFile::Compare(path) => compare(session, request, path)?,
    };
    let outliers = session.outlier_columns()?;
    Ok(ScoreReport { costs, greedy_ids: greedy(session, request)?, outliers })
}

fn feed(request: &ScoreRequest) -> WindowInput<'_> {
    WindowInput { prefix: &request.prefix, tokens: &request.tokens, first: request.first, path: request.path }
}

fn write(session: &mut dyn Session, request: &ScoreRequest, mut rows: RowWriter) -> Result<()> {
    pass::run(session, feed(request), &mut |_, logits| {
        cost::check_finite("the reference's", logits)?;
        rows.write(logits)
    })?;
    rows.finish()
}

fn compare(session: &mut dyn Session, request: &ScoreRequest, path: &std::path::Path) -> Result<Vec<TokenCost>> {
    let (mut rows, mut costs) = (None, Vec::new());
    pass::run(session, feed(request), &mut |token, logits| {
        let rows = match &mut rows {
            Some(rows) => rows,
            none => none.insert(RowReader::open(path, logits.len())?),
        };
        let compared = cost::compare(rows.next_row()?, logits, request.tokens[token]);
        costs.push(compared.with_context(|| format!("token {token} of the window"))?);
        Ok(())
    })?;
    Ok(costs)
}

fn greedy(session: &mut dyn Session, request: &ScoreRequest) -> Result<Vec<u32>> {
    let Greedy { n_prompt, n_gen } = request.greedy;
    if n_gen == 0 {
        return Ok(Vec::new());
    }
    session.rewind(0);
    if !request.prefix.is_empty() {
        session.prefill(&request.prefix)?;
    }
    let mut ids = vec![session.prefill(&request.tokens[..n_prompt])?];
    session.decode(n_gen - 1, &mut |id| ids.push(id))?;
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{FakeRun, FakeSession, FakeTime};
    use crate::quality::CallPath;

    fn request(logits: LogitsFile) -> ScoreRequest {
        ScoreRequest {
            prefix: vec![],
            tokens: vec![0, 1, 1, 0],
            first: 1,
            path: CallPath::Prefill,
            logits,
            greedy: Greedy { n_prompt: 2, n_gen: 2 },
        }
    }

    fn session(logits: &[f32]) -> FakeSession {
        FakeSession::new(FakeTime::default(), [FakeRun { logits: logits.to_vec(), ..FakeRun::default() }])
    }

    #[test]
    fn a_precision_is_compared_with_the_reference_token_by_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let reference = score(&mut session(&[0.0, 0.5]), &request(LogitsFile::Write(path.clone()))).unwrap();
        assert_eq!((reference.costs.len(), reference.greedy_ids), (0, vec![5, 6]));
        let same = score(&mut session(&[0.0, 0.5]), &request(LogitsFile::Compare(path.clone()))).unwrap();
        assert!(same.costs.len() == 3 && same.costs.iter().all(|cost| cost.kl == 0.0 && cost.agrees));
        let other = score(&mut session(&[0.75, 0.5]), &request(LogitsFile::Compare(path.clone()))).unwrap();
        assert!(other.costs.iter().all(|cost| cost.kl > 0.0 && !cost.agrees && cost.logit_error == 0.75));
        for (logits, file) in [(f32::NAN, LogitsFile::Write(path.clone())), (f32::INFINITY, LogitsFile::Compare(path))]
        {
            assert!(score(&mut session(&[logits, 0.5]), &request(file)).is_err());
        }
    }
}
