//! What the readable outputs share: the records of one case, their title and their warnings.

use crate::record::{Document, Record, Status, Workload};

pub const GIB: f64 = (1u64 << 30) as f64;

/// Records of the same work on the same machine, in one table: of one run, or of several that a reader compares.
pub struct Case<'a> {
    pub records: &'a [Record],
    /// In the order of the records; never empty.
    pub runs: Vec<Run<'a>>,
    /// True where the run must be named although there is only one: another case has the same title, or there are several
    /// files.
    pub names_run: bool,
}

/// What was measured together: no precision stands in it twice.
pub struct Run<'a> {
    pub records: &'a [Record],
    /// File and time, and whatever else distinguishes it from the others of the case.
    pub label: String,
    /// A word for charts: the file where that is enough, or a number such as `#2`.
    pub short: String,
}

/// The cases of a document, in its order.
pub fn cases(document: &Document) -> Vec<Case<'_>> {
    let mut cases: Vec<Case> = Vec::new();
    let mut rest = document.records.as_slice();
    while let Some(first) = rest.first() {
        let n = rest.iter().take_while(|record| same_case(first, record)).count();
        let (records, behind) = rest.split_at(n);
        cases.push(Case { records, runs: runs(records), names_run: false });
        rest = behind;
    }
    let has_several_files = document.records.iter().any(|record| record.file != document.records[0].file);
    let titles: Vec<String> = cases.iter().map(|case| title(case.records)).collect();
    for (case, title) in cases.iter_mut().zip(&titles) {
        let is_unique = titles.iter().filter(|other| *other == title).count() == 1;
        case.names_run = has_several_files || case.runs.len() > 1 || !is_unique;
    }
    cases
}

/// The records of each case together, in the order in which cases are first mentioned.
pub fn by_case(records: Vec<Record>) -> Vec<Record> {
    let mut groups: Vec<Vec<Record>> = Vec::new();
    for record in records {
        match groups.iter_mut().find(|group| same_case(&group[0], &record)) {
            Some(group) => group.push(record),
            None => groups.push(vec![record]),
        }
    }
    groups.concat()
}

/// Whether one title holds for both. A row that failed says little of the machine.
fn same_case(a: &Record, b: &Record) -> bool {
    let both_ran = a.status == Status::Ok && b.status == Status::Ok;
    a.model == b.model
        && a.weights.source == b.weights.source
        && a.device == b.device
        && a.workload == b.workload
        && (a.engine.name == b.engine.name
            || (a.command == b.command && a.timestamp == b.timestamp && a.file == b.file))
        && a.keep_fp16 == b.keep_fp16
        && a.environment.threads == b.environment.threads
        // Each engine has kernels of its own.
        && (!both_ran || a.engine.name != b.engine.name || a.environment.isa == b.environment.isa)
        && (!both_ran || has_quality_alone(a) == has_quality_alone(b))
}

/// Cuts where the file, the time or the build changes, and where a precision comes again.
fn runs(records: &[Record]) -> Vec<Run<'_>> {
    let mut cut: Vec<&[Record]> = Vec::new();
    let mut rest = records;
    while let Some(first) = rest.first() {
        let belongs = |&(at, record): &(usize, &Record)| {
            same_run(first, record) && !rest[..at].iter().any(|other| name(other) == name(record))
        };
        let n = rest.iter().enumerate().take_while(belongs).count();
        let (run, behind) = rest.split_at(n);
        cut.push(run);
        rest = behind;
    }
    labelled(&cut)
}

fn same_run(a: &Record, b: &Record) -> bool {
    // Other tools time each of their tests anew.
    let same_time = a.timestamp == b.timestamp || [a, b].iter().all(|record| record.engine.name != OWN);
    a.file == b.file && same_time && (a.engine == b.engine || a.engine.name != b.engine.name)
}

/// Facts that may distinguish two runs beside file and time.
type Fact = fn(&Record) -> String;

const FACTS: &[Fact] = &[
    |record| record.engine.version.clone(),
    |record| record.engine.commit.clone(),
    |record| record.environment.cpu.clone(),
    |record| record.environment.gpu.clone().unwrap_or_default(),
    |record| record.environment.driver.clone().map(|driver| format!("driver {driver}")).unwrap_or_default(),
    |record| record.environment.cuda.clone().map(|cuda| format!("CUDA {cuda}")).unwrap_or_default(),
    |record| record.environment.os.clone(),
    |record| record.environment.build_profile.clone(),
    |record| record.weights.hash.clone(),
];

