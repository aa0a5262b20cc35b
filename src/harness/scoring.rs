//! The logits of one window against the reference's, row by row.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::quality::cost::{self, TokenCost};
use crate::quality::rows::RowReader;

/// The cost of each scored token of a window, `tokens[first..]`. Fails where a logit is not finite and where the files are of
/// different shapes.
pub fn compare(reference: &Path, measured: &Path, tokens: &[u32], first: usize) -> Result<Vec<TokenCost>> {
    let (mut reference, mut measured) = (RowReader::open(reference)?, RowReader::open(measured)?);
    let scored = tokens.get(first..).unwrap_or_default();
    for (whose, rows) in [("the reference", reference.rows_left()), ("the engine", measured.rows_left())] {
        ensure!(rows == scored.len(), "{whose} gave {rows} rows of logits for {} scored tokens", scored.len());
    }
    let cost = |(at, next): (usize, &u32)| {
        let compared = cost::compare(reference.next_row()?, measured.next_row()?, *next);
        compared.with_context(|| format!("token {} of the window", first + at))
    };
    scored.iter().enumerate().map(cost).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::engine::fake::{FakeRun, FakeSession, FakeTime};
    use crate::harness::served::ServedSession;
    use crate::protocol::Score;

    /// The file that a session with these logits writes for four tokens, of which the last three are scored.
    fn scored(folder: &Path, name: &str, logits: &[f32]) -> Result<PathBuf> {
        let time = FakeTime::default();
        let session = FakeSession::new(time.clone(), [FakeRun { logits: logits.to_vec(), ..FakeRun::default() }]);
        let file = folder.join(name);
        let tokens = vec![0, 1, 1, 0];
        let score = Score {
            encode: Default::default(),
            prefix: Vec::new(),
            tokens,
            first: 1,
            by_token: false,
            file: file.clone(),
        };
        ServedSession::new(Box::new(session), time, Vec::new(), 1).score(&score).map(|_| file)
    }

    #[test]
    fn a_precision_is_compared_with_the_reference_token_by_token() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, logits: &[f32]| scored(folder.path(), name, logits).unwrap();
        let reference = file("reference", &[0.0, 0.5]);
        let compared = |measured: &Path| compare(&reference, measured, &[0, 1, 1, 0], 1);
        let same = compared(&file("same", &[0.0, 0.5])).unwrap();
        assert!(same.len() == 3 && same.iter().all(|cost| cost.kl == 0.0 && cost.agrees));
        let other = compared(&file("other", &[0.75, 0.5])).unwrap();
        assert!(other.iter().all(|cost| cost.kl > 0.0 && !cost.agrees && cost.logit_error == 0.75));
        for logits in [[f32::NAN, 0.5], [f32::INFINITY, 0.5]] {
            let refused = format!("{:#}", compared(&file("bad", &logits)).unwrap_err());
            assert!(refused.starts_with("token 1 of the window: the measured logit of token id 0"), "{refused}");
        }
        let refused = compare(&reference, &reference, &[0, 1, 1], 1).unwrap_err().to_string();
        assert_eq!(refused, "the reference gave 3 rows of logits for 2 scored tokens");
    }
}
