//! What later runs of a case changed, number by number: base, new, and the interval of the change.

use super::{Part, glossary, line, small};
use crate::record::metrics::{self, Better, Metric};
use crate::record::{Record, Status};
use crate::report::case::{self, Case, GIB, Run};
use crate::report::charts;
use crate::report::compare;
use crate::report::grid::decimals;

/// A number that is compared: its key, its name on the page, and what it is divided by.
struct Row {
    key: &'static str,
    name: &'static str,
    unit: &'static str,
    divisor: f64,
}

const ROWS: &[Row] = &[
    Row { key: "decode_tps", name: "decode", unit: "tokens/s", divisor: 1.0 },
    Row { key: "prefill_tps", name: "prefill", unit: "tokens/s", divisor: 1.0 },
    Row { key: "ttft_ms", name: "TTFT", unit: "ms", divisor: 1.0 },
    Row { key: "joules_per_token", name: "energy", unit: "J/token", divisor: 1.0 },
    Row { key: "peak_bytes", name: "peak", unit: "GiB", divisor: GIB },
    Row { key: "kl_mean", name: "KL", unit: "nats/token", divisor: 1.0 },
];

/// Empty where the case has one run. Each later run is held against the first, or the newest alone where charts show no more.
pub fn changes(part: &Part) -> String {
    let case = &part.case;
    let later: Vec<&Run> = match case.runs.len() {
        0 | 1 => return String::new(),
        n if n > charts::MAX_RUNS => vec![case.newest_run()],
        _ => case.runs.iter().skip(1).collect(),
    };
    later.iter().filter(|run| !std::ptr::eq(**run, &case.runs[0])).map(|run| table(case, run)).collect()
}

fn table(case: &Case, new: &Run) -> String {
    let base = &case.runs[0];
    let pairs: Vec<(&Record, &Record)> =
        new.records.iter().filter_map(|new| Some((partner(base, new)?, new))).collect();
    let rows: String = pairs.iter().map(|(base, new)| group(base, new)).collect();
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<section class=\"changes\">\n<h3>{} → {}</h3>\n<div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">precision</th>\
         <th scope=\"col\" class=\"name\">number</th><th scope=\"col\">base</th><th scope=\"col\">new</th>\
         <th scope=\"col\">{}</th><th scope=\"col\" class=\"name\"></th></tr></thead>\n{rows}</table></div>\n</section>\n",
        line(&base.label),
        line(&new.label),
        glossary::link("change"),
    )
}

/// The same precision and engine where both ran.
fn partner<'a>(base: &Run<'a>, new: &Record) -> Option<&'a Record> {
    let ran = |record: &Record| record.status == Status::Ok;
    base.records.iter().find(|base| case::name(base) == case::name(new) && ran(base) && ran(new))
}

fn group(base: &Record, new: &Record) -> String {
    let known: Vec<Found> = ROWS.iter().filter_map(|row| found(row, base, new)).collect();
    let head = |at: usize| match at {
        0 => format!("<th scope=\"rowgroup\" rowspan=\"{}\">{}</th>", known.len(), line(&case::name(new))),
        _ => String::new(),
    };
    let row = |(at, found): (usize, &Found)| {
        format!(
            "<tr>{}<td class=\"name\">{}{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"name {}\">{}</td></tr>\n",
            head(at),
            line(found.row.name),
            small(found.row.unit),
            found.base,
            found.new,
            line(&found.change),
            found.verdict.class(),
            found.verdict.word()
        )
    };
    let rows: String = known.iter().enumerate().map(row).collect();
    if rows.is_empty() { rows } else { format!("<tbody>\n{rows}</tbody>\n") }
}

/// A number on both sides.
struct Found {
    row: &'static Row,
    base: String,
    new: String,
    change: String,
    verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Better,
    Worse,
    Same,
    NotShown,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::Same => "same",
            Self::NotShown => "no difference shown",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::Same | Self::NotShown => "even",
        }
    }

    /// Better or worse, if the interval `low` to `high` of new less base lies on one side of 0.
    fn of(better: Better, low: f64, high: f64) -> Self {
        let moved = |is_up: bool| if is_up == (better == Better::Higher) { Self::Better } else { Self::Worse };
        match (low, high) {
            (0.0, 0.0) => Self::Same,
            _ if low > 0.0 => moved(true),
            _ if high < 0.0 => moved(false),
            _ => Self::NotShown,
        }
    }
}

fn found(row: &'static Row, base: &Record, new: &Record) -> Option<Found> {
    let metric = metrics::find(row.key).filter(|metric| compare::are_comparable(metric, base, new))?;
    let (a, b) = (metric.value(base)? / row.divisor, metric.value(new)? / row.divisor);
    let digits = if row.key == "kl_mean" { 5 } else { decimals(a.abs().max(b.abs())) };
    let (change, verdict) = judged(row, metric, (base, a), (new, b));
    Some(Found { row, base: format!("{a:.digits$}"), new: format!("{b:.digits$}"), change, verdict })
}

fn judged(row: &Row, metric: &Metric, (base, a): (&Record, f64), (new, b): (&Record, f64)) -> (String, Verdict) {
    let percent = |ratio: f64| format!("{:+.1} %", 100.0 * (ratio - 1.0));
    // Repeats carry an interval of their own.
    if metric.values.is_some() {
        let Some(change) = compare::change(base, new, row.key) else { return ("-".to_owned(), Verdict::NotShown) };
        return match change.interval {
            Some(i) => (
                format!("{} [{}, {}]", percent(change.median), percent(i.low), percent(i.high)),
                Verdict::of(metric.better, i.low - 1.0, i.high - 1.0),
            ),
            None => (percent(change.median), Verdict::NotShown),
        };
    }
    let half = |record: &Record| match row.key {
        "kl_mean" => record.quality.as_ref().and_then(|quality| quality.kl_mean_half_width),
        _ => Some(0.0),
    };
    let verdict = half(base).zip(half(new)).map(|(base, new)| {
        let (change, half) = (b - a, base.hypot(new));
        Verdict::of(metric.better, change - half, change + half)
    });
    let ratio = b / a;
    let change = if ratio.is_finite() { percent(ratio) } else { "-".to_owned() };
    (change, verdict.unwrap_or(Verdict::NotShown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_the_whole_interval() {
        for (better, low, high, verdict) in [
            (Better::Higher, 0.01, 0.05, Verdict::Better),
            (Better::Higher, -0.05, -0.01, Verdict::Worse),
            (Better::Lower, -0.05, -0.01, Verdict::Better),
            (Better::Lower, 0.01, 0.05, Verdict::Worse),
            (Better::Higher, -0.01, 0.05, Verdict::NotShown),
            (Better::Lower, 0.0, 0.0, Verdict::Same),
        ] {
            assert_eq!(Verdict::of(better, low, high), verdict, "{low} to {high}");
        }
    }

    #[test]
    fn quality_on_another_text_is_no_change() {
        let text = include_str!("../../../tests/golden/records/with_quality.json");
        let document: crate::record::Document = serde_json::from_str(text).expect("an example");
        let base = document.records.last().expect("a record");
        let kl = ROWS.iter().find(|row| row.key == "kl_mean").expect("a row");
        assert_eq!(found(kl, base, base).expect("a change").verdict, Verdict::NotShown);
        let mut new = base.clone();
        new.quality.as_mut().expect("quality").text = "another text".to_owned();
        assert!(found(kl, base, &new).is_none());
    }

    #[test]
    fn every_row_is_a_metric() {
        assert!(ROWS.iter().all(|row| metrics::find(row.key).is_some() && glossary::meaning(row.name).is_some()));
    }
}