fn labelled<'a>(runs: &[&'a [Record]]) -> Vec<Run<'a>> {
    let differs = |fact: &Fact| runs.iter().any(|run| fact(&run[0]) != fact(&runs[0][0]));
    let differing: Vec<&Fact> = FACTS.iter().filter(|fact| differs(fact)).collect();
    let facts = |run: &[Record]| {
        let own = [run[0].file.clone(), run[0].timestamp.clone()].into_iter();
        let known = own.chain(differing.iter().map(|fact| fact(&run[0]))).filter(|text| !text.is_empty());
        plain(&known.collect::<Vec<_>>().join(", "))
    };
    let is_alone = |text: &String, of: &dyn Fn(&[Record]) -> String| {
        !text.is_empty() && runs.iter().filter(|run| of(run) == *text).count() == 1
    };
    let run = |(at, records): (usize, &&'a [Record])| {
        let (file, all) = (plain(&records[0].file), facts(records));
        let short = match is_alone(&file, &|run| plain(&run[0].file)) && file.chars().count() <= 16 {
            true => file,
            false => format!("#{}", at + 1),
        };
        let label = match short.starts_with('#') && runs.len() > 1 {
            true => format!("{short} {all}").trim_end().to_owned(),
            false => all,
        };
        Run { records, label, short }
    };
    runs.iter().enumerate().map(run).collect()
}

impl Case<'_> {
    pub fn title(&self) -> String {
        title(self.records)
    }

    /// The same case with its newest run alone.
    pub fn newest(&self) -> Case<'_> {
        let Run { records, label, short } = self.newest_run();
        let run = Run { records, label: label.clone(), short: short.clone() };
        Case { records, runs: vec![run], names_run: true }
    }

    /// By time, and of equal ones the last.
    pub fn newest_run(&self) -> &Run<'_> {
        // RFC 3339 in UTC sorts as text; a case has a run.
        self.runs.iter().max_by_key(|run| run.records[0].timestamp.as_str()).unwrap_or(&self.runs[0])
    }

    /// Each record with its run.
    pub fn rows(&self) -> impl Iterator<Item = (&Run<'_>, &Record)> {
        self.runs.iter().flat_map(|run| run.records.iter().map(move |record| (run, record)))
    }

    /// Unique within the case: `fp16`, `fp16 by candle`, `fp16 · new.json`.
    pub fn label(&self, run: &Run, record: &Record) -> String {
        let label = label(record, self.records);
        if self.runs.len() > 1 { format!("{label} · {}", run.short) } else { label }
    }
}

/// Model, device and workload in one line. `records` is one case, never empty.
fn title(records: &[Record]) -> String {
    let first = records.iter().find(|record| record.status == Status::Ok).unwrap_or(&records[0]);
    let random = if first.weights.source == "random" { " (random weights)" } else { "" };
    let engine = match has_several_engines(records) || first.engine.name == OWN {
        true => String::new(),
        false => format!(" by {}", first.engine.name),
    };
    let what = match records.iter().find_map(|record| record.quality.as_ref().filter(|_| has_quality_alone(record))) {
        Some(quality) => format!("quality over {} tokens of `{}`", quality.n_tokens, quality.text),
        None => workload(&first.workload),
    };
    let kept = match first.keep_fp16.as_slice() {
        [] => String::new(),
        patterns => format!(" with {} in fp16", patterns.join(", ")),
    };
    let on = match device(first) {
        device if device.is_empty() => device,
        device => format!(" on {device}"),
    };
    plain(&format!("{}{random}{kept}{engine}{on}: {what}", first.model.id))
}

/// Our own engine, as records spell it.
pub const OWN: &str = "quantbench";

fn has_several_engines(records: &[Record]) -> bool {
    records.iter().any(|record| record.engine.name != records[0].engine.name)
}

/// The precision, and the engine where a table has several: `fp16`, `fp16 by candle`.
pub fn label(record: &Record, records: &[Record]) -> String {
    if has_several_engines(records) { name(record) } else { precision(record) }
}

