//! Compares two documents: what got worse beyond a limit, what did not, and what these runs leave open.
//!
//! A gate on something timed decides on an interval: `regressed` where all of it lies beyond the limit, `ok` where all of it lies
//! within, `can't tell` otherwise.

mod gate;
pub(super) mod judge;
pub(super) mod pairs;
mod text;

pub use gate::{DEFAULT_GATES, Gate, Kind, gates};
pub use judge::{are_comparable, change};
pub use text::{CompareFormat, FORMATS, find};

use serde::Serialize;

use crate::error::BadInput;
use crate::record::{Document, EngineInfo, Record, SCHEMA_VERSION};
use gate::{Key, Limit};
use judge::{Nothing, Sides};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    CannotTell,
    Regressed,
}

/// How the runs of the two sides lie in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Apart,
    /// Repeat i of one beside repeat i of the other.
    Interleaved,
}

pub struct Rules {
    pub gates: Vec<Gate>,
    pub allow_different_machine: bool,
    pub order: Order,
}

/// What a comparison found.
#[derive(Debug, Serialize)]
pub struct Comparison {
    pub schema_version: u32,
    /// The worst of `checks`.
    pub verdict: Verdict,
    pub base: Side,
    pub new: Side,
    pub checks: Vec<Check>,
    /// Gates without a value on both sides of any pair.
    pub empty_gates: Vec<String>,
    /// Sentences on what was not compared, and why.
    pub not_compared: Vec<String>,
    /// Sentences on what a reader should know of the two sides.
    pub notes: Vec<String>,
}

/// Where one side comes from.
#[derive(Debug, Serialize)]
pub struct Side {
    pub engine: EngineInfo,
    pub timestamp: String,
    /// How many runs it is made of where that is more than one file: those of a history, of which this is the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_runs: Option<usize>,
}

/// One gate at one precision of one case.
#[derive(Debug, Serialize)]
pub struct Check {
    pub model: String,
    pub precision: String,
    /// Of the new side.
    pub engine: String,
    pub workload: String,
    pub gate: String,
    pub kind: Kind,
    pub metric: &'static str,
    pub unit: &'static str,
    pub base: Option<f64>,
    pub new: Option<f64>,
    /// New over base less 1; new less base where `limit_is_relative` is false.
    pub change: Option<f64>,
    /// 95 % interval of `change`.
    pub ci95_low: Option<f64>,
    pub ci95_high: Option<f64>,
    pub limit: Option<f64>,
    pub limit_is_relative: bool,
    pub verdict: Verdict,
    pub reason: Option<String>,
}

/// Fails with [`BadInput`] where the two sides did unequal work, ran on different machines (unless that is allowed), or have
/// nothing in common.
pub fn compare(base: &Document, new: &Document, rules: &Rules) -> Result<Comparison, BadInput> {
    let pairs::Pairs { pairs, alone } = pairs::pair(&base.records, &new.records)?;
    let differences = pairs::machine_differences(&pairs);
    if !differences.is_empty() && !rules.allow_different_machine {
        return Err(BadInput::new(format!("the two sides ran on different machines: {}", differences.join("; ")))
            .hint("give `--allow-different-machine` to compare all the same; times then say little, ratios and bytes still do"));
    }
    let (mut checks, mut not_compared, mut empty_gates) = (Vec::new(), alone, Vec::new());
    for gate in &rules.gates {
        let before = checks.len();
        for pair in &pairs {
            let sides = Sides { pair, base: &base.records, new: &new.records, order: rules.order };
            match judge::judge(gate, &sides) {
                Ok(found) => checks.push(check(gate, pair.new[0], found)),
                Err(Nothing(Some(why))) => {
                    not_compared.push(format!("{} of {}: {why}", gate.name(), pairs::name(pair.base[0])));
                }
                Err(Nothing(None)) => {}
            }
        }
        if checks.len() == before {
            empty_gates.push(gate.text.clone());
        }
    }
    Ok(Comparison {
        schema_version: SCHEMA_VERSION,
        verdict: checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::CannotTell),
        base: side(pairs[0].base[0]),
        new: side(pairs[0].new[0]),
        checks: in_order(&pairs, checks),
        empty_gates,
        not_compared,
        notes: notes(&pairs, &differences).into_iter().chain(of_pairs(rules)).collect(),
    })
}

/// Case by case, as a reader looks at them, rather than gate by gate.
fn in_order(pairs: &[pairs::Pair], checks: Vec<Check>) -> Vec<Check> {
    let place = |check: &Check| {
        pairs.iter().position(|pair| {
            let record = pair.new[0];
            let names = (&record.model.id, &record.precision, &record.engine.name);
            names == (&check.model, &check.precision, &check.engine)
                && super::case::workload(&record.workload) == check.workload
        })
    };
    let mut checks = checks;
    checks.sort_by_key(place);
    checks
}

pub(super) fn side(record: &Record) -> Side {
    Side { engine: record.engine.clone(), timestamp: record.timestamp.clone(), n_runs: None }
}

pub(super) fn check(gate: &Gate, record: &Record, found: judge::Found) -> Check {
    let (limit, limit_is_relative) = match gate.limit {
        Limit::Exact => (None, true),
        Limit::Relative(limit) => (Some(limit), true),
        Limit::Absolute(limit) => (Some(limit), false),
    };
    Check {
        model: record.model.id.clone(),
        precision: record.precision.clone(),
        engine: record.engine.name.clone(),
        workload: super::case::workload(&record.workload),
        gate: gate.text.clone(),
        kind: gate.kind(),
        metric: gate.name(),
        unit: match gate.key {
            Key::Metric(metric) => metric.unit,
            _ => "",
        },
        base: found.base,
        new: found.new,
        change: found.change,
        ci95_low: found.interval.map(|interval| interval.low),
        ci95_high: found.interval.map(|interval| interval.high),
        limit,
        limit_is_relative,
        verdict: found.verdict,
        reason: found.reason,
    }
}

fn notes(pairs: &[pairs::Pair], differences: &[String]) -> Vec<String> {
    let mut notes: Vec<String> =
        differences.iter().map(|difference| format!("different machines: {difference}")).collect();
    notes.extend(disturbed("the base", pairs.iter().map(|pair| &pair.base)));
    notes.extend(disturbed("the new side", pairs.iter().map(|pair| &pair.new)));
    let differ = |pair: &&pairs::Pair| pair.base[0].weights.hash != pair.new[0].weights.hash;
    notes
        .extend(pairs.iter().filter(differ).map(|pair| format!("the weights of {} differ", pairs::name(pair.base[0]))));
    notes
}

/// Why a change need not be what the two numbers beside it give.
fn of_pairs(rules: &Rules) -> Option<String> {
    let is_timed = rules.gates.iter().any(|gate| matches!(gate.kind(), Kind::Time | Kind::Ratio));
    (rules.order == Order::Interleaved && is_timed).then(|| {
        "changes are medians of paired repeats, so they need not equal the ratio of the medians shown".to_owned()
    })
}

/// The precisions of a side whose runs something disturbed.
fn disturbed<'a>(side: &str, runs: impl Iterator<Item = &'a Vec<&'a Record>>) -> Option<String> {
    let tainted = runs.filter(|records| records.iter().any(|record| record.tainted));
    let names: Vec<&str> = tainted.map(|records| records[0].precision.as_str()).collect();
    (!names.is_empty()).then(|| format!("{side} was noisy at {}: see its warnings", names.join(", ")))
}
