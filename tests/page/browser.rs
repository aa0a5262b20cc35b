//! The page in a real browser, as a reader uses it: values under a pointer, sorting, filtering, saving; and nothing that is cut off.

use std::fs;
use std::path::{Path, PathBuf};

use quantbench::record::{Document, Record, Status};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::devtools::{self, Browser};
use crate::{EXAMPLES, example, page, skips, twelve_cases};

/// A browser with a folder for pages, or `None` with a printed reason.
fn browser() -> Option<(Browser, TempDir)> {
    let Some(program) = devtools::find() else {
        skips::skip(format!("no headless browser in PATH; known are {}", devtools::BROWSERS.join(", ")));
        return None;
    };
    Some((Browser::start(&program), tempfile::tempdir().expect("a folder")))
}

fn write(folder: &TempDir, name: &str, document: &Document) -> PathBuf {
    let file = folder.path().join(format!("{name}.html"));
    fs::write(&file, page(document)).expect("write the page");
    file
}

/// Several cases that differ in what the tests filter and sort by: models, a failure, a disturbed row, energy, texts.
pub fn several_cases() -> Document {
    let mut document = example("two_cases");
    let mut others = example("with_quality").records;
    for record in &mut others {
        record.model.id = "another-model".into();
        record.output.text = Some(format!("A cat sat on the {}.", record.precision));
    }
    others[1].tainted = true;
    document.records.extend(others);
    document.records.extend(example("fp16_oom").records.into_iter().map(|mut record| {
        record.workload.n_prompt = 4096;
        record
    }));
    document
}

/// Words that stand before the left or behind the right end of their picture, above or below it.
const CUT: &str = "[...document.querySelectorAll('svg.chart')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text => { \
                   const a = svg.getBoundingClientRect(), b = text.getBoundingClientRect(); \
                   return b.left < a.left - 1 || b.right > a.right + 1 || b.top < a.top - 1 || b.bottom > a.bottom + 1; }) \
                   .map(text => svg.querySelector('title').textContent + ': ' + text.textContent))";

/// Pairs of words that overprint each other within a picture, by more than the ends of letters.
const OVERPRINTED: &str = "[...document.querySelectorAll('svg.chart')].flatMap(svg => { \
                           const all = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]); \
                           return all.flatMap(([x, a], at) => all.slice(at + 1).filter(([y, b]) => \
                           Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4) \
                           .map(([y]) => svg.querySelector('title').textContent + ': ' + x + ' | ' + y)); })";

/// Whether the page is wider than its window.
const TOO_WIDE: &str = "document.documentElement.scrollWidth - document.documentElement.clientWidth";

/// Columns of tables that begin behind the right end of a place that cannot be scrolled.
const HIDDEN_CELLS: &str = "[...document.querySelectorAll('article table, nav table')].filter(table => { \
                            const place = table.parentElement; return table.getBoundingClientRect().width > place.clientWidth + 1 && \
                            getComputedStyle(place).overflowX !== 'auto'; }).length";

/// Elements whose words have less than 3 to 1 of contrast to the ground.
const FAINT: &str = "(() => { const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255; \
                     return v > 0.03928 ? ((v + 0.055) / 1.055) ** 2.4 : v / 12.92; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }; \
                     const ground = lum(getComputedStyle(document.body).backgroundColor); \
                     return [...document.querySelectorAll('svg.chart text, td, th, p, dd, dt, li')].filter(e => { const style = getComputedStyle(e); \
                     const l = lum(e.namespaceURI.endsWith('svg') ? style.fill : style.color); \
                     return (Math.max(l, ground) + 0.05) / (Math.min(l, ground) + 0.05) < 3; }).map(e => e.textContent).slice(0, 5); })()";

