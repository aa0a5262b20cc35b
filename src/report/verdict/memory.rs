//! What memory each precision saves, and which fit a card.

use super::{list, names};
use crate::record::{Record, Status};
use crate::report::case::GIB;

/// Which precisions stay within `card_bytes`: by their peak, or without one by what they hold exactly. One that did not fit into less is
/// known by what it wanted.
pub fn fit(records: &[&Record], card_bytes: u64) -> String {
    let exact = |record: &Record| {
        let memory = &record.memory;
        Some(memory.weights_bytes? + memory.kv_cache_bytes? + memory.scratch_bytes.unwrap_or(0))
    };
    let needed = |record: &Record| match record.status {
        Status::Ok | Status::Invalid => record.memory.peak_bytes.or_else(|| exact(record)),
        _ => record.memory.needed_bytes.or(record.memory.wanted_bytes),
    };
    let with = |wanted: Option<bool>| {
        let held = |record: &&&Record| needed(record).map(|bytes| bytes <= card_bytes) == wanted;
        records.iter().filter(held).copied().collect::<Vec<_>>()
    };
    // The verb for one and for many, and the same behind a first part that has said what it is about.
    let groups = [
        (with(Some(true)), ["fits", "fit"], ["fits", "fit"]),
        (with(Some(false)), ["does not fit", "do not fit"], ["does not", "do not"]),
        (with(None), ["is not known to fit", "are not known to fit"], ["is not known to", "are not known to"]),
    ];
    let known = groups.into_iter().filter(|(records, ..)| !records.is_empty());
    let part = |(at, (records, whole, short)): (usize, (Vec<&Record>, [&str; 2], [&str; 2]))| {
        let is_many = usize::from(records.len() > 1);
        match at {
            0 => format!("{} {} in {:.2} GiB", names(&records), whole[is_many], card_bytes as f64 / GIB),
            _ => format!("{} {}", names(&records), short[is_many]),
        }
    };
    let parts: Vec<String> = known.enumerate().map(part).collect();
    format!("; {}", parts.join(", "))
}

/// What the precision with the lowest peak saves, where speed names none.
pub fn least_memory(records: &[&Record]) -> String {
    let fp16 = records.iter().find(|record| record.is_fp16());
    let known = records.iter().copied().filter(|record| !record.is_fp16() && record.memory.peak_bytes.is_some());
    match (fp16, known.min_by_key(|record| record.memory.peak_bytes)) {
        (Some(fp16), Some(least)) => saving(fp16, &[least]),
        _ => String::new(),
    }
}

/// Peak memory of each record below fp16's; differences that two decimals of a GiB do not show are left out.
pub fn saving(fp16: &Record, records: &[&Record]) -> String {
    let one = |record: &&Record| {
        let (peak, of) = (record.memory.peak_bytes? as f64 / GIB, fp16.memory.peak_bytes? as f64 / GIB);
        match of - peak {
            saved if saved >= 0.005 => {
                Some(format!("{} saves {saved:.2} of {of:.2} GiB peak memory", record.precision))
            }
            saved if saved <= -0.005 => {
                Some(format!("{} takes {:.2} GiB more peak memory than fp16's {of:.2}", record.precision, -saved))
            }
            _ => None,
        }
    };
    list(records.iter().filter_map(one))
}