/// Another tool's row may not say which one it is.
pub fn precision(record: &Record) -> String {
    if record.precision.is_empty() { "unknown precision".to_owned() } else { plain(&record.precision) }
}

/// The same wherever the record stands: `fp16`, `fp16 by candle`.
pub fn name(record: &Record) -> String {
    let (precision, engine) = (precision(record), plain(&record.engine.name));
    if engine == OWN {
        return precision;
    }
    match record.dtypes.weights.as_str() {
        // candle runs some of its models in fp32 alone.
        held if !held.is_empty() && held != record.precision => format!("{precision} by {engine} in {}", plain(held)),
        _ => format!("{precision} by {engine}"),
    }
}

fn device(record: &Record) -> String {
    let environment = &record.environment;
    let mut text = record.device.name.clone();
    if record.device.kind == "cpu" && environment.threads > 0 {
        text += &format!(", {} {}", environment.threads, if environment.threads == 1 { "thread" } else { "threads" });
    }
    // A worker that failed on a GPU never said which kernels it would have used.
    let ran = record.status == Status::Ok || record.device.kind == "cpu";
    if !environment.isa.is_empty() && ran {
        text += &format!(", {}", environment.isa);
    }
    text
}

/// Whether quality was measured and speed was not.
pub fn has_quality_alone(record: &Record) -> bool {
    record.quality.is_some() && record.samples.end_to_end_ns.is_empty()
}

/// The lengths of a workload, for example `8 prompt + 64 new tokens after 512 in the cache`.
pub fn workload(workload: &Workload) -> String {
    let image = if workload.n_image > 0 { format!("{} image + ", workload.n_image) } else { String::new() };
    let depth = if workload.n_depth > 0 { format!(" after {} in the cache", workload.n_depth) } else { String::new() };
    let batch = if workload.batch_size > 1 { format!(", batch {}", workload.batch_size) } else { String::new() };
    let tokens = if workload.n_gen == 1 { "token" } else { "tokens" };
    format!("{image}{} prompt + {} new {tokens}{depth}{batch}", workload.n_prompt, workload.n_gen)
}

/// `8+64` tokens of prompt and new ones, and `@4096` behind so many in the KV cache; tokens of a picture come first.
pub fn lengths(workload: &Workload) -> String {
    let image = if workload.n_image > 0 { format!("{}+", workload.n_image) } else { String::new() };
    let depth = if workload.n_depth > 0 { format!(" @{}", workload.n_depth) } else { String::new() };
    format!("{image}{}+{}{depth}", workload.n_prompt, workload.n_gen)
}

/// Each warning once, after the precisions that it holds for.
pub fn warnings(case: &Case) -> Vec<String> {
    let mut seen: Vec<(&str, Vec<String>)> = Vec::new();
    for (run, record) in case.rows() {
        let label = case.label(run, record);
        for message in &record.warnings {
            match seen.iter_mut().find(|(known, _)| known == message) {
                Some((_, labels)) if labels.contains(&label) => {}
                Some((_, labels)) => labels.push(label.clone()),
                None => seen.push((message, vec![label.clone()])),
            }
        }
    }
    let line = |(message, labels): (&str, Vec<String>)| plain(&format!("{}: {message}", labels.join(", ")));
    seen.into_iter().map(line).collect()
}

/// The day of a time in RFC 3339.
pub fn day(timestamp: &str) -> &str {
    timestamp.split('T').next().unwrap_or_default()
}

/// The commands that made the records of a case, each once.
pub fn commands(records: &[Record]) -> Vec<&str> {
    let mut commands: Vec<&str> = Vec::new();
    for record in records {
        if !record.command.is_empty() && !commands.contains(&record.command.as_str()) {
            commands.push(&record.command);
        }
    }
    commands
}

/// `ok`, or the status with its reason.
pub fn status(record: &Record) -> String {
    match &record.reason {
        Some(reason) if record.status != Status::Ok => plain(&format!("{}: {reason}", status_word(record.status))),
        _ => status_word(record.status).into(),
    }
}

/// As records spell it.
pub fn status_word(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Oom => "oom",
        Status::Invalid => "invalid",
        Status::Error => "error",
        Status::Timeout => "timeout",
    }
}