#[test]
fn nothing_is_cut_off_at_any_width_in_any_theme() {
    let Some((mut browser, folder)) = browser() else { return };
    let mut documents: Vec<(&str, Document)> = EXAMPLES.iter().map(|name| (*name, example(name))).collect();
    documents.extend([("several", several_cases()), ("runs", seven_runs()), ("long", long_names())]);
    for (name, document) in documents {
        let file = write(&folder, name, &document);
        for (width, is_dark) in [(1200, false), (1200, true), (420, false), (420, true)] {
            browser.open(&file, width, is_dark);
            for (what, expression) in [("cut off", CUT), ("overprinted", OVERPRINTED), ("faint", FAINT)] {
                assert_eq!(browser.value(expression), json!([]), "{name} at {width}, dark {is_dark}: {what}");
            }
            for (what, expression) in [("too wide", TOO_WIDE), ("hidden cells", HIDDEN_CELLS)] {
                assert_eq!(browser.value(expression), 0, "{name} at {width}: {what}");
            }
            assert_eq!(browser.console(), Vec::<String>::new(), "{name} at {width}");
        }
    }
}

/// As many runs of one case as make a trend.
pub fn seven_runs() -> Document {
    let mut document = example("three_precisions");
    let records = std::mem::take(&mut document.records);
    for day in 1..=7 {
        let of_day = |mut record: Record| {
            record.timestamp = format!("2026-01-0{day}T00:00:00Z");
            record.engine.commit = format!("{day}{day}{day}{day}abc");
            if let Some(summary) = record.metrics.get_mut("decode_tps") {
                let factor = 1.0 + 0.02 * f64::from(day % 3);
                for value in [&mut summary.median, &mut summary.ci95_low, &mut summary.ci95_high] {
                    *value = value.map(|x| x * factor);
                }
            }
            record
        };
        document.records.extend(records.iter().cloned().map(of_day));
    }
    document
}

/// Names and numbers that have no room beside their bars.
fn long_names() -> Document {
    let mut document = example("with_quality");
    for (at, record) in document.records.iter_mut().enumerate() {
        record.engine.name = "an-engine-with-a-long-name".into();
        record.precision = format!("precision-number-{at}-of-some-tool");
        record.samples.end_to_end_ns.iter_mut().for_each(|ns| *ns *= 1000);
        record.model.id = "an-organisation-with-a-name/and-a-model-whose-name-has-no-end-either".into();
        if let Some(summary) = record.metrics.get_mut("decode_tps") {
            (summary.median, summary.ci95_low, summary.ci95_high) = (Some(1234.5), Some(123.4), Some(98765.4));
        }
    }
    document
}

fn texts(browser: &mut Browser, selector: &str) -> Vec<String> {
    let found = browser.value(&format!(
        "[...document.querySelectorAll({selector:?})].filter(e => e.offsetParent !== null).map(e => e.textContent)"
    ));
    found.as_array().expect("a list").iter().map(|text| text.as_str().expect("a text").to_owned()).collect()
}

const NAMES: &str = ".overview tbody td[data-k=precision]";

#[test]
fn a_pointer_shows_values() {
    let Some((mut browser, folder)) = browser() else { return };
    browser.open(&write(&folder, "page", &example("with_quality")), 1200, false);
    assert_eq!(browser.value("document.getElementById('tip').hidden"), true);
    browser.hover(".speed .mark rect");
    let said = browser.value("document.getElementById('tip').textContent");
    assert!(said.as_str().is_some_and(|said| said.starts_with("fp16: ") && said.ends_with(" tokens/s")), "{said}");
    browser.hover(".trade .mark circle");
    assert!(browser.value("document.getElementById('tip').textContent").as_str().unwrap().contains("GiB"));
    browser.hover("h1");
    assert_eq!(browser.value("document.getElementById('tip').hidden"), true);
    // The numbers behind a chart open over the page.
    let shown = "getComputedStyle(document.querySelector('.speed [popover]')).display";
    assert_eq!(browser.value(shown), "none");
    browser.click(".speed button");
    assert_eq!(browser.value(shown), "block");
    assert_eq!(browser.console(), Vec::<String>::new());
}

