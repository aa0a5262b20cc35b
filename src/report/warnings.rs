//! Warnings for people, grouped: one line for each kind, the worst first, and not too many.

use super::case::{Case, plain};

/// Lines before the rest is only counted.
const MOST: usize = 5;

/// From bad to harmless: what makes numbers wrong, what disturbed them, how sure they are, what they mean. A kind that is not here stands
/// behind those that made numbers wrong.
const ORDER: &[&str] = &[
    "logits_not_saved",
    "debug_build",
    "tokens_differ",
    "engines_disagree",
    "fp16_overflow",
    UNKNOWN,
    "gpu_throttled",
    "low_clock",
    "cpu_throttled",
    "gpu_shared",
    "busy_cpus",
    "too_many_threads",
    "powersave_governor",
    "on_battery",
    "slow_read",
    "few_repeats",
    "warmup_not_flat",
    "wide_interval",
    "outliers",
    "unpaired_ratios",
    "ran_alone",
    "no_gpu",
    "unequal_lengths",
    "end_of_text",
    "no_quality",
    "few_launches",
    "sync_differs",
    "discarded",
    "shortened",
    "cache-resident",
    "peak_not_exact",
];

/// The place of kinds that [`ORDER`] does not name.
const UNKNOWN: &str = "";

/// Kinds in few words, where the numbers of each row differ and add little.
const SHORT: &[(&str, &str)] = &[
    (
        "cache-resident",
        "part of the weights stays in the CPU cache, so the share of memory bandwidth means little; measure a larger model",
    ),
    ("outliers", "some repeats are far from the median; something else ran now and then"),
];

/// Kinds that a busy machine causes: they need no line of their own beside that warning.
const CAUSED: &[&str] = &["wide_interval", "outliers", "warmup_not_flat"];

/// Warnings of one kind.
struct Group {
    name: String,
    message: String,
    labels: Vec<String>,
}

/// A line for each kind of warning with the precisions that it is about, and a last one that counts the others.
pub fn grouped(case: &Case) -> Vec<String> {
    let n_rows = case.rows().count();
    let mut groups = groups(case);
    groups.sort_by_key(|group| rank(&group.name));
    join_what_was_caused(&mut groups);
    let left = groups.len().saturating_sub(MOST);
    // One more line is no longer than the one that counts it.
    let shown = if left > 1 { MOST } else { groups.len() };
    let line = |group: &Group| {
        let labels =
            if group.labels.len() == n_rows && n_rows > 1 { "all".to_owned() } else { group.labels.join(", ") };
        let name = if group.name == UNKNOWN { String::new() } else { format!("{}: ", group.name) };
        plain(&format!("{labels}: {name}{}", group.message))
    };
    let rest = (groups.len() > shown).then(|| format!("… and {} more (`--warnings`)", groups.len() - shown));
    groups.iter().take(shown).map(line).chain(rest).collect()
}

fn groups(case: &Case) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (run, record) in case.rows() {
        let label = case.label(run, record);
        for text in &record.warnings {
            let (name, message) = text.split_once(": ").unwrap_or((UNKNOWN, text));
            // Two models' warnings of one kind may say different things.
            let is_same =
                |group: &&mut Group| group.name == name && (rank(name) != rank(UNKNOWN) || group.message == message);
            match groups.iter_mut().find(is_same) {
                Some(group) if group.labels.contains(&label) => {}
                Some(group) => group.labels.push(label.clone()),
                None => groups.push(Group {
                    name: name.to_owned(),
                    message: short(name).unwrap_or(message).to_owned(),
                    labels: vec![label.clone()],
                }),
            }
        }
    }
    groups
}

fn rank(name: &str) -> usize {
    let at = |name: &str| ORDER.iter().position(|known| *known == name);
    at(name).or_else(|| at(UNKNOWN)).unwrap_or_default()
}

fn short(name: &str) -> Option<&'static str> {
    SHORT.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// One line for a cause and its effects: a busy machine makes intervals wide, and so do outliers.
fn join_what_was_caused(groups: &mut Vec<Group>) {
    for cause in ["busy_cpus", "wide_interval"] {
        let Some(at) = groups.iter().position(|group| group.name == cause) else { continue };
        let labels = groups[at].labels.clone();
        let is_effect = |group: &Group| {
            let is_later = rank(&group.name) > rank(cause);
            let is_known = CAUSED.contains(&group.name.as_str()) && group.name != cause;
            is_later && is_known && group.labels.iter().all(|label| labels.contains(label))
        };
        let effects: Vec<String> =
            groups.iter().filter(|group| is_effect(group)).map(|group| group.name.clone()).collect();
        if !effects.is_empty() {
            groups[at].message += &format!(" (with it: {})", effects.join(", "));
            groups.retain(|group| !is_effect(group));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Document;
    use crate::report::case;

    fn of(warnings: &[&[&str]]) -> Vec<String> {
        let text = include_str!("../../tests/golden/records/three_precisions.json");
        let mut document: Document = serde_json::from_str(text).expect("an example");
        for (record, warnings) in document.records.iter_mut().zip(warnings) {
            record.warnings = warnings.iter().map(|text| (*text).to_owned()).collect();
        }
        grouped(&case::cases(&document)[0])
    }

    #[test]
    fn one_line_a_kind_the_worst_first() {
        let cache = |mib: u32| format!("cache-resident: a step reads {mib} MiB");
        let (a, b, c) = (cache(1), cache(2), cache(3));
        let seen = of(&[&[&a, "debug_build: measure with --release"], &[&b], &[&c, "few_repeats: 2 repeats"]]);
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0], "fp16: debug_build: measure with --release");
        assert_eq!(seen[1], "nf4: few_repeats: 2 repeats");
        assert!(seen[2].starts_with("all: cache-resident: part of the weights"), "{seen:?}");
    }

    #[test]
    fn what_a_busy_machine_causes_is_one_line() {
        let busy = "busy_cpus: other processes kept 1.2 of 2 CPUs busy";
        let seen = of(&[&[busy, "outliers: 1 of 6", "wide_interval: 9 %"], &[busy, "wide_interval: 8 %"], &[busy]]);
        assert_eq!(seen, [format!("all: {busy} (with it: wide_interval, outliers)")]);
        let alone = of(&[&["outliers: 1 of 6", "wide_interval: 9 %"], &[], &[]]);
        assert_eq!(alone, ["fp16: wide_interval: 9 % (with it: outliers)"]);
        let apart = of(&[&["outliers: 1 of 6"], &["wide_interval: 9 %"], &[]]);
        assert_eq!(apart.len(), 2);
    }

    #[test]
    fn five_are_shown_and_the_others_counted() {
        let names = ["slow_read", "few_repeats", "ran_alone", "end_of_text", "discarded", "on_battery", "new_kind"];
        let warnings: Vec<String> = names.iter().map(|name| format!("{name}: x")).collect();
        let warnings: Vec<&str> = warnings.iter().map(String::as_str).collect();
        let seen = of(&[&warnings, &[], &[]]);
        assert_eq!(seen.len(), 6);
        assert_eq!(seen[5], "… and 2 more (`--warnings`)");
        assert_eq!(seen[0], "fp16: new_kind: x");
        assert_eq!(of(&[&warnings[..6], &[], &[]]).len(), 6, "a sixth is shown rather than counted");
    }
}