/// One line without control characters: names and reasons come from files, and a terminal obeys escape sequences.
pub fn plain(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    lines.join("; ").chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_is_one_line_without_escapes() {
        assert_eq!(plain("a\nb\r\nc"), "a; b; c");
        assert_eq!(plain("\u{1b}[31mred\u{7}"), "[31mred");
    }

    fn example() -> Vec<Record> {
        let text = include_str!("../../tests/golden/records/three_precisions.json");
        serde_json::from_str::<Document>(text).expect("an example").records
    }

    fn of(files: &[(&str, fn(&mut Record))]) -> Document {
        let read = |&(file, change): &(&str, fn(&mut Record))| {
            let mut records = example();
            records.iter_mut().for_each(|record| record.file = file.to_owned());
            records.iter_mut().for_each(change);
            records
        };
        Document { schema_version: 1, records: by_case(files.iter().flat_map(read).collect()) }
    }

    #[test]
    fn runs_of_one_model_are_told_apart() {
        let later: fn(&mut Record) = |record| record.timestamp = "2026-01-02T00:00:00Z".into();
        let same: fn(&mut Record) = |_| {};
        let other_commit: fn(&mut Record) = |record| record.engine.commit = "fedcba9".into();
        let (first, second) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let cases: &[(&[(&str, fn(&mut Record))], &[String], &[&str])] = &[
            (&[("r.json", same)], &[format!("r.json, {first}")], &["r.json"]),
            (
                &[("base.json", same), ("new.json", later)],
                &[format!("base.json, {first}"), format!("new.json, {second}")],
                &["base.json", "new.json"],
            ),
            (
                &[("r.json", same), ("r.json", later)],
                &[format!("#1 r.json, {first}"), format!("#2 r.json, {second}")],
                &["#1", "#2"],
            ),
            (&[("", same), ("", same)], &[format!("#1 {first}"), format!("#2 {first}")], &["#1", "#2"]),
            (
                &[("a.json", same), ("b.json", other_commit)],
                &[format!("a.json, {first}, 0123abc"), format!("b.json, {first}, fedcba9")],
                &["a.json", "b.json"],
            ),
        ];
        for (files, labels, short) in cases {
            let document = of(files);
            let cases = super::cases(&document);
            assert_eq!(cases.len(), 1);
            assert_eq!(
                cases[0].runs.iter().map(|run| &run.label).collect::<Vec<_>>(),
                labels.iter().collect::<Vec<_>>()
            );
            assert_eq!(cases[0].runs.iter().map(|run| run.short.as_str()).collect::<Vec<_>>(), *short);
            assert_eq!(cases[0].names_run, files.len() > 1);
            assert!(cases[0].runs.iter().all(|run| run.records.len() == 3));
        }
    }

    #[test]
    fn what_no_title_tells_apart_is_labelled() {
        let revised: fn(&mut Record) = |record| record.model.revision = Some("abc".into());
        let document = of(&[("", |_| {}), ("", revised)]);
        let cases = super::cases(&document);
        assert_eq!(
            cases.iter().map(|case| (case.runs.len(), case.names_run)).collect::<Vec<_>>(),
            [(1, true), (1, true)]
        );
        let other_machine: fn(&mut Record) = |record| record.device.name = "Another CPU".into();
        let document = of(&[("a.json", |_| {}), ("b.json", other_machine)]);
        assert_eq!(super::cases(&document).iter().map(|case| case.names_run).collect::<Vec<_>>(), [true, true]);
        assert_ne!(title(&document.records[..3]), title(&document.records[3..]));
    }

    #[test]
    fn a_failed_first_row_says_nothing_of_the_machine() {
        let mut records = example();
        records
            .iter_mut()
            .for_each(|record| record.device = crate::record::DeviceFacts { kind: "cuda".into(), name: "GPU".into() });
        records.iter_mut().for_each(|record| record.environment.isa = "sm_90".into());
        (records[0].status, records[0].environment.isa) = (Status::Error, "avx512".into());
        let document = Document { schema_version: 1, records };
        let cases = super::cases(&document);
        assert_eq!(cases.len(), 1);
        assert!(cases[0].title().contains("on GPU, sm_90:"), "{}", cases[0].title());
    }
}