#[test]
fn rows_are_sorted_by_a_click() {
    let Some((mut browser, folder)) = browser() else { return };
    browser.open(&write(&folder, "page", &several_cases()), 1200, false);
    let before = texts(&mut browser, NAMES);
    let decode = |browser: &mut Browser| {
        let shown = texts(browser, ".overview tbody td[data-k=decode]");
        shown.iter().map(|text| text.parse::<f64>().expect("a number")).collect::<Vec<_>>()
    };
    let head = ".overview [data-sort=decode]";
    browser.click(head);
    let fastest_first = decode(&mut browser);
    assert!(fastest_first.is_sorted_by(|a, b| a >= b) && fastest_first.len() > 6, "{fastest_first:?}");
    // What failed has no speed and comes last.
    let last = texts(&mut browser, ".overview tbody tr:last-child .reason");
    assert!(last.len() == 1 && last[0].starts_with("oom"), "{last:?}");
    // Rows of one case that no longer stand together name it each.
    let unnamed = browser.value(
        "[...document.querySelectorAll('.overview tbody tr.again')].filter(r => r.previousElementSibling.dataset.case !== r.dataset.case).length",
    );
    assert_eq!(unnamed, 0);
    browser.click(head);
    assert!(decode(&mut browser).is_sorted(), "{:?}", decode(&mut browser));
    let last = texts(&mut browser, ".overview tbody tr:last-child .reason");
    assert_eq!(last.len(), 1);
    browser.click(head);
    assert_eq!(texts(&mut browser, NAMES), before);
    browser.click(".overview [data-sort=precision]");
    assert!(texts(&mut browser, NAMES).is_sorted());
    assert_eq!(browser.value("document.querySelector('.overview th[aria-sort]').textContent"), "precision");
    assert_eq!(browser.console(), Vec::<String>::new());
}

#[test]
fn rows_and_cases_are_filtered() {
    let Some((mut browser, folder)) = browser() else { return };
    let document = several_cases();
    browser.open(&write(&folder, "page", &document), 1200, false);
    let n_rows = document.records.len();
    let shown = |browser: &mut Browser| browser.value("document.getElementById('shown').textContent");
    let articles = |browser: &mut Browser| texts(browser, "article h2").len();
    assert_eq!(shown(&mut browser), format!("{n_rows} of {n_rows} rows"));
    let all = articles(&mut browser);
    browser.type_into("#filter", "another NF4");
    assert_eq!(texts(&mut browser, NAMES), ["nf4"]);
    assert_eq!((shown(&mut browser), articles(&mut browser)), (json!(format!("1 of {n_rows} rows")), 1));
    // The one row that is left names its case.
    assert_eq!(texts(&mut browser, ".overview tbody a"), ["another-model"]);
    browser.type_into("#filter", "oom");
    let failed = document.records.iter().filter(|record| record.status == Status::Oom).count();
    assert_eq!(texts(&mut browser, NAMES).len(), failed);
    browser.type_into("#filter", "");
    assert_eq!(articles(&mut browser), all);
    browser.click(".chips input[value=fp16]");
    let left = texts(&mut browser, NAMES);
    assert!(!left.is_empty() && left.iter().all(|name| !name.starts_with("fp16")), "{left:?}");
    // A link to a case that is hidden shows it again.
    browser.type_into("#filter", "another");
    browser.value("location.hash = '#case-1'");
    assert_eq!(texts(&mut browser, "#case-1 h2").len(), 1);
    assert_eq!(browser.console(), Vec::<String>::new());
}

/// Precisions of the rows that no other row of `records` is as small and as fast as.
fn unbeaten<'a>(records: impl Iterator<Item = &'a Record> + Clone) -> Vec<String> {
    let value = |record: &Record| {
        let tps = record.metrics.get("decode_tps")?.median.filter(|_| record.status == Status::Ok)?;
        Some((record.memory.peak_bytes?, tps))
    };
    let is_beaten = |(bytes, tps): (u64, f64)| {
        let mut others = records.clone().filter_map(value);
        others.any(|(b, t)| b <= bytes && t >= tps && (b, t) != (bytes, tps))
    };
    let best = records.clone().filter_map(|record| Some((record, value(record).filter(|pair| !is_beaten(*pair))?)));
    let mut best: Vec<(u64, String)> = best.map(|(record, (bytes, _))| (bytes, record.precision.clone())).collect();
    // The page draws a place once.
    best.sort();
    best.dedup_by_key(|(bytes, _)| *bytes);
    let mut names: Vec<String> = best.into_iter().map(|(_, name)| name).collect();
    names.sort();
    names
}

