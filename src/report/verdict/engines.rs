//! What a narrower format buys in each engine that is no code of ours, and how it stands to quantbench at that width.

use super::speed;
use crate::record::{Record, Status, WidthRatio};
use crate::report::case::{self, status_word};

/// One sentence for each engine.
pub fn claims(records: &[&Record]) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for record in records {
        if !names.contains(&record.engine.name.as_str()) {
            names.push(&record.engine.name);
        }
    }
    let of = |name: &str| records.iter().copied().filter(|record| record.engine.name == name).collect::<Vec<_>>();
    names.into_iter().map(|name| claim(name, &of(name))).collect()
}

fn claim(name: &str, records: &[&Record]) -> String {
    let base = records.iter().find(|record| width(record) == Some("16bit"));
    let base = base.map_or_else(|| "its 16-bit format".to_owned(), |record| format!("its {}", case::precision(record)));
    let within: Vec<String> = records
        .iter()
        .filter_map(|record| {
            let precision = case::precision(record);
            match record.status {
                Status::Ok => record.ratio_to_fp16.map(|_| format!("{precision} {}", speed::speed_up(record))),
                status => Some(format!("{precision} gave no result ({})", status_word(status))),
            }
        })
        .collect();
    let beside: Vec<String> = records.iter().filter_map(|record| at_width(record)).collect();
    let has_ratio = records.iter().any(|record| record.status == Status::Ok && record.ratio_to_fp16.is_some());
    let base = if has_ratio { format!(" against {base}") } else { String::new() };
    let within = (!within.is_empty()).then(|| format!("in {name} {}{base}", within.join(", ")));
    let beside = (!beside.is_empty()).then(|| format!("{name} over quantbench: {}", beside.join(", ")));
    let said: Vec<String> = within.into_iter().chain(beside).collect();
    if said.is_empty() { format!("{name} was compared with nothing") } else { said.join("; ") }
}

fn width(record: &Record) -> Option<&str> {
    record.other_engine.as_ref()?.width.as_deref()
}

/// `4bit 0.31x (90 MB a step against 87 MB)`.
fn at_width(record: &Record) -> Option<String> {
    let engine = record.other_engine.as_ref()?;
    let WidthRatio { median, step_bytes, own_step_bytes, .. } = engine.ratio_at_width.as_ref()?;
    let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
    let sizes = step_bytes.zip(*own_step_bytes).filter(|(theirs, _)| *theirs > 0);
    let sizes = sizes.map(|(theirs, ours)| format!(" ({} a step against {})", mb(theirs), mb(ours)));
    let what = engine.width.clone().unwrap_or_else(|| case::precision(record));
    Some(format!("{what} {median:.2}x{}", sizes.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{EngineInfo, OtherEngine, Ratio};

    #[test]
    fn each_engine_says_what_its_formats_buy() {
        let engine = EngineInfo { name: "llama.cpp".to_owned(), version: String::new(), commit: String::new() };
        let at_width = |median| WidthRatio {
            precision: "nf4".to_owned(),
            median,
            ci95_low: None,
            ci95_high: None,
            paired: true,
            step_bytes: Some(90_000_000),
            own_step_bytes: Some(87_000_000),
        };
        let record = |precision: &str, width: &str, ratio_at_width, ratio_to_fp16| Record {
            status: Status::Ok,
            precision: precision.to_owned(),
            ratio_to_fp16,
            other_engine: Some(OtherEngine { width: Some(width.to_owned()), ratio_at_width, ..OtherEngine::default() }),
            ..Record::unknown(engine.clone())
        };
        let ratio = Ratio { median: 2.0, ci95_low: Some(1.9), ci95_high: Some(2.1), paired: true, by_bytes: 3.0 };
        let wide = record("f16", "16bit", None, None);
        let narrow = record("q4_0", "4bit", Some(at_width(0.31)), Some(ratio));
        let failed = Record { status: Status::Error, ..record("q8_0", "8bit", None, None) };
        let said = claims(&[&wide, &failed, &narrow]);
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("in llama.cpp q8_0 gave no result (error), q4_0 2.0"), "{}", said[0]);
        // A file in a format of no width has neither a 16-bit row nor a name by width.
        let file = Record {
            other_engine: Some(OtherEngine { ratio_at_width: Some(at_width(1.5)), ..OtherEngine::default() }),
            ..record("q4_k_m", "", None, None)
        };
        let alone = "llama.cpp over quantbench: q4_k_m 1.50x (90 MB a step against 87 MB)";
        assert_eq!(claims(&[&file]), [alone]);
        assert_eq!(claims(&[&failed]), ["in llama.cpp q8_0 gave no result (error)"]);
        assert_eq!(claims(&[&wide]), ["llama.cpp was compared with nothing"]);
        let end = "against its f16; llama.cpp over quantbench: 4bit 0.31x (90 MB a step against 87 MB)";
        assert!(said[0].ends_with(end), "{}", said[0]);
    }
}
