//! What the readable outputs share: the records of one case, their title and their warnings.

use crate::record::{Document, Record, Status, Workload};

pub const GIB: f64 = (1u64 << 30) as f64;

/// The runs of neighbouring records that differ in precision alone, or come from several engines of one run: one table each.
pub fn cases(document: &Document) -> impl Iterator<Item = &[Record]> {
    document.records.chunk_by(|a, b| {
        a.model == b.model
            && a.weights.source == b.weights.source
            && a.device == b.device
            && a.workload == b.workload
            && (a.engine == b.engine || (a.command == b.command && a.timestamp == b.timestamp))
            && a.keep_fp16 == b.keep_fp16
            && a.environment.threads == b.environment.threads
    })
}

/// Model, device and workload in one line. `records` is one case, never empty.
pub fn title(records: &[Record]) -> String {
    let first = &records[0];
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
    records.iter().any(|record| record.engine != records[0].engine)
}

/// The precision, and the engine where a table has several: `fp16`, `fp16 by candle`.
pub fn label(record: &Record, records: &[Record]) -> String {
    if has_several_engines(records) { name(record) } else { plain(&record.precision) }
}

/// The same wherever the record stands: `fp16`, `fp16 by candle`.
pub fn name(record: &Record) -> String {
    let (precision, engine) = (plain(&record.precision), plain(&record.engine.name));
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
    if !environment.isa.is_empty() {
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

/// Each warning once, after the precisions that it holds for.
pub fn warnings(records: &[Record]) -> Vec<String> {
    let mut seen: Vec<(&str, Vec<String>)> = Vec::new();
    for record in records {
        let label = label(record, records);
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
}
