//! Whether engines compute the same: their logits for the same prompt and the same weights, against quantbench's own at 16 bit.

use std::path::Path;

use anyhow::{Context, Result};

use super::case::{Case, Variant};
use super::exports::Exports;
use super::warnings::Warning;
use crate::engine::Engine;
use crate::engines::Width;
use crate::quality::cost;
use crate::quality::rows::RowReader;
use crate::record::{Agreement, Record, Status};

/// Values of a layer that an engine rounds to 16 bit one after the other: norm, q/k/v, scores, their sum, output, norm, gate, up, product,
/// down.
const ROUNDINGS_PER_LAYER: f64 = 10.0;

/// Unit roundoff of fp16.
const ROUNDOFF: f64 = 1.0 / 2048.0;

/// Fills the agreement of every 16-bit record of another engine, where quantbench ran at 16 bit as well.
pub fn add(records: &mut [Record], case: &Case, exports: &Exports, layers: usize) {
    let variants = case.variants();
    let is_own =
        |variant: &Variant| variant.own_engine() == Some(Engine::Quantbench) && variant.width() == Some(Width::Bits16);
    let Some(own) = variants.iter().position(is_own).filter(|own| records[*own].status == Status::Ok) else { return };
    let own_ids = records[own].output.token_ids.clone();
    for (record, variant) in records.iter_mut().zip(&variants) {
        let is_compared = variant.own_engine().is_none() && variant.width() == Some(Width::Bits16);
        let (ids, is_ok) = (record.output.token_ids.clone(), record.status == Status::Ok);
        let Some(engine) = record.other_engine.as_mut().filter(|_| is_compared && is_ok) else { continue };
        let file = |variant: &Variant| exports.logits_file(&variant.label());
        let compared =
            file(&variants[own]).and_then(|ours| compare((&ours, &own_ids), (&file(variant)?, &ids), layers));
        // An engine that gives no logits is measured all the same.
        engine.agreement = compared.ok();
        let warning = engine.agreement.as_ref().and_then(disagreement);
        record.warnings.extend(warning.map(|warning| warning.to_string()));
    }
}

/// Compares two runs up to the step where they part. Ids are those of the measured repeats; logits those of a further run.
fn compare((ours, our_ids): (&Path, &[u32]), (theirs, their_ids): (&Path, &[u32]), layers: usize) -> Result<Agreement> {
    let (mut ours, mut theirs) = (RowReader::open(ours)?, RowReader::open(theirs)?);
    let parts_at = our_ids.iter().zip(their_ids).position(|(a, b)| a != b);
    let rows = ours.rows_left().min(theirs.rows_left());
    let steps = parts_at.map_or(rows, |at| (at + 1).min(rows));
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
        let same = compare((&ours, &[1, 0, 0]), (&ours, &[1, 0, 0]), 1).unwrap();
        assert_eq!((same.steps, same.parts_at, same.margin, same.kl_mean), (3, None, None, 0.0));
        assert_eq!((same.top1_agreement, same.logit_error_max), (1.0, 0.0));
        let parted = compare((&ours, &[1, 0, 0]), (&theirs, &[1, 1, 2]), 1).unwrap();
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
