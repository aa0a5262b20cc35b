//! The part of a record that comes from readings during the repeats.

use std::collections::BTreeMap;

use crate::harness::schedule::VariantOutcome;
use crate::harness::watch::energy::{Counter, EnergyWindow, refusal};
use crate::harness::watch::{MachineReading, Watched};
use crate::record::{Energy, Range, Series};
use crate::stats;

/// Every quantity over all readings of all repeats; cores count alike.
pub fn ranges(outcome: &VariantOutcome) -> BTreeMap<String, Range> {
    let readings = outcome.watched.iter().flat_map(|watched| &watched.readings);
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for channel in readings.flat_map(MachineReading::channels) {
        values.entry(channel.name).or_default().push(channel.value);
    }
    let range = |values: &[f64]| Range {
        min: values.iter().copied().fold(f64::INFINITY, f64::min),
        median: stats::median(values).unwrap_or_default(),
        max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        n: values.len() as u64,
    };
    values.into_iter().map(|(name, values)| (name.to_owned(), range(&values))).collect()
}

/// All readings, one entry a repeat.
pub fn series(outcome: &VariantOutcome) -> Vec<Series> {
    outcome.watched.iter().map(repeat_series).collect()
}

fn repeat_series(watched: &Watched) -> Series {
    let n = watched.readings.len();
    let mut values: BTreeMap<String, Vec<Option<f64>>> = BTreeMap::new();
    for (at, reading) in watched.readings.iter().enumerate() {
        for channel in reading.channels() {
            let name = match channel.index {
                Some(index) => format!("{}.{index}", channel.name),
                None => channel.name.to_owned(),
            };
            values.entry(name).or_insert_with(|| vec![None; n])[at] = Some(channel.value);
        }
    }
    let begin_ns = watched.readings.first().map_or(0, |first| first.at_ns);
    let at_ms = watched.readings.iter().map(|reading| (reading.at_ns - begin_ns) as f64 / 1e6).collect();
    Series { at_ms, values }
}

/// Those of the untimed block, or those of the counted repeats where these are long enough; `None` where the counter did not answer in all
/// of them.
pub fn windows(outcome: &VariantOutcome) -> Option<Vec<EnergyWindow>> {
    if !outcome.energy.is_empty() {
        return Some(outcome.energy.clone());
    }
    outcome.samples.iter().zip(&outcome.watched).map(|(sample, watched)| watched.window(sample.n_tokens())).collect()
}

/// Source and windows of the energy; `None` without a counter, and where nothing was measured.
pub fn energy(counter: Option<&Counter>, outcome: &VariantOutcome) -> Option<Energy> {
    let counter = counter.filter(|_| !outcome.samples.is_empty())?;
    Some(Energy {
        source: counter.name.to_owned(),
        idle_watts: counter.idle_watts,
        window: if outcome.energy.is_empty() { "repeat" } else { "block" }.to_owned(),
        refused: refusal(counter, windows(outcome).as_deref()),
    })
}
