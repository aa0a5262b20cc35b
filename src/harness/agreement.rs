//! Whether engines compute the same: their logits for the same prompt and the same weights, against quantbench's own.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::case::Case;
use super::compared::ComparedIds;
use super::exports::Exports;
use super::schedule::VariantOutcome;
use super::warnings::Warning;
use crate::engines::Width;
use crate::quality::cost;
use crate::quality::rows::RowReader;
use crate::record::{Agreement, Record, Status};

/// Values of a layer that an engine rounds to 16 bit one after the other: norm, q/k/v, scores, their sum, output, norm, gate, up, product,
/// down.
const ROUNDINGS_PER_LAYER: f64 = 10.0;

/// Unit roundoff of fp16.
const ROUNDOFF: f64 = 1.0 / 2048.0;

/// Fills the agreement of every record that has logits and a record of quantbench's to be compared with. An engine that gives no logits is
/// measured all the same. Of a batch nothing is compared.
pub fn add(records: &mut [Record], case: &Case, outcomes: &[VariantOutcome], (exports, layers): (&Exports, usize)) {
    if case.sequences > 1 {
        return;
    }
    let variants = case.variants();
    let behind = |at: usize| outcomes[at].finished.as_ref()?.compared_ids.filter(|_| records[at].status == Status::Ok);
    let compared = |at: usize| -> Option<Agreement> {
        let reference = case.compared_with(at)?;
        let (behind, _) = (behind(at)?, behind(reference)?);
        let run = |at: usize| -> Result<Run> {
            Ok(Run { logits: exports.logits_file(&variants[at].label())?, ids: &records[at].output.token_ids })
        };
        let agreement = compare(&run(reference).ok()?, &run(at).ok()?, behind, layers).ok()?;
        Some(Agreement { reference: variants[reference].precision(), ..agreement })
    };
    let all: Vec<Option<Agreement>> = (0..variants.len()).map(compared).collect();
    for ((record, variant), agreement) in records.iter_mut().zip(&variants).zip(all) {
        let is_wide = !variant.is_quantbench() && variant.width() == Some(Width::Bits16);
        let warning = agreement.as_ref().filter(|_| is_wide).and_then(disagreement);
        record.warnings.extend(warning.map(|warning| warning.to_string()));
        record.agreement = agreement;
    }
}

/// The ids of a record's measured repeats, and the file of the logits of a further pass.
struct Run<'a> {
    logits: PathBuf,
    ids: &'a [u32],
}

/// Compares the steps with the same ids before them: all, or those up to where two runs part.
fn compare(ours: &Run, theirs: &Run, behind: ComparedIds, layers: usize) -> Result<Agreement> {
    let (our_ids, their_ids) = (ours.ids, theirs.ids);
    let (mut ours, mut theirs) = (RowReader::open(&ours.logits)?, RowReader::open(&theirs.logits)?);
    let parts_at = our_ids.iter().zip(their_ids).position(|(a, b)| a != b);
    let rows = ours.rows_left().min(theirs.rows_left());
    let steps = match (behind, parts_at) {
        (ComparedIds::Own, Some(at)) => (at + 1).min(rows),
        (ComparedIds::Own, None) | (ComparedIds::Reference, _) => rows,
    };
    let mut agreement =
        Agreement { steps: steps as u64, parts_at: parts_at.map(|at| at as u64), ..Agreement::default() };
    let (mut agreed, mut largest) = (0u32, 0.0f64);
    for step in 0..steps {
        let row = ours.next_row()?;
        let next = our_ids.get(step).copied().context("an id of the step")?;
        let cost = cost::compare(row, theirs.next_row()?, next)?;
        largest = row.iter().fold(largest, |largest, logit| largest.max(f64::from(logit.abs())));
        agreement.kl_mean += cost.kl / steps as f64;
        agreement.logit_error_max = agreement.logit_error_max.max(cost.logit_error);
        agreed += u32::from(cost.agrees);
        if step == 0 {
            (agreement.kl_first, agreement.logit_error_first) = (cost.kl, cost.logit_error);
        }
        if parts_at == Some(step) {
            agreement.margin = Some(margin(row));
        }
    }
    agreement.top1_agreement = f64::from(agreed) / steps.max(1) as f64;
    agreement.margin_bound = margin_bound(layers, largest);
    Ok(agreement)
}

