//! From which batch on a precision no longer decodes faster than fp16.

use crate::record::{BreakEven, BreakEvenFinding, Record};
use crate::report::case;

/// A sentence for each precision of the case with the largest batch; the others say nothing.
pub fn claims(records: &[&Record]) -> Vec<String> {
    let is_largest = |record: &&&Record| {
        let batches = record.break_even.as_ref().map(|found| &found.batches);
        batches.and_then(|batches| batches.last()).is_some_and(|last| record.workload.batch_size >= *last)
    };
    records.iter().filter(is_largest).filter_map(|record| Some(sentence(record, record.break_even.as_ref()?))).collect()
}

/// `nf4 stops paying at about 8.0 sequences [6.0, 12.0]`.
fn sentence(record: &Record, found: &BreakEven) -> String {
    let base = if record.engine.name == case::OWN { "fp16" } else { "its 16-bit format" };
    let name = case::precision(record);
    let name = if record.engine.name == case::OWN { name } else { format!("in {} {name}", record.engine.name) };
    let (least, most) = (found.batches.first().copied().unwrap_or(1), found.batches.last().copied().unwrap_or(1));
    match (found.finding, found.batch) {
        (BreakEvenFinding::Within, Some(batch)) => {
            format!("{name} stops paying at about {batch:.1} sequences {}", bounds(found))
        }
        (BreakEvenFinding::Within, None) => {
            let low = found.low.unwrap_or(most as f64);
            format!(
                "{name} may stop paying from {low:.1} sequences on, and its median stays above {base}'s up to {most}"
            )
        }
        (BreakEvenFinding::NotUpToLargest, _) => format!("{name} decodes faster than {base} up to {most} sequences"),
        (BreakEvenFinding::BelowAlready, _) if least == 1 => {
            format!("{name} is slower than {base} with 1 sequence already")
        }
        (BreakEvenFinding::BelowAlready, _) => format!("{name} is slower than {base} with {least} sequences already"),
        (BreakEvenFinding::CannotTell, _) => {
            format!("can't tell at how many sequences {name} stops paying, up to {most}")
        }
    }
}

/// `[6.0, 12.0]`, `[6.0, above 16]`.
pub fn bounds(found: &BreakEven) -> String {
    let largest = found.batches.last().copied().unwrap_or(1);
    let low = found.low.map_or_else(|| "-".to_owned(), |low| format!("{low:.1}"));
    let high = found.high.map_or_else(|| format!("above {largest}"), |high| format!("{high:.1}"));
    format!("[{low}, {high}]")
}

/// For a cell of a table.
pub fn cell(found: &BreakEven) -> String {
    let (least, most) = (found.batches.first().copied().unwrap_or(1), found.batches.last().copied().unwrap_or(1));
    match (found.finding, found.batch) {
        (BreakEvenFinding::Within, Some(batch)) => format!("{batch:.1} {}", bounds(found)),
        (BreakEvenFinding::Within, None) => format!("above {most} {}", bounds(found)),
        (BreakEvenFinding::NotUpToLargest, _) => format!("none up to {most}"),
        (BreakEvenFinding::BelowAlready, _) => format!("below 1 already at {least}"),
        (BreakEvenFinding::CannotTell, _) => "can't tell".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::EngineInfo;

    #[test]
    fn each_finding_has_its_words() {
        let said = |engine: &str, finding, [low, batch, high]: [Option<f64>; 3]| {
            let info = EngineInfo { name: engine.to_owned(), version: String::new(), commit: String::new() };
            let break_even = Some(BreakEven { finding, batches: vec![1, 4, 16], low, batch, high });
            let mut record = Record { precision: "nf4".to_owned(), break_even, ..Record::unknown(info) };
            assert_eq!(claims(&[&record]), [""; 0], "the largest batch alone says it");
            record.workload.batch_size = 16;
            (claims(&[&record]).concat(), cell(record.break_even.as_ref().unwrap()))
        };
        let of = |text: &str, cell: &str| (text.to_owned(), cell.to_owned());
        use BreakEvenFinding::{BelowAlready, CannotTell, NotUpToLargest, Within};
        let none = [None; 3];
        for (found, expected) in [
            (
                said("quantbench", Within, [Some(6.0), Some(8.0), Some(12.04)]),
                of("nf4 stops paying at about 8.0 sequences [6.0, 12.0]", "8.0 [6.0, 12.0]"),
            ),
            (
                said("transformers", Within, [Some(6.0), Some(8.0), None]),
                of("in transformers nf4 stops paying at about 8.0 sequences [6.0, above 16]", "8.0 [6.0, above 16]"),
            ),
            (
                said("quantbench", Within, [Some(6.0), None, None]),
                of(
                    "nf4 may stop paying from 6.0 sequences on, and its median stays above fp16's up to 16",
                    "above 16 [6.0, above 16]",
                ),
            ),
            (
                said("quantbench", NotUpToLargest, none),
                of("nf4 decodes faster than fp16 up to 16 sequences", "none up to 16"),
            ),
            (
                said("transformers", BelowAlready, none),
                of(
                    "in transformers nf4 is slower than its 16-bit format with 1 sequence already",
                    "below 1 already at 1",
                ),
            ),
            (
                said("quantbench", CannotTell, none),
                of("can't tell at how many sequences nf4 stops paying, up to 16", "can't tell"),
            ),
        ] {
            assert_eq!(found, expected);
        }
    }
}