#[test]
fn the_pareto_line_over_all_cases_follows_the_filter() {
    let Some((mut browser, folder)) = browser() else { return };
    let document = several_cases();
    browser.open(&write(&folder, "page", &document), 1200, false);
    let on_line = |browser: &mut Browser| {
        let mut names = texts(browser, ".front tbody tr td:nth-child(2)");
        names.sort();
        names
    };
    let line = "document.querySelector('figure.all polyline[stroke-dasharray]').getAttribute('points')";
    let dots = "[...document.querySelectorAll('figure.all .mark')].filter(mark => getComputedStyle(mark).display !== 'none').length";
    let (all, drawn) = (document.records.iter(), browser.value(line));
    let n_ok = all.clone().filter(|record| record.status == Status::Ok).count();
    assert_eq!((on_line(&mut browser), browser.value(dots)), (unbeaten(all.clone()), json!(n_ok)));
    browser.type_into("#filter", "another");
    let others = || all.clone().filter(|record| record.model.id == "another-model");
    assert_eq!((on_line(&mut browser), browser.value(dots)), (unbeaten(others()), json!(others().count())));
    browser.click(".chips input[value=nf4]");
    let without = || others().filter(|record| record.precision != "nf4");
    assert_eq!(on_line(&mut browser), unbeaten(without()));
    assert_ne!(browser.value(line), drawn);
    browser.type_into("#filter", "no such row");
    assert_eq!((on_line(&mut browser).len(), browser.value(dots)), (0, json!(0)));
    browser.type_into("#filter", "");
    browser.click(".chips input[value=nf4]");
    assert_eq!((on_line(&mut browser), browser.value(line)), (unbeaten(all), drawn));
    browser.hover("figure.all .mark circle");
    assert!(browser.value("document.getElementById('tip').textContent").as_str().unwrap().contains(" tokens/s, "));
    assert_eq!(browser.console(), Vec::<String>::new());
}

#[test]
fn data_can_be_saved() {
    let Some((mut browser, folder)) = browser() else { return };
    let document = several_cases();
    browser.open(&write(&folder, "page", &document), 1200, false);
    let saved: Value = serde_json::from_str(&browser.saved("#save-json")).expect("JSON");
    assert_eq!(serde_json::from_value::<Document>(saved).expect("a document"), document);
    browser.type_into("#filter", "another nf4");
    let csv = browser.saved("#save-csv");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 2, "{csv}");
    assert!(lines[0].starts_with("case,precision,\"decode, tokens/s\""), "{csv}");
    assert!(lines[1].contains("another-model") && lines[1].contains(",nf4,"), "{csv}");
}

/// Writes docs/report-*.png anew from the page `QUANTBENCH_PAGE`, or of the examples into a folder for a look at them.
#[test]
#[ignore = "writes pictures: QUANTBENCH_PAGE=report.html QUANTBENCH_PICTURES=docs cargo test --test page pictures_of_the_page -- --ignored"]
fn pictures_of_the_page() {
    let (mut browser, folder) = browser().expect("a browser");
    let into = std::env::var("QUANTBENCH_PICTURES").expect("QUANTBENCH_PICTURES");
    let pages: Vec<(String, PathBuf)> = match std::env::var("QUANTBENCH_PAGE") {
        Ok(page) => vec![("report".into(), fs::canonicalize(page).expect("the page"))],
        Err(_) => {
            let own = [
                ("several", several_cases()),
                ("runs", seven_runs()),
                ("long", long_names()),
                ("twelve", twelve_cases()),
            ];
            let examples = EXAMPLES.iter().map(|name| (*name, example(name)));
            examples.chain(own).map(|(name, document)| (name.to_owned(), write(&folder, name, &document))).collect()
        }
    };
    for (name, page) in pages {
        for (width, is_dark) in [(1200, false), (1200, true), (420, false), (420, true)] {
            browser.open(&page, width, is_dark);
            let picture = format!("{name}-{width}{}.png", if is_dark { "-dark" } else { "" });
            fs::write(Path::new(&into).join(picture), browser.picture()).expect("write the picture");
        }
    }
}
