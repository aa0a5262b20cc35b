//! The HTML report: whole in itself, small, readable without colour or sight, and without an error in a browser.

mod skips;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

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
const VOID: &[&str] = &["meta", "link", "rect", "line", "circle", "polygon", "polyline", "path", "!doctype"];

/// Names of elements that were opened and not closed where they had to be.
fn unbalanced(html: &str) -> Vec<String> {
    let (mut open, mut wrong) = (Vec::new(), Vec::new());
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
        for word in ["http:", "https:", "src=", "@import", "url(", "<script"] {
            assert!(!html.contains(word), "{name}: `{word}`");
        }
        assert!(!html.contains("NaN") && !html.contains("inf\""), "{name}");
    }
}

#[test]
fn every_chart_has_words_and_numbers() {
    for name in EXAMPLES {
        let html = page(&example(name));
        let charts = html.matches("<svg").count();
        for mark in ["role=\"img\"", "<title id=", "<desc id=", "<figure", "<summary>Numbers</summary>"] {
            assert_eq!(html.matches(mark).count(), charts, "{name}: {mark}");
        }
        let mut ids: Vec<&str> = html.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        let n = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), n, "{name}: an id stands twice");
    }
    let html = page(&example("with_quality"));
    for title in ["Latency, end to end, s", "Decode speed, tokens/s", "Peak memory, GiB", "Speed, memory and quality"] {
        assert!(html.contains(title), "{title}");
    }
    for title in
        ["Time of a decode step, ms", "Bandwidth of decoding, GB/s", "What the memory holds, GiB", "To repeat it"]
    {
        assert!(html.contains(title), "{title}");
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
    assert!(html.contains("change<small>of decode</small>") && !html.contains("nf4 and nf4"), "{html}");
}

#[test]
fn what_was_disturbed_is_marked() {
    let html = page(&example("tainted"));
    assert!(
        html.contains("<th scope=\"row\">nf4*</th>") && html.contains("* something disturbed this measurement"),
        "{html}"
    );
    assert!(html.contains("<code>--threads</code>") && !html.contains('`'), "{html}");
    assert!(!page(&example("three_precisions")).contains("something disturbed"));
}

#[test]
fn a_chart_of_quality_is_one_only_where_it_was_measured() {
    let (with, without) = (page(&example("with_quality")), page(&example("three_precisions")));
    assert!(with.contains("<h3>Speed, memory and quality: a larger point departs more from the reference</h3>"));
    assert!(without.contains("<h3>Speed and memory</h3>") && !without.contains("Speed, memory and quality"));
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
    for word in ["<script", "<b>", "<img", "<i>"] {
        assert!(!html.contains(word), "{word}");
    }
    for (_, svg) in report::pictures(&document).expect("charts") {
        assert!(!svg.contains("<b>"), "{svg}");
    }
}

#[test]
fn twelve_cases_are_below_a_megabyte() {
    let html = page(&twelve_cases());
    assert!(html.len() < 1 << 20, "{} bytes", html.len());
    assert_eq!(html.matches("<article").count(), 12);
    assert_eq!(html.matches("<a href=\"#case-").count(), 12);
}

#[test]
fn pictures_stand_alone() {
    let pictures = report::pictures(&example("two_cases")).expect("charts");
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

/// The browsers that this knows how to ask, by the names that distributions give them.
const BROWSERS: &[&str] = &[
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome-headless-shell",
];

fn browser() -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    let folders: Vec<PathBuf> = env::split_paths(&folders).collect();
    BROWSERS.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|path| path.is_file())
}

/// Opens `file` as a user would and gives what the browser's console said.
fn open(browser: &Path, file: &Path, width: u32, picture: &Path) -> String {
    let mut command = Command::new(browser);
    command.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
    ]);
    command.arg(format!("--user-data-dir={}", picture.with_extension("profile").display()));
    command.arg(format!("--window-size={width},1600")).arg(format!("--screenshot={}", picture.display()));
    let output = command.arg(format!("file://{}", file.display())).output().expect("start the browser");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_browser_shows_it_without_an_error() {
    let Some(browser) = browser() else {
        return skips::skip(format!("no headless browser in PATH; known are {}", BROWSERS.join(", ")));
    };
    let folder = tempfile::tempdir().expect("a folder");
    for (name, document) in [("one", example("with_quality")), ("twelve", twelve_cases())] {
        let file = folder.path().join(format!("{name}.html"));
        fs::write(&file, page(&document)).expect("write the page");
        for width in [1200, 500] {
            let picture = folder.path().join(format!("{name}-{width}.png"));
            let said = open(&browser, &file, width, &picture);
            let console: Vec<_> = said.lines().filter(|line| line.contains("CONSOLE")).collect();
            assert!(console.is_empty(), "{name} at {width}: {console:?}");
            let png = fs::read(&picture).unwrap_or_else(|error| panic!("no picture of {name}: {error}\n{said}"));
            // The PNG header holds the width in bytes 16 to 19; a blank page of this size compresses to some 8 KB.
            assert_eq!(png.get(16..20), Some(&width.to_be_bytes()[..]), "{name}");
            assert!(png.len() > 20_000, "{name} at {width}: {} bytes look blank", png.len());
        }
    }
}
