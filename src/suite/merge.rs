//! Many files of rows to one, in the order in which one machine would have written them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::row::{ResultLine, ResultLines};
use crate::record::{Record, SCHEMA_VERSION, Status};

/// All rows, each case once.
#[derive(Debug)]
pub struct Merged {
    /// Whole lines, as they stood.
    pub text: String,
    pub n_rows: usize,
    /// Notes for the reader: rows left out, missing cases, machines that differ.
    pub notes: Vec<String>,
}

impl Merged {
    /// The same rows as one document, with one version.
    pub fn document(&self) -> serde_json::Result<String> {
        let row = |line: &str| {
            let mut row: Value = serde_json::from_str(line)?;
            row.as_object_mut().map(|row| row.remove("schema_version"));
            Ok(row)
        };
        let records = self.text.lines().map(row).collect::<serde_json::Result<Vec<_>>>()?;
        Ok(serde_json::to_string_pretty(&json!({"schema_version": SCHEMA_VERSION, "records": records}))? + "\n")
    }
}

/// A case of one file, or a row that no suite wrote.
struct CaseRows {
    file: usize,
    /// Rank of the suite by first mention, and index of the case in it.
    order: (usize, usize),
    /// Rows of one case in two files have one key.
    key: String,
    is_whole: bool,
    lines: Vec<ResultLine>,
}

/// Joins files. Where two hold the same case, the one that is whole and has more rows that are ok stays, then the first: rows
/// of one case are never mixed, because their ratios belong together.
pub fn merge(files: &[ResultLines]) -> Merged {
    let mut notes: Vec<String> = files.iter().filter(|file| file.torn).map(torn).collect();
    let mut best: BTreeMap<String, CaseRows> = BTreeMap::new();
    let mut n_dropped = 0;
    for group in groups(files) {
        let rank = |group: &CaseRows| {
            let n_ok = group.lines.iter().filter(|line| line.record.status == Status::Ok).count();
            (group.is_whole, n_ok, std::cmp::Reverse(group.file))
        };
        match best.get(&group.key) {
            Some(known) if rank(known) >= rank(&group) => n_dropped += group.lines.len(),
            Some(known) => {
                n_dropped += known.lines.len();
                best.insert(group.key.clone(), group);
            }
            None => {
                best.insert(group.key.clone(), group);
            }
        }
    }
    if n_dropped > 0 {
        notes.push(format!("{n_dropped} rows are left out: another file has the same cases"));
    }
    let mut groups: Vec<CaseRows> = best.into_values().collect();
    groups.sort_by_key(|group| (group.order, group.file));
    notes.extend(missing(&groups));
    notes.extend(differences(files, &groups));
    let lines: Vec<&ResultLine> = groups.iter().flat_map(|group| &group.lines).collect();
    let text = lines.iter().map(|line| format!("{}\n", line.text)).collect();
    Merged { text, n_rows: lines.len(), notes }
}

fn torn(file: &ResultLines) -> String {
    format!("the last line of `{}` was cut while it was written and is left out; `--resume` runs its case", {
        file.path.display()
    })
}

fn groups(files: &[ResultLines]) -> Vec<CaseRows> {
    let mut suites: Vec<String> = Vec::new();
    let mut groups: Vec<CaseRows> = Vec::new();
    for (file, lines) in files.iter().enumerate() {
        let mut of_file: BTreeMap<String, usize> = BTreeMap::new();
        for (row, line) in lines.lines.iter().enumerate() {
            let Some(info) = &line.suite else {
                // After the suites, in the order of the files.
                let (key, order) = (format!("row {:016x}", xxh3_64(line.text.as_bytes())), (usize::MAX, row));
                groups.push(CaseRows { file, order, key, is_whole: true, lines: vec![line.clone()] });
                continue;
            };
            let suite = suites.iter().position(|name| *name == info.name).unwrap_or_else(|| {
                suites.push(info.name.clone());
                suites.len() - 1
            });
            let key = format!("{} {}", info.name, info.case);
            let at = *of_file.entry(key.clone()).or_insert_with(|| {
                let order = (suite, info.index);
                groups.push(CaseRows { file, order, key, is_whole: false, lines: Vec::new() });
                groups.len() - 1
            });
            groups[at].lines.push(line.clone());
            groups[at].is_whole = groups[at].lines.len() >= info.n_rows;
        }
    }
    groups
}