/// First logits that differ by more than roundings explain. [`Agreement::margin_bound`] has for each engine a step of a random walk at its
/// largest; roundings are uniform, so that a deviation is 1/√3 of it, and the largest of 10⁵ to 10⁶ differences between two engines is 5 · √2
/// deviations: 2.04 times that bound.
fn disagreement(agreement: &Agreement) -> Option<Warning> {
    let explained = agreement.margin_bound * 5.0 * (2.0f64 / 3.0).sqrt() / 2.0;
    let (logit_error, kl) = (agreement.logit_error_first, agreement.kl_first);
    (logit_error > explained || logit_error.is_nan()).then_some(Warning::EnginesDisagree { logit_error, explained, kl })
}

/// The largest logit over the second.
fn margin(row: &[f32]) -> f64 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in row {
        if logit > first {
            (first, second) = (logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    f64::from(first) - f64::from(second)
}

/// Independent roundings add up as a random walk: a logit of size `largest` is off by `√n · u · largest` after n of them, and two logits
/// by as much each, in the worst case towards each other.
fn margin_bound(layers: usize, largest: f64) -> f64 {
    2.0 * (ROUNDINGS_PER_LAYER * layers as f64).sqrt() * ROUNDOFF * largest
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::quality::rows::RowWriter;

    fn file(folder: &Path, name: &str, rows: &[[f32; 3]]) -> std::path::PathBuf {
        let path = folder.join(name);
        let mut writer = RowWriter::create(&path, rows.len(), 3).unwrap();
        rows.iter().for_each(|row| writer.write(row).unwrap());
        writer.finish().unwrap();
        path
    }

    #[test]
    fn runs_are_compared_up_to_where_they_part() {
        let folder = tempfile::tempdir().unwrap();
        let ours = file(folder.path(), "ours", &[[1.0, 3.0, 0.0], [2.0, 1.5, 0.0], [9.0, 0.0, 0.0]]);
        let theirs = file(folder.path(), "theirs", &[[1.0, 3.0, 0.0], [2.0, 2.25, 0.0], [0.0, 0.0, 9.0]]);
        let ours = Run { logits: ours, ids: &[1, 0, 0] };
        let theirs = Run { logits: theirs, ids: &[1, 1, 2] };
        let same = compare(&ours, &ours, ComparedIds::Own, 1).unwrap();
        assert_eq!((same.steps, same.parts_at, same.margin, same.kl_mean), (3, None, None, 0.0));
        assert_eq!((same.top1_agreement, same.logit_error_max), (1.0, 0.0));
        // Behind the reference's ids all steps count.
        let forced = compare(&ours, &theirs, ComparedIds::Reference, 1).unwrap();
        assert_eq!((forced.steps, forced.parts_at, forced.margin), (3, Some(1), Some(0.5)));
        assert_eq!((forced.top1_agreement, forced.logit_error_max), (1.0 / 3.0, 9.0));
        let parted = compare(&ours, &theirs, ComparedIds::Own, 1).unwrap();
        assert_eq!((parted.steps, parted.parts_at, parted.margin), (2, Some(1), Some(0.5)));
        assert_eq!((parted.kl_first, parted.logit_error_first, parted.logit_error_max), (0.0, 0.0, 0.75));
        assert_eq!(parted.top1_agreement, 0.5);
        // Ten roundings of a logit of 3: 2 · √10 · 2⁻¹¹ · 3.
        assert!((parted.margin_bound - 0.009_265).abs() < 1e-6, "{}", parted.margin_bound);
        assert_eq!(disagreement(&parted), None, "its first logits are the same");
    }

    #[test]
    fn another_model_is_told_from_rounding() {
        let agreement = |logit_error_first| Agreement { margin_bound: 0.1, logit_error_first, ..Agreement::default() };
        assert_eq!(disagreement(&agreement(0.2)), None);
        let warning = disagreement(&agreement(0.21)).expect("a warning");
        assert_eq!(warning.name(), "engines_disagree");
        assert!(warning.to_string().contains("by up to 0.21, where rounding explains 0.20"), "{warning}");
        assert!(disagreement(&agreement(f64::NAN)).is_some());
    }
}
