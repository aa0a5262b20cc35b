//! The HTML report: whole in itself, small, readable without colour or sight, and without an error in a browser.

mod browser;
mod devtools;
#[path = "../skips/mod.rs"]
mod skips;

use std::fs;

use quantbench::record::{Document, Status};
use quantbench::report::{self, Options};

const EXAMPLES: &[&str] = &[
    "three_precisions",
    "with_quality",
    "fp16_oom",
    "two_cases",
    "quality_alone",
    "one_new_token",
    "tainted",
    "two_runs",
];

fn example(name: &str) -> Document {
    let path = format!("{}/tests/golden/records/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).expect("read an example")).expect("parse an example")
}

fn page(document: &Document) -> String {
    (report::find("html").expect("a writer").write)(document, &Options::default()).expect("write")
}

/// 12 cases of three precisions with as many samples as a run takes.
fn twelve_cases() -> Document {
    let Document { schema_version, records: case } = example("three_precisions");
    let mut records = Vec::new();
    for (n, mut record) in (0..12).flat_map(|n| case.iter().cloned().map(move |record| (n, record))) {
        record.workload.n_depth = 512 * n;
        let steps = (0..60).map(|at| vec![20_000_000 + 137_000 * ((at * 7919) % 97); 64]);
        record.samples.decode_step_ns.extend(steps);
        records.push(record);
    }
    Document { schema_version, records }
}

/// Elements that have no end tag.
const VOID: &[&str] = &["meta", "link", "input", "rect", "line", "circle", "polygon", "polyline", "path", "!doctype"];

/// Names of elements that were opened and not closed where they had to be.
fn unbalanced(html: &str) -> Vec<String> {
    let (mut open, mut wrong) = (Vec::new(), Vec::new());
    // A script is no markup up to its end tag.
    let html: String =
        html.split("<script").map(|part| part.split_once("</script>").map_or(part, |(_, rest)| rest)).collect();
    for tag in html.split('<').skip(1).filter_map(|rest| rest.split('>').next()) {
        let name =
            tag.trim_start_matches('/').split([' ', '\n']).next().unwrap_or_default().trim_end_matches('/').to_owned();
        match tag {
            tag if tag.starts_with('/') => {
                let opened = open.pop();
                if opened.as_deref() != Some(name.as_str()) {
                    wrong.push(format!("</{name}> after <{}>", opened.unwrap_or_default()));
                }
            }
            tag if tag.ends_with('/') || VOID.contains(&name.to_lowercase().as_str()) => {}
            _ => open.push(name),
        }
    }
    wrong.extend(open);
    wrong
}

#[test]
fn pages_are_whole_in_themselves() {
    for name in EXAMPLES {
        let html = page(&example(name));
        assert_eq!(unbalanced(&html), Vec::<String>::new(), "{name}");
        for word in ["http:", "https:", "src=", "@import", "url(", "fetch(", "XMLHttp"] {
            assert!(!html.contains(word), "{name}: `{word}`");
        }
        assert_eq!(html.matches("<script").count(), 2, "{name}: the data and the script");
        assert!(!html.contains("NaN") && !html.contains("inf\""), "{name}");
    }
}

#[test]
fn every_chart_has_words_and_numbers() {
    for name in EXAMPLES {
        let html = page(&example(name));
        let charts = html.matches("<svg").count();
        for mark in ["role=\"img\"", "<title id=", "<desc id=", "<figure", ">Numbers</button>", "<div popover id="] {
            assert_eq!(html.matches(mark).count(), charts, "{name}: {mark}");
        }
        let mut ids: Vec<&str> = html.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        let n = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), n, "{name}: an id stands twice");
    }
    let html = page(&example("with_quality"));
    for title in [
        "Decode speed, tokens/s",
        "Speed against memory",
        "Time to first token, ms",
        "Prompt speed, tokens/s",
        "Latency, end to end, s",
        "KL divergence, nats/token",
        "Peak memory by part, GiB",
        "Latency per token over the repeats, ms",
        "Time of a decode step, ms",
        "Bandwidth of decoding, GB/s",
        "To repeat it",
    ] {
        assert!(html.contains(&format!("<h3>{title}</h3>")), "{title}");
    }
}

