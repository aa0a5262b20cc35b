//! What each precision does with as many sequences as fit: where memory decides, a narrow format serves more of them.

use super::case;
use crate::record::{Record, Status};

/// `as many sequences as fit: nf4 96 at 612 tokens/s, 1.42x fp16's 40 at 430`; `None` where no batch was chosen so.
pub fn claim(records: &[Record]) -> Option<String> {
    let served = |record: &'_ Record| {
        let sequences = record.memory.largest_batch.filter(|_| record.status == Status::Ok)?;
        let tps = record.metrics.get("decode_tps")?.median.filter(|tps| tps.is_finite() && *tps > 0.0)?;
        Some((case::name(record), sequences, tps, record.is_fp16()))
    };
    let mut all: Vec<_> = records.iter().filter_map(served).collect();
    let fp16 = all.iter().find(|(.., is_fp16)| *is_fp16).cloned();
    all.sort_by(|a, b| b.2.total_cmp(&a.2));
    let one = |(name, sequences, tps, is_fp16): &(String, u64, f64, bool)| {
        let of_fp16 = fp16.as_ref().filter(|_| !is_fp16).map(|(.., of, _)| format!(", {:.2}x fp16", tps / of));
        format!("{name} {sequences} at {tps:.1} tokens/s{}", of_fp16.unwrap_or_default())
    };
    let said: Vec<String> = all.iter().map(one).collect();
    (!said.is_empty()).then(|| format!("as many sequences as fit: {}", said.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Document;

    #[test]
    fn what_serves_most_comes_first() {
        let text = include_str!("../../tests/golden/records/three_precisions.json");
        let mut records = serde_json::from_str::<Document>(text).expect("an example").records;
        assert_eq!(claim(&records), None);
        for (record, (sequences, tps)) in records.iter_mut().zip([(40, 400.0), (60, 300.0), (96, 600.0)]) {
            record.memory.largest_batch = Some(sequences);
            record.metrics.get_mut("decode_tps").expect("a speed").median = Some(tps);
        }
        let names: Vec<&str> = records.iter().map(|record| record.precision.as_str()).collect();
        assert_eq!(names, ["fp16", "int8", "nf4"]);
        let expected = "as many sequences as fit: nf4 96 at 600.0 tokens/s, 1.50x fp16; fp16 40 at 400.0 tokens/s; \
                        int8 60 at 300.0 tokens/s, 0.75x fp16";
        assert_eq!(claim(&records).as_deref(), Some(expected));
    }
}
