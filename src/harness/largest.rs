//! The largest batch that fits in memory, for each precision of a case: known before anything is loaded.

use anyhow::Result;

use super::case::{Case, Variant};
use super::checks::{self, Chosen};
use super::dry_run::bounded;
use super::open_model;
use super::prompt::{self, Words};
use super::room;
use crate::engine::Device;
use crate::engine::needs::Lengths;
use crate::error::BadInput;
use crate::events::Listener;
use crate::os::memory::ProcessMemory;
use crate::weights::{self, Surveyed};

/// The cases of which some ask for the largest batch, each of those as a case of every precision at its own. `card_bytes` bounds the memory
/// beside what is free. Downloads no weights.
pub fn with_largest_batches(cases: Vec<Case>, card_bytes: Option<u64>, events: &dyn Listener) -> Result<Vec<Case>> {
    let mut all = Vec::with_capacity(cases.len());
    for case in cases {
        match case.largest_batch {
            true => all.extend(at_largest_batch(&case, card_bytes, events)?),
            false => all.push(case),
        }
    }
    Ok(all)
}

fn at_largest_batch(case: &Case, card_bytes: Option<u64>, events: &dyn Listener) -> Result<Vec<Case>> {
    let Chosen { device, .. } = checks::check(case)?;
    let refuse = |why: &str, hint: &str| Err(BadInput::new(format!("`--batch-size max`: {why}")).hint(hint).into());
    if device != Device::Cpu {
        return refuse("a GPU runs 1 sequence", "name `--device cpu`, or drop `--batch-size`");
    }
    if case.has_others() {
        return refuse("what other engines hold is not known", "give numbers, such as `--batch-size 1,4,16`");
    }
    let Surveyed { checkpoint, files } = weights::survey(&case.model, events)?;
    let mut model = open_model::build(&checkpoint, &case.model, events)?;
    open_model::select(&mut model, &checkpoint, &case.selection())?;
    let case = &checks::as_saved(case, &checkpoint)?;
    let tokenizer_comes = files.iter().any(|file| file.name == "tokenizer.json" && !file.is_cached);
    let bound = bounded(case).filter(|_| tokenizer_comes);
    let workload = prompt::workload(bound.as_ref().unwrap_or(case), Words::of(&checkpoint), &model)?;
    let bounds = [ProcessMemory::default().room_bytes(), case.protocol.memory_limit_bytes, card_bytes];
    let Some(room_bytes) = bounds.into_iter().flatten().min() else {
        return refuse("the free memory is unknown", "give numbers, such as `--batch-size 1,4,16`");
    };
    let lengths = room::lengths(&workload);
    let of_variant = |variant: &Variant| {
        let needs = |sequences: usize| room::needs_of(case, variant, &model, &Lengths { sequences, ..lengths }, device);
        let sequences = largest(room_bytes, |sequences| needs(sequences).bytes());
        Case { precisions: vec![variant.format()], sequences, ..case.clone() }
    };
    // One sequence that does not fit becomes a row that says so.
    Ok(case.variants().iter().map(of_variant).collect())
}

/// The largest number of sequences whose needs are at most `room_bytes`, at least 1. Needs grow with the number.
pub fn largest(room_bytes: u64, needs_bytes: impl Fn(usize) -> u64) -> usize {
    let fits = |sequences: usize| needs_bytes(sequences) <= room_bytes;
    let (mut least, mut beyond) = (1, 2);
    while fits(beyond) && beyond < usize::MAX / 4 {
        (least, beyond) = (beyond, 2 * beyond);
    }
    while beyond - least > 1 {
        let middle = least + (beyond - least) / 2;
        if fits(middle) { least = middle } else { beyond = middle }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_is_the_last_that_fits() {
        let needs = |sequences: usize| 1000 + 10 * sequences as u64;
        for (room, expected) in [(0, 1), (1010, 1), (1019, 1), (1020, 2), (1999, 99), (2000, 100), (2009, 100)] {
            assert_eq!(largest(room, needs), expected, "{room}");
        }
    }
}