#[test]
fn engines_of_one_run_are_told_apart() {
    let mut document = example("three_precisions");
    let mut other = document.records[0].clone();
    other.engine.name = "candle".into();
    other.dtypes.weights = other.precision.clone();
    document.records.push(other);
    let html = page(&document);
    // In the table, and in every chart and the numbers behind it.
    assert!(html.matches("fp16 by candle").count() > 7, "{}", html.matches("fp16 by candle").count());
    assert_eq!(html.matches("<article").count(), 1);
}

#[test]
fn runs_of_one_model_are_told_apart() {
    let html = page(&example("two_runs"));
    assert_eq!((html.matches("<article").count(), html.matches("class=\"verdict\"").count()), (1, 2));
    // In the table's rows and in the charts; no two names are the same.
    for name in [
        "nf4 · #1",
        "nf4 · #2",
        "#2 2026-01-02T00:00:00Z, fedcba9",
        "<h3>Environment of #1 2026-01-01T00:00:00Z, 0123abc</h3>",
    ] {
        assert!(html.contains(name), "{name}");
    }
    assert!(
        html.contains("title=\"#2 2026-01-02T00:00:00Z, fedcba9\">#2</td>") && !html.contains("nf4 and nf4"),
        "{html}"
    );
}

#[test]
fn what_was_disturbed_is_marked() {
    let html = page(&example("tainted"));
    assert!(
        html.contains("<th scope=\"row\">nf4<abbr class=\"badge\"")
            && html.contains("* other programs or the state of the machine affected this measurement"),
        "{html}"
    );
    let shown = html.split("<script").next().expect("the page before its script");
    assert!(shown.contains("<code>--threads</code>") && !shown.contains('`'), "{shown}");
    assert!(!page(&example("three_precisions")).contains("affected this measurement"));
}

#[test]
fn several_cases_share_a_chart_of_speed_against_memory() {
    let several = page(&browser::several_cases());
    for words in ["<h3>Speed against memory, all cases</h3>", "<h3>On the Pareto line</h3>", "<p class=\"legend\">"] {
        assert_eq!(several.matches(words).count(), 1, "{words}");
        assert!(!page(&example("three_precisions")).contains(words), "{words}");
    }
    // Without the script, too, only rows on the line stand beside it.
    let front = several
        .split("<table class=\"front\">")
        .nth(1)
        .and_then(|rest| rest.split("</table>").next())
        .expect("a table");
    let (shown, hidden) = (front.matches("<tr><td").count(), front.matches("<tr hidden><td").count());
    assert!(shown > 0 && hidden > 0 && shown + hidden == several.matches(" data-dot=\"").count(), "{front}");
}

#[test]
fn a_chart_is_there_only_where_it_has_data() {
    let (with, without) = (page(&example("with_quality")), page(&example("three_precisions")));
    assert!(with.contains("class=\"divergence\"") && !without.contains("class=\"divergence\""));
    assert!(!with.contains("class=\"energy\""));
    let mut document = example("three_precisions");
    for record in &mut document.records {
        let summary = record.metrics["decode_tps"].clone();
        record.metrics.insert("joules_per_token".into(), summary);
    }
    assert!(page(&document).contains("<h3>Energy, J/token</h3>"));
    // Parts sum up to the peak: the chart of the peak alone is for records without parts.
    assert!(!without.contains("class=\"peak-memory\""));
    document.records.iter_mut().for_each(|record| record.memory.kv_cache_bytes = None);
    assert!(page(&document).contains("class=\"peak-memory\""));
}

#[test]
fn later_runs_show_what_they_changed() {
    let html = page(&example("two_runs"));
    assert_eq!(html.matches("<section class=\"changes\">").count(), 1, "{html}");
    let changes = html.split("<section class=\"changes\">").nth(1).and_then(|rest| rest.split("</section>").next());
    let changes = changes.expect("the changes");
    assert!(
        changes.contains("<h3>#1 2026-01-01T00:00:00Z, 0123abc → #2 2026-01-02T00:00:00Z, fedcba9</h3>"),
        "{changes}"
    );
    for word in ["decode<small>tokens/s</small>", "TTFT<small>ms</small>", "peak<small>GiB</small>", " %]</td>"] {
        assert!(changes.contains(word), "{word}: {changes}");
    }
    assert!(!page(&example("three_precisions")).contains("<section class=\"changes\">"));
}

