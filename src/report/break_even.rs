//! A row for each set of cases that differ in their batch alone, a column for each precision: where it stops being faster than fp16.

use super::Terminal;
use super::case::{self, Case, Run};
use super::grid::{self, Line};
use super::pivot::Telling;
use super::table::TextStyle;
use super::verdict::batches;
use crate::record::Record;

/// `None` where no case was measured with several batches.
pub fn table(cases: &[Case], terminal: &Terminal) -> Option<String> {
    if cases.is_empty() {
        return None;
    }
    let telling = Telling::of(&cases.iter().collect::<Vec<_>>()).without_batches();
    // Runs without an interval are in no line: where these were the largest, the one before says the same.
    let mut runs: Vec<(String, &Run)> = Vec::new();
    for run in cases.iter().flat_map(|case| &case.runs).filter(|run| is_largest(run)) {
        let name = telling.name(run);
        match runs.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = run,
            None => runs.push((name, run)),
        }
    }
    let mut names: Vec<String> = Vec::new();
    for record in runs.iter().flat_map(|(_, run)| run.records).filter(|record| record.break_even.is_some()) {
        let name = case::name(record);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return None;
    }
    let header = std::iter::once("stops paying at batch".to_owned()).chain(names.iter().cloned()).collect();
    let row = |(line, run): &(String, &Run)| {
        let found = |name: &String| run.records.iter().find(|record| case::name(record) == *name)?.break_even.as_ref();
        let cell = |name: &String| found(name).map_or_else(|| "-".to_owned(), batches::cell);
        Line::Cells(std::iter::once(line.clone()).chain(names.iter().map(cell)).collect())
    };
    let lines: Vec<Line> = std::iter::once(Line::Cells(header)).chain(runs.iter().map(row)).collect();
    let painted =
        |(index, text): (usize, String)| (if index == 0 { terminal.paint(TextStyle::Dim, &text) } else { text }) + "\n";
    let blocks = grid::fold(&lines, terminal.columns, 1).into_iter();
    let text = blocks.map(|block| block.into_iter().map(painted).collect::<String>()).collect::<Vec<_>>().join("\n");
    let note = "where the ratio to fp16 comes down to 1, on straight lines between batches; [low, high] are the ends of its 95 % interval";
    Some(format!("{text}\n{}\n", grid::wrap(note, terminal.columns, 2)))
}

/// Whether a run has the largest batch of its line: there the break-even is said.
fn is_largest(run: &Run) -> bool {
    let largest = |record: &Record| record.break_even.as_ref().and_then(|found| found.batches.last().copied());
    let largest = run.records.iter().filter_map(largest).max();
    largest.is_some_and(|largest| run.records[0].workload.batch_size >= largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Document, Ratio, break_even};
    use crate::report::{self, verdict};

    /// Three precisions with 1, 4 and 16 sequences, of which nf4 and int8 have these ratios.
    fn document(nf4: [(f64, f64, f64); 3], int8: [(f64, f64, f64); 3]) -> Document {
        changed(nf4, int8, |_| {})
    }

    fn changed(nf4: [(f64, f64, f64); 3], int8: [(f64, f64, f64); 3], change: fn(&mut Record)) -> Document {
        let text = include_str!("../../tests/golden/records/three_precisions.json");
        let example = serde_json::from_str::<Document>(text).expect("an example").records;
        let mut records = Vec::new();
        for (at, batch_size) in [1, 4, 16].into_iter().enumerate() {
            let mut case = example.clone();
            for record in &mut case {
                record.workload.batch_size = batch_size;
                let (low, median, high) = if record.precision == "nf4" { nf4[at] } else { int8[at] };
                if let Some(ratio) = &mut record.ratio_to_fp16 {
                    *ratio = Ratio { median, ci95_low: Some(low), ci95_high: Some(high), ..*ratio };
                }
                change(record);
            }
            records.extend(case);
        }
        break_even::fill(&mut records);
        Document { schema_version: 1, records }
    }

    #[test]
    fn batches_end_with_where_each_precision_stops_paying() {
        let never = [(1.4, 1.5, 1.6), (1.3, 1.4, 1.5), (1.1, 1.2, 1.3)];
        let within = [(1.9, 2.0, 2.1), (1.4, 1.5, 1.6), (0.8, 0.9, 0.95)];
        let document = document(within, never);
        let cases = case::cases(&document);
        assert_eq!(cases.len(), 3);
        let text = table(&cases, &Terminal::default()).expect("several batches");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("stops paying at batch"), "{text}");
        // 4 + 12 · 0.4 / 0.6, 4 + 12 · 0.5 / 0.6 and 4 + 12 · 0.6 / 0.65.
        assert!(lines[1].contains("14.0 [12.0, 15.1]") && lines[1].contains("none up to 16"), "{text}");
        assert!(!lines[1].contains("batch"), "{text}");
        let verdicts = |at: usize| verdict::verdicts(&cases[at], None)[0].to_string();
        assert!(!verdicts(0).contains("paying"), "{}", verdicts(0));
        let said = verdicts(2);
        assert!(said.contains("nf4 stops paying at about 14.0 sequences [12.0, 15.1]"), "{said}");
        assert!(said.contains("int8 decodes faster than fp16 up to 16 sequences"), "{said}");
        assert!(table(&cases[..1], &Terminal::default()).is_none());
        let pictures: Vec<String> = report::pictures(&document).into_iter().map(|(name, _)| name).collect();
        let of_batches: Vec<&String> =
            pictures.iter().filter(|name| name.contains("by-batch") || name.contains("operating-curve")).collect();
        assert!(of_batches.len() == 2 && of_batches.iter().all(|name| name.starts_with("03-")), "{pictures:?}");
    }

    /// The largest batch had too few repeats.
    #[test]
    fn a_run_without_an_interval_gives_no_line_of_its_own() {
        let ratios = [(1.9, 2.0, 2.1), (1.4, 1.5, 1.6), (1.1, 1.2, 1.3)];
        let document = changed(ratios, ratios, |record| {
            let is_largest = record.workload.batch_size == 16;
            if let Some(ratio) = record.ratio_to_fp16.as_mut().filter(|_| is_largest) {
                (ratio.ci95_low, ratio.ci95_high) = (None, None);
            }
        });
        let text = table(&case::cases(&document), &Terminal::default()).expect("several batches");
        assert_eq!(text.matches("none up to 4").count(), 2, "{text}");
    }

    #[test]
    fn what_batches_leave_open_is_said() {
        let below = [(0.7, 0.8, 0.9); 3];
        let open = [(0.9, 1.1, 1.2); 3];
        let document = document(below, open);
        let text = table(&case::cases(&document), &Terminal::default()).expect("several batches");
        assert!(text.contains("below 1 already at 1") && text.contains("can't tell"), "{text}");
    }
}
