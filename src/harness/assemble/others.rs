//! What records say of engines that are not our own.

use super::limit;
use crate::engines::ModelForm;
use crate::harness::case::{Case, Variant};
use crate::harness::schedule::{RunOrder, VariantOutcome};
use crate::harness::warnings::Warning;
use crate::protocol::{HeldModel, HeldPart};
use crate::record::{self, OtherEngine, Record, Status, WidthRatio, metrics};
use crate::stats;

/// Clock ticks that a stopped process may seem to use: the one that ends as it is stopped, and the one in which it goes on.
const WAITING_TICKS: u64 = 2;

/// Reason why a result is invalid whose logits of a further run are no numbers.
pub fn not_finite(outcome: &VariantOutcome) -> Option<String> {
    let finite = outcome.finished.as_ref().and_then(|finished| finished.finite_logits);
    (finite == Some(false)).then(|| "the logits are not finite".to_owned())
}

/// Adds what is known of another engine, and names engines that used the processor out of their turn.
pub fn add(
    record: &mut Record,
    (case, at): (&Case, usize),
    (records, outcomes): (&[Record], &[VariantOutcome]),
    order: RunOrder,
    warnings: &mut Vec<Warning>,
) {
    let variants = case.variants();
    for (other, _) in variants.iter().enumerate().filter(|(other, _)| *other != at) {
        let ticks = outcomes[other].finished.as_ref().map_or(0, |finished| finished.waited_ticks);
        let turns = outcomes[other].samples.len() as u64;
        if ticks > WAITING_TICKS * turns.max(1) {
            warnings.push(Warning::WaitingEngine { label: variants[other].label(), ticks });
        }
    }
    let Variant::Other { width, .. } = &variants[at] else { return };
    let held = outcomes[at].loaded.as_ref().map(|loaded| loaded.held.clone()).unwrap_or_default();
    let own = case.own_beside(at).map(|own| &records[own]);
    record.other_engine = Some(OtherEngine {
        width: width.map(|width| width.name().to_owned()),
        head: held.head.as_ref().map(part),
        embeddings: held.embeddings.as_ref().map(part),
        experts: held.experts.as_ref().map(part),
        kv_cache: held.kv_cache.as_ref().map(part),
        held_otherwise: own.map(|own| held_otherwise(&held, own, is_file(case))).unwrap_or_default(),
        wide_modules: held.wide_modules,
        host_ms_per_token: host_ms(&outcomes[at]),
        ratio_at_width: own.and_then(|own| ratio(record, own, order)),
    });
}

fn part(part: &HeldPart) -> record::HeldFormat {
    record::HeldFormat { format: part.format.clone(), bytes: part.bytes }
}

/// A file that is held as stored has one format for each part, whoever runs it.
fn is_file(case: &Case) -> bool {
    case.saved.as_ref().is_some_and(|saved| saved.form == ModelForm::Gguf && saved.precision.is_some())
}

/// Parts whose format differs from ours. Ours keep head and embeddings in fp16 at every precision, and quantize experts.
fn held_otherwise(held: &HeldModel, own: &Record, is_file: bool) -> Vec<String> {
    let differs = |part: &&(&str, &Option<HeldPart>, &str)| {
        part.1.as_ref().is_some_and(|theirs| is_other(&theirs.format, part.2))
    };
    let of_weights = |part| if is_file { &None } else { part };
    let parts = [
        ("head", of_weights(&held.head), record::BASELINE),
        ("embeddings", of_weights(&held.embeddings), record::BASELINE),
        ("experts", of_weights(&held.experts), own.precision.as_str()),
        ("kv cache", &held.kv_cache, own.dtypes.kv_cache.as_str()),
    ];
    let line = |(name, theirs, ours): &(&str, &Option<HeldPart>, &str)| {
        let theirs = theirs.as_ref().map_or("", |part| part.format.as_str());
        format!("{name} in {theirs}, quantbench's in {ours}")
    };
    parts.iter().filter(differs).map(line).collect()
}

/// `f16` and `fp16` are one format.
fn is_other(a: &str, b: &str) -> bool {
    a.replace("fp", "f") != b.replace("fp", "f")
}

fn host_ms(outcome: &VariantOutcome) -> Option<f64> {
    let all = outcome.samples.iter().flat_map(|sample| &sample.host_step_ns);
    stats::median(&all.map(|ns| *ns as f64 / 1e6).collect::<Vec<_>>())
}

fn ratio(record: &Record, own: &Record, order: RunOrder) -> Option<WidthRatio> {
    if record.status != Status::Ok || own.status != Status::Ok || record.workload.n_gen != own.workload.n_gen {
        return None;
    }
    let tps = |record: &Record| metrics::repeats(record, "decode_tps");
    let paired = order == RunOrder::Interleaved && tps(record).len() == tps(own).len();
    let estimate = if paired { stats::paired_ratio_launches } else { stats::unpaired_ratio_launches };
    let ratio = estimate(&tps(record), &tps(own), &record.samples.launches)?;
    Some(WidthRatio {
        precision: own.precision.clone(),
        median: ratio.median,
        ci95_low: ratio.interval.map(|interval| interval.low),
        ci95_high: ratio.interval.map(|interval| interval.high),
        paired,
        step_bytes: limit::step_bytes(record),
        own_step_bytes: limit::step_bytes(own),
    })
}

/// As another engine said; what it did not say is unknown.
pub fn dtypes(variant: &Variant, held: &HeldModel) -> record::Dtypes {
    let said = |word: &Option<String>| word.clone().unwrap_or_default();
    record::Dtypes {
        weights: variant.precision(),
        compute: said(&held.compute),
        kv_cache: held.kv_cache.as_ref().map(|part| part.format.clone()).unwrap_or_default(),
        logits: said(&held.logits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::EngineInfo;

    #[test]
    fn parts_in_another_format_than_ours_are_named() {
        let engine = EngineInfo { name: "quantbench".to_owned(), version: String::new(), commit: String::new() };
        let mut own = Record { precision: "nf4".to_owned(), ..Record::unknown(engine) };
        own.dtypes.kv_cache = "fp16".to_owned();
        let part = |format: &str| Some(HeldPart { format: format.to_owned(), bytes: 1 });
        let held = HeldModel {
            head: part("q6_k"),
            embeddings: part("f16"),
            experts: part("fp16"),
            kv_cache: part("f16"),
            ..HeldModel::default()
        };
        let said = held_otherwise(&held, &own, false);
        assert_eq!(said, ["head in q6_k, quantbench's in fp16", "experts in fp16, quantbench's in nf4"]);
        assert_eq!(held_otherwise(&held, &own, true), [""; 0], "one file");
        let cache = HeldModel { kv_cache: part("bf16"), ..held };
        assert_eq!(held_otherwise(&cache, &own, true), ["kv cache in bf16, quantbench's in fp16"]);
    }
}
