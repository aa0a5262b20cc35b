//! Which records of two documents did the same work, and whether on the same machine.

use crate::error::BadInput;
use crate::record::Record;
use crate::report::case;

/// The same work on both sides; more than one record where it was run more than once.
pub struct Pair<'a> {
    pub base: Vec<&'a Record>,
    pub new: Vec<&'a Record>,
}

pub struct Pairs<'a> {
    pub pairs: Vec<Pair<'a>>,
    /// What only one side has, a sentence each.
    pub alone: Vec<String>,
}

/// A fact that has to agree, by the name that messages use. Empty where it is not known.
type Fact = (&'static str, String);

/// What a record's numbers are numbers of.
fn work(record: &Record) -> Vec<Fact> {
    let workload = &record.workload;
    let image = workload.image.map(|image| format!("{image:?}").to_lowercase());
    vec![
        ("model", record.model.id.clone()),
        ("precision", record.precision.clone()),
        ("device", record.device.kind.clone()),
        ("layers kept in fp16", record.keep_fp16.join(",")),
        ("architecture", record.model.architecture.clone()),
        ("weights", record.weights.source.clone()),
        ("seed", record.weights.seed.map(|seed| seed.to_string()).unwrap_or_default()),
        ("int8 threshold", record.int8.as_ref().map(|int8| int8.threshold.to_string()).unwrap_or_default()),
        ("prompt tokens", workload.n_prompt.to_string()),
        ("new tokens", workload.n_gen.to_string()),
        ("depth", workload.n_depth.to_string()),
        ("image tokens", workload.n_image.to_string()),
        ("picture", image.unwrap_or_default()),
        ("batch size", workload.batch_size.to_string()),
    ]
}

/// How many facts of [`work`], from the first, say which record is meant. The others say what it did.
const NAMING_FACTS: usize = 4;

/// What speed depends on beside the work.
fn machine(record: &Record) -> Vec<Fact> {
    let environment = &record.environment;
    let driver = environment.driver.as_deref().and_then(|driver| driver.split('.').next());
    let threads = if record.device.kind == "cpu" && environment.threads > 0 {
        environment.threads.to_string()
    } else {
        String::new()
    };
    vec![
        ("engine", record.engine.name.clone()),
        ("device", record.device.name.clone()),
        ("GPU", environment.gpu.clone().unwrap_or_default()),
        ("instruction set", environment.isa.clone()),
        ("threads", threads),
        ("driver, major version", driver.unwrap_or_default().to_owned()),
        ("build profile", environment.build_profile.clone()),
    ]
}

/// What differs; a fact that one side does not know does not. The layers kept in fp16 are always known.
fn differences(base: &[Fact], new: &[Fact]) -> Vec<String> {
    let differ =
        |a: &str, b: &str, name: &str| a != b && (name == "layers kept in fp16" || !(a.is_empty() || b.is_empty()));
    let both = base.iter().zip(new).filter(|((name, a), (_, b))| differ(a, b, name));
    both.map(|((name, a), (_, b))| format!("{name} {} and {}", quoted(a), quoted(b))).collect()
}

fn quoted(text: &str) -> String {
    if text.is_empty() { "none".to_owned() } else { format!("`{}`", case::plain(text)) }
}

/// True if both did the same work, on any machines.
pub fn same_work(a: &Record, b: &Record) -> bool {
    differences(&work(a), &work(b)).is_empty()
}

/// True if both did the same work on the same machine.
pub fn same_series(a: &Record, b: &Record) -> bool {
    same_work(a, b) && same_engine(a, b) && differences(&machine(a), &machine(b)).is_empty()
}

fn same_engine(a: &Record, b: &Record) -> bool {
    a.engine.name == b.engine.name
}

/// Pairs what did the same work. Fails where a record has a namesake that did other work, and where nothing pairs.
pub fn pair<'a>(base: &'a [Record], new: &'a [Record]) -> Result<Pairs<'a>, BadInput> {
    let (base, mut new) = (by_work(base), by_work(new));
    let (mut pairs, mut lonely) = (Vec::new(), Vec::new());
    for group in base {
        // Two engines may stand in one file: each meets itself first.
        let itself = new.iter().position(|other| same_work(group[0], other[0]) && same_engine(group[0], other[0]));
        match itself.or_else(|| new.iter().position(|other| same_work(group[0], other[0]))) {
            Some(at) => pairs.push(Pair { base: group, new: new.remove(at) }),
            None => lonely.push(group[0]),
        }
    }
    let new: Vec<&Record> = new.iter().map(|group| group[0]).collect();
    refuse_unequal(&lonely, &new)?;
    let alone = |records: &[&Record], side: &str| {
        records.iter().map(|record| format!("only {side} has {}", name(record))).collect::<Vec<_>>()
    };
    let alone = [alone(&lonely, "the base"), alone(&new, "the new side")].concat();
    match pairs.is_empty() {
        true => Err(BadInput::new(format!("nothing to compare: {}", alone.join("; ")))),
        false => Ok(Pairs { pairs, alone }),
    }
}

/// Records of the same work stand together, in order of first appearance.
fn by_work(records: &[Record]) -> Vec<Vec<&Record>> {
    let mut groups: Vec<Vec<&Record>> = Vec::new();
    for record in records {
        match groups.iter_mut().find(|group| same_work(group[0], record) && same_engine(group[0], record)) {
            Some(group) => group.push(record),
            None => groups.push(vec![record]),
        }
    }
    groups
}

fn refuse_unequal(base: &[&Record], new: &[&Record]) -> Result<(), BadInput> {
    let named = |record: &Record| work(record).into_iter().take(NAMING_FACTS).collect::<Vec<_>>();
    for record in base {
        if let Some(other) = new.iter().find(|other| differences(&named(record), &named(other)).is_empty()) {
            let differ = differences(&work(record), &work(other));
            return Err(BadInput::new(format!("unequal work at {}: {}", name(record), differ.join(", ")))
                .hint("run both sides with the same model, weights and lengths"));
        }
    }
    Ok(())
}

/// Model and precision with their lengths.
pub fn name(record: &Record) -> String {
    case::plain(&format!("{} {} ({})", record.model.id, record.precision, case::workload(&record.workload)))
}

/// How the machines of the pairs differ, each way once.
pub fn machine_differences(pairs: &[Pair]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for pair in pairs {
        for difference in differences(&machine(pair.base[0]), &machine(pair.new[0])) {
            if !found.contains(&difference) {
                found.push(difference);
            }
        }
    }
    found
}