#[test]
fn many_runs_make_a_trend_and_charts_of_the_newest() {
    let html = page(&browser::seven_runs());
    assert!(html.contains("<h3>Decode speed over the runs, tokens/s</h3>"));
    assert!(html.contains("7 runs in order of time, from 2026-01-01 to 2026-01-07"));
    assert!(html.contains("The newest of 7 runs; the trend shows all of them."));
    // One verdict, one environment and three rows: those of the newest.
    assert_eq!((html.matches("class=\"verdict\"").count(), html.matches("<h3>Environment").count()), (1, 1));
    assert!(html.contains("<p class=\"verdict\">#7 2026-01-07T00:00:00Z, 7777abc: "), "{html}");
    assert_eq!(html.matches("<tr><th scope=\"row\">").count(), 3);
    // Three bars and not 21, and one table of changes, from the first to the newest.
    let speed = html.split("<figure class=\"speed\">").nth(1).and_then(|rest| rest.split("</svg>").next());
    assert_eq!(speed.expect("a chart").matches("<rect").count(), 3);
    assert_eq!(html.matches("<section class=\"changes\">").count(), 1);
    assert!(!page(&example("two_runs")).contains("class=\"trend\""));
}

#[test]
fn texts_stand_side_by_side() {
    let mut document = example("three_precisions");
    for (record, text) in document.records.iter_mut().zip(["A cat\nsat.", "A cat\nsat.", "A c<b>ow</b>"]) {
        record.output.text = Some(text.into());
    }
    let html = page(&document);
    assert!(
        html.contains("<h4>fp16</h4><p>A cat\nsat.</p>") && html.contains("<h4>int8</h4><p>A cat\nsat.</p>"),
        "{html}"
    );
    assert!(html.contains("<h4>nf4</h4><p>A c<mark>&lt;b&gt;ow&lt;/b&gt;</mark></p>"), "{html}");
    assert!(html.contains("Marked from where it departs from fp16."));
    document.records[2].output.text = document.records[0].output.text.clone();
    assert!(page(&document).contains("All wrote the same."));
    assert!(!page(&example("three_precisions")).contains("Generated text"));
}

#[test]
fn names_from_outside_are_text() {
    let mut document = example("three_precisions");
    for record in &mut document.records {
        record.model.id = "<script>alert(1)</script>&\"'".into();
        record.precision = "<b>".into();
        record.warnings = vec!["<img src=x onerror=alert(1)>".into()];
        record.command = "quantbench '</code><script>'".into();
    }
    document.records[1].status = Status::Error;
    document.records[1].reason = Some("<i>why</i>".into());
    let html = page(&document);
    assert_eq!(unbalanced(&html), Vec::<String>::new());
    for word in ["<b>", "<img", "<i>"] {
        assert!(!html.contains(word), "{word}");
    }
    assert_eq!(html.matches("<script").count(), 2);
    for (_, svg) in report::pictures(&document) {
        assert!(!svg.contains("<b>"), "{svg}");
    }
}

#[test]
fn the_page_of_twelve_cases_is_little_more_than_its_data() {
    let document = twelve_cases();
    let html = page(&document);
    let data = serde_json::to_string(&document).expect("JSON").len();
    assert!(html.len() - data < 1 << 20, "{} bytes beside {data} of data", html.len() - data);
    assert_eq!(html.matches("<article").count(), 12);
    assert_eq!(html.matches("<tr data-case=").count() + html.matches("<tr class=\"again\" data-case=").count(), 36);
}

#[test]
fn pictures_stand_alone() {
    let pictures = report::pictures(&example("two_cases"));
    let mut names: Vec<_> = pictures.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), pictures.len());
    for (name, svg) in &pictures {
        assert!(name.ends_with(".svg") && !name.contains(['/', ' ']), "{name}");
        assert!(svg.starts_with("<svg") && !svg.contains("var(") && svg.contains("<desc id="), "{name}");
        assert_eq!(unbalanced(svg), Vec::<String>::new(), "{name}");
    }
}