/// Cases of a suite of which no file has all rows.
fn missing(groups: &[CaseRows]) -> Vec<String> {
    let mut suites: BTreeMap<&str, (usize, BTreeSet<usize>)> = BTreeMap::new();
    for (group, info) in groups.iter().filter_map(|group| Some((group, group.lines.first()?.suite.as_ref()?))) {
        let suite = suites.entry(&info.name).or_default();
        suite.0 = suite.0.max(info.n_cases);
        if group.is_whole {
            suite.1.insert(info.index);
        }
    }
    let note = |(name, (n_cases, found)): (&str, (usize, BTreeSet<usize>))| {
        let missing: Vec<String> = (1..=n_cases).filter(|i| !found.contains(i)).map(|i| i.to_string()).collect();
        (!missing.is_empty()).then(|| format!("`{name}`: of {n_cases} cases these are missing: {}", missing.join(", ")))
    };
    suites.into_iter().filter_map(note).collect()
}

/// A fact of the machine or the build, by its key in a record.
type MachineFact = (&'static str, fn(&Record) -> String);

const FACTS: &[MachineFact] = &[
    ("engine.version", |record| record.engine.version.clone()),
    ("engine.commit", |record| record.engine.commit.clone()),
    ("device.name", |record| record.device.name.clone()),
    ("environment.cpu", |record| record.environment.cpu.clone()),
    ("environment.isa", |record| record.environment.isa.clone()),
    ("environment.threads", |record| record.environment.threads.to_string()),
    ("environment.os", |record| record.environment.os.clone()),
    ("environment.build_profile", |record| record.environment.build_profile.clone()),
    ("environment.features", |record| record.environment.features.join(",")),
    ("environment.gpu", |record| record.environment.gpu.clone().unwrap_or_default()),
    ("environment.driver", |record| record.environment.driver.clone().unwrap_or_default()),
    ("environment.cuda", |record| record.environment.cuda.clone().unwrap_or_default()),
];

/// Facts that differ between files for one engine on one kind of device.
fn differences(files: &[ResultLines], groups: &[CaseRows]) -> Vec<String> {
    let records = || groups.iter().flat_map(|group| group.lines.iter().map(move |line| (group.file, &line.record)));
    let measured = || records().filter(|(_, record)| record.status == Status::Ok);
    let kinds: BTreeSet<(&str, &str)> =
        measured().map(|(_, record)| (record.engine.name.as_str(), record.device.kind.as_str())).collect();
    let mut notes = Vec::new();
    for (engine, device) in kinds {
        let alike = |record: &Record| record.engine.name == engine && record.device.kind == device;
        for (key, fact) in FACTS {
            let mut by_file: BTreeMap<usize, BTreeSet<String>> = BTreeMap::new();
            for (file, record) in measured().filter(|(_, record)| alike(record)) {
                by_file.entry(file).or_default().insert(fact(record));
            }
            let mut sets: BTreeMap<&BTreeSet<String>, Vec<String>> = BTreeMap::new();
            for (file, values) in &by_file {
                sets.entry(values).or_default().push(format!("`{}`", files[*file].path.display()));
            }
            if sets.len() > 1 {
                notes.push(format!("`{key}` differs on {device}: {}", sides(&sets)));
            }
        }
    }
    notes
}

fn sides(sets: &BTreeMap<&BTreeSet<String>, Vec<String>>) -> String {
    let side = |(values, files): (&&BTreeSet<String>, &Vec<String>)| {
        let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
        format!("{} in {}", values.join(" and "), files.join(", "))
    };
    sets.iter().map(side).collect::<Vec<_>>().join("; ")
}
