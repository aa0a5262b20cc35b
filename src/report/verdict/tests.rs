//! Every sentence that a verdict can make, from scripted records.

use super::*;
use crate::record::{Document, Ratio, Summary};

const SCOPE: &str = " (batch 1, 8+5 tokens, random weights)";

type Interval = Option<(f64, f64)>;

fn example(name: &str) -> Vec<Record> {
    let path = format!("{}/tests/golden/records/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("an example");
    serde_json::from_str::<Document>(&text).expect("an example record").records
}

/// fp16 at 20 tokens/s with int8 and nf4, whose ratios to fp16 have these intervals and no memory is known.
fn records(int8: Interval, nf4: Interval) -> Vec<Record> {
    let mut records = example("three_precisions");
    for (record, interval) in records[1..].iter_mut().zip([int8, nf4]) {
        record.ratio_to_fp16 = Some(Ratio {
            median: interval.map_or(2.0, |(low, high)| (low + high) / 2.0),
            ci95_low: interval.map(|i| i.0),
            ci95_high: interval.map(|i| i.1),
            paired: true,
            by_bytes: 2.0,
        });
    }
    records.iter_mut().for_each(|record| record.memory.peak_bytes = None);
    records
}

/// The verdict on `records` after `change`.
fn said(mut records: Vec<Record>, change: impl Fn(&mut [Record])) -> String {
    change(&mut records);
    verdict(&records, None)
}

#[test]
fn a_claim_goes_as_far_as_the_intervals_and_names_every_row() {
    let cases: &[(Interval, Interval, &str)] = &[
        (
            Some((1.5, 1.7)),
            Some((1.9, 2.1)),
            "nf4 decodes fastest: 2.00x fp16 [1.90, 2.10]; int8 decodes 1.60x fp16 [1.50, 1.70]",
        ),
        (
            Some((1.5, 1.9)),
            Some((1.8, 2.0)),
            "int8 and nf4 decode faster than fp16, can't tell which of the two is faster: int8 1.70x fp16 [1.50, 1.90], \
             nf4 1.90x fp16 [1.80, 2.00]",
        ),
        // As fast as nf4 or slower than fp16: nobody knows.
        (
            Some((0.74, 2.64)),
            Some((1.8, 2.0)),
            "nf4 decodes faster than fp16: 1.90x fp16 [1.80, 2.00]; int8: can't tell, 0.74x to 2.64x",
        ),
        // What cannot rival the best leaves it the first place.
        (
            Some((0.8, 1.2)),
            Some((1.8, 2.0)),
            "nf4 decodes fastest: 1.90x fp16 [1.80, 2.00]; int8: can't tell, 0.80x to 1.20x",
        ),
        (
            Some((0.96, 1.04)),
            Some((1.8, 2.0)),
            "nf4 decodes fastest: 1.90x fp16 [1.80, 2.00]; int8: no difference within 5 %, 0.96x to 1.04x fp16",
        ),
        (
            Some((0.4, 0.6)),
            Some((1.8, 2.0)),
            "nf4 decodes fastest: 1.90x fp16 [1.80, 2.00]; int8 is slower: 0.50x fp16 [0.40, 0.60]",
        ),
        (
            None,
            Some((1.8, 2.0)),
            "nf4 decodes faster than fp16: 1.90x fp16 [1.80, 2.00]; int8: can't tell, too few repeats (6) for an interval",
        ),
        (Some((0.9, 1.1)), Some((0.8, 1.0)), "int8: can't tell, 0.90x to 1.10x; nf4: can't tell, 0.80x to 1.00x"),
        (
            Some((0.2, 0.4)),
            Some((0.5, 0.7)),
            "fp16 decodes fastest: int8 0.30x fp16 [0.20, 0.40], nf4 0.60x fp16 [0.50, 0.70]",
        ),
        (
            Some((0.2, 0.4)),
            None,
            "int8 is slower: 0.30x fp16 [0.20, 0.40]; nf4: can't tell, too few repeats (6) for an interval",
        ),
        (
            None,
            None,
            "int8: can't tell, too few repeats (6) for an interval; nf4: can't tell, too few repeats (6) for an interval",
        ),
    ];
    for (int8, nf4, expected) in cases {
        assert_eq!(verdict(&records(*int8, *nf4), None), format!("{expected}{SCOPE}"));
    }
}

#[test]
fn three_that_tie_are_told_as_three() {
    let mut four = records(Some((1.5, 1.9)), Some((1.8, 2.0)));
    four.push(Record { precision: "nf4-nodq".into(), ..four[2].clone() });
    let expected = "int8, nf4 and nf4-nodq decode faster than fp16, can't tell which of them is faster: int8 1.70x fp16 [1.50, 1.90], \
                    nf4 1.90x fp16 [1.80, 2.00], nf4-nodq 1.90x fp16 [1.80, 2.00]";
    assert_eq!(verdict(&four, None), format!("{expected}{SCOPE}"));
}

#[test]
fn a_reason_comes_with_its_measurement() {
    let mut records = records(Some((1.5, 1.7)), Some((1.9, 2.1)));
    let rest = "; int8 decodes 1.60x fp16 [1.50, 1.70]";
    let cases: [(&str, Option<f64>, &str); 8] = [
        (
            "memory",
            Some(0.99),
            ", memory-bound at 62 % of the read bandwidth (reading alone takes 99 % of a step, arithmetic alone 30 %)",
        ),
        ("memory", None, ", memory-bound at 62 % of the read bandwidth"),
        ("compute", Some(0.4), ", compute-bound (reading alone takes 40 % of a step, arithmetic alone 30 %)"),
        (
            "mixed",
            Some(0.4),
            ", bound by neither memory nor arithmetic alone (reading alone takes 40 % of a step, arithmetic alone 30 %)",
        ),
        ("cache-resident", Some(0.4), ", cache-resident (reading alone takes 40 % of a step, arithmetic alone 30 %)"),
        ("host", None, ", host-bound (the device works 71 % of a step)"),
        ("not known", None, " at 62 % of the read bandwidth, what bounds it is not known"),
        // Of an earlier version, which had not measured it.
        ("compute-bound", None, ""),
    ];
    for (bound, memory_alone_share, expected) in cases {
        let bandwidth = &mut records[2].bandwidth;
        bandwidth.bound = Some(bound.to_owned());
        (bandwidth.mbu, bandwidth.device_share) = (Some(0.62), Some(0.71));
        bandwidth.memory_alone_share = memory_alone_share;
        bandwidth.arithmetic_alone_share = memory_alone_share.map(|_| 0.3);
        let speed = "nf4 decodes fastest: 2.00x fp16 [1.90, 2.10]";
        assert_eq!(verdict(&records, None), format!("{speed}{expected}{rest}{SCOPE}"), "{bound}");
    }
}

#[test]
fn unpaired_runs_are_said() {
    let unpaired =
        said(records(Some((1.5, 1.7)), Some((1.9, 2.1))), |r| r[2].ratio_to_fp16.as_mut().unwrap().paired = false);
    let rest = "; int8 decodes 1.60x fp16 [1.50, 1.70]";
    assert_eq!(unpaired, format!("nf4 decodes fastest: 2.00x fp16 [1.90, 2.10], not paired{rest}{SCOPE}"));
}

#[test]
fn rows_without_a_ratio_or_a_speed_are_named() {
    let both = || records(Some((1.5, 1.7)), Some((1.9, 2.1)));
    let fastest = "nf4 decodes faster than fp16: 2.00x fp16 [1.90, 2.10]";
    let no_ratio = said(both(), |r| r[1].ratio_to_fp16 = None);
    assert_eq!(no_ratio, format!("{fastest}; int8 decodes 32.0 tokens/s [31.7, 32.3], not compared with fp16{SCOPE}"));
    let no_speed = said(both(), |r| {
        r[1].metrics.remove("decode_tps");
    });
    let expected = "nf4 decodes fastest: 2.00x fp16 [1.90, 2.10]; no decode speed was measured for int8";
    assert_eq!(no_speed, format!("{expected}{SCOPE}"));
}

#[test]
fn without_ratios_the_speeds_decide() {
    let alone = |records: Vec<Record>| {
        let mut records = records;
        records.iter_mut().for_each(|record| (record.ratio_to_fp16, record.memory.peak_bytes) = (None, None));
        records
    };
    let all = || alone(example("three_precisions"));
    let expected = "nf4 decodes fastest: 40.0 tokens/s [39.6, 40.4]; slower: fp16 20.0 tokens/s [19.8, 20.2], \
                    int8 32.0 tokens/s [31.7, 32.3]";
    assert_eq!(said(all(), |_| {}), format!("{expected}{SCOPE}"));
    let without_fp16 = said(all()[1..].to_vec(), |_| {});
    let expected = "nf4 decodes fastest: 40.0 tokens/s [39.6, 40.4]; slower: int8 32.0 tokens/s [31.7, 32.3]";
    assert_eq!(without_fp16, format!("{expected}; fp16 was not run{SCOPE}"));
    let wide = |r: &mut [Record]| r[1].metrics.get_mut("decode_tps").unwrap().ci95_high = Some(41.0);
    let expected = "can't tell which decodes fastest: int8 32.0 tokens/s [31.7, 41.0], nf4 40.0 tokens/s [39.6, 40.4]; slower: \
                    fp16 20.0 tokens/s [19.8, 20.2]";
    assert_eq!(said(all(), wide), format!("{expected}{SCOPE}"));
    let without = |summary: &mut Summary| (summary.ci95_low, summary.ci95_high) = (None, None);
    let one = |r: &mut [Record]| without(r[0].metrics.get_mut("decode_tps").unwrap());
    let expected = "can't tell which decodes fastest: fp16 20.0 tokens/s, nf4 40.0 tokens/s [39.6, 40.4]; slower: \
                    int8 32.0 tokens/s [31.7, 32.3]";
    assert_eq!(said(all(), one), format!("{expected}{SCOPE}"));
    let none = |r: &mut [Record]| r.iter_mut().for_each(|r| without(r.metrics.get_mut("decode_tps").unwrap()));
    let expected =
        "too few repeats to compare fp16, int8 and nf4: fp16 20.0 tokens/s, int8 32.0 tokens/s, nf4 40.0 tokens/s";
    assert_eq!(said(all(), none), format!("{expected}{SCOPE}"));
}

#[test]
fn one_row_says_its_speed() {
    let one = || example("three_precisions")[..1].to_vec();
    let speed = "fp16 decodes 20.0 tokens/s [19.8, 20.2]";
    assert_eq!(said(one(), |_| {}), format!("{speed}, at 80 % of the read bandwidth{SCOPE}"));
    assert_eq!(said(one(), |r| r[0].bandwidth.mbu = None), format!("{speed}{SCOPE}"));
    assert_eq!(said(one(), |r| r[0].bandwidth.bound = Some("cache-resident".into())), format!("{speed}{SCOPE}"));
    let unknown = said(one(), |r| (r[0].precision, r[0].bandwidth.mbu) = (String::new(), None));
    assert_eq!(unknown, format!("unknown precision decodes 20.0 tokens/s [19.8, 20.2]{SCOPE}"));
}

#[test]
fn runs_without_a_decode_step_say_what_they_timed() {
    let one_token = said(example("one_new_token"), |_| {});
    let expected =
        "1 new token takes no decode step, so there is no decode speed; nf4 saves 1.25 of 3.00 GiB peak memory";
    assert_eq!(one_token, format!("{expected} (batch 1, 8+1 tokens, random weights)"));
    let only = |keys: &'static [&'static str]| {
        move |records: &mut [Record]| {
            for record in records {
                record.metrics.retain(|key, _| keys.contains(&key.as_str()));
            }
        }
    };
    let two = || example("three_precisions")[..2].to_vec();
    let expected = "the prompt is processed at: fp16 80.0 tokens/s [79.2, 80.8], int8 64.0 tokens/s [63.4, 64.6]";
    assert_eq!(said(two(), only(&["prefill_tps"])), format!("{expected}{SCOPE}"));
    let expected = "generated tokens over all of the time, prompt included: fp16 16.7 tokens/s [16.5, 16.8], \
                    int8 20.0 tokens/s [19.8, 20.2]";
    assert_eq!(said(two(), only(&["prefill_tps", "output_tps"])), format!("{expected}{SCOPE}"));
    assert_eq!(said(two(), only(&[])), format!("no decode speed was measured{SCOPE}"));
}

#[test]
fn failures_and_other_engines_are_named() {
    let both = || records(Some((1.5, 1.7)), Some((1.9, 2.1)));
    let failed = said(both(), |r| r[1].status = Status::Timeout);
    let fastest = "nf4 decodes fastest: 2.00x fp16 [1.90, 2.10]";
    assert_eq!(failed, format!("{fastest}; int8 gave no result (timeout){SCOPE}"));
    let speeds = "nf4 decodes fastest: 40.0 tokens/s [39.6, 40.4]; slower: int8 32.0 tokens/s [31.7, 32.3]";
    let no_base = said(both(), |r| {
        r[0].status = Status::Oom;
        r.iter_mut().for_each(|record| record.ratio_to_fp16 = None);
    });
    assert_eq!(no_base, format!("{speeds}; fp16 gave no result (oom){SCOPE}"));
    let nothing = said(both(), |r| r.iter_mut().for_each(|record| record.status = Status::Oom));
    assert_eq!(nothing, format!("no precision gave a result: fp16 oom, int8 oom, nf4 oom{SCOPE}"));

    let beside = |change: fn(&mut Record)| {
        let mut records = both();
        let mut other = Record { ratio_to_fp16: records[1].ratio_to_fp16, ..records[0].clone() };
        other.engine.name = "candle".into();
        change(&mut other);
        records.push(other);
        verdict(&records, None)
    };
    let own = format!("{fastest}; int8 decodes 1.60x fp16 [1.50, 1.70]");
    assert_eq!(beside(|_| {}), format!("{own}; candle's fp16 decodes 1.60x fp16 [1.50, 1.70]{SCOPE}"));
    assert_eq!(beside(|r| r.ratio_to_fp16 = None), format!("{own}; candle's fp16 was not compared with fp16{SCOPE}"));
    assert_eq!(beside(|r| r.status = Status::Error), format!("{own}; candle's fp16 gave no result (error){SCOPE}"));
}

#[test]
fn rows_of_another_tool_name_it() {
    let theirs = said(example("three_precisions")[2..].to_vec(), |r| {
        (r[0].engine.name, r[0].weights.source) = ("llama.cpp".into(), "local".into());
        (r[0].bandwidth.mbu, r[0].workload.batch_size) = (None, 4);
    });
    let scope = " (llama.cpp, batch 4, 8+5 tokens)";
    assert_eq!(theirs, format!("nf4 decodes 40.0 tokens/s [39.6, 40.4]{scope}"));
}

#[test]
fn memory_is_told_both_ways() {
    let mut records = records(Some((1.5, 1.7)), Some((1.9, 2.1)));
    let speed = "nf4 decodes fastest: 2.00x fp16 [1.90, 2.10]; int8 decodes 1.60x fp16 [1.50, 1.70]";
    records[0].memory.peak_bytes = Some(2 << 30);
    let cases = [
        (1 << 30, "; nf4 saves 1.00 of 2.00 GiB peak memory"),
        (3 << 30, "; nf4 takes 1.00 GiB more peak memory than fp16's 2.00"),
        ((2 << 30) + 1000, ""),
    ];
    for (peak_bytes, expected) in cases {
        records[2].memory.peak_bytes = Some(peak_bytes);
        assert_eq!(verdict(&records, None), format!("{speed}{expected}{SCOPE}"));
    }
}

#[test]
fn quality_is_told_as_far_as_its_interval() {
    let with = |ratio: Option<f64>, interval: Interval| {
        said(example("with_quality"), |records| {
            let quality = records[2].quality.as_mut().expect("quality");
            quality.perplexity_ratio = ratio;
            (quality.perplexity_ratio_ci95_low, quality.perplexity_ratio_ci95_high) = interval.unzip();
        })
    };
    let agrees = "; nf4 agrees with the fp32 reference on 74.0 % of next tokens";
    for (ratio, interval, expected) in [
        (Some(1.162), Some((1.08, 1.249)), " and has 1.162x fp16's perplexity [1.080, 1.249] ("),
        (Some(0.9), Some((0.8, 0.95)), " and has 0.900x fp16's perplexity [0.800, 0.950] ("),
        (Some(1.01), Some((0.98, 1.04)), ", can't tell its perplexity from fp16's: 0.980x to 1.040x ("),
        (Some(1.01), None, " and has 1.010x fp16's perplexity, without an interval ("),
        (None, None, " ("),
    ] {
        let said = with(ratio, interval);
        assert!(said.contains(&format!("{agrees}{expected}")), "{said}");
        assert!(!said.contains("fp16 agrees"), "{said}");
    }
    let alone = said(example("quality_alone"), |_| {});
    assert!(alone.ends_with(" (this text)") && !alone.starts_with(';'), "{alone}");
    let only_fp16 = said(example("with_quality")[..1].to_vec(), |_| {});
    assert!(only_fp16.contains("; fp16 agrees with the fp32 reference on 99.8 % of next tokens ("), "{only_fp16}");
}

#[test]
fn a_card_is_filled_or_not() {
    let mut records = records(None, None);
    let peaks = [Some(3u64 << 30), Some(2 << 30), None];
    records.iter_mut().zip(peaks).for_each(|(record, peak)| record.memory.peak_bytes = peak);
    (records[2].memory.weights_bytes, records[2].memory.kv_cache_bytes) = (Some(1 << 30), Some(1 << 20));
    let fit = |records: &[Record]| memory::fit(&records.iter().collect::<Vec<_>>(), 2 << 30);
    assert_eq!(fit(&records), "; int8 and nf4 fit in 2.00 GiB, fp16 does not");
    (records[0].status, records[2].memory.weights_bytes) = (Status::Oom, None);
    assert_eq!(fit(&records), "; int8 fits in 2.00 GiB, fp16 and nf4 are not known to");
    records[0].memory.wanted_bytes = Some(3 << 30);
    assert_eq!(fit(&records), "; int8 fits in 2.00 GiB, fp16 does not, nf4 is not known to");
    records[1].memory.peak_bytes = Some(3 << 30);
    assert_eq!(fit(&records), "; fp16 and int8 do not fit in 2.00 GiB, nf4 is not known to");
}

#[test]
fn the_card_is_the_records_own_unless_another_is_named() {
    let mut records = example("three_precisions");
    records.iter_mut().for_each(|record| record.card_bytes = Some(2 << 30));
    let document = Document { schema_version: 1, records };
    let cases = case::cases(&document);
    assert!(verdicts(&cases[0], None)[0].to_string().contains("nf4 fits in 2.00 GiB, fp16 and int8 do not"));
    assert!(verdicts(&cases[0], Some(1 << 30))[0].to_string().contains("fp16, int8 and nf4 do not fit in 1.00 GiB"));
}

#[test]
fn each_run_has_a_verdict_under_its_name() {
    let (mut records, mut later) = (example("three_precisions"), example("no_difference"));
    records.iter_mut().for_each(|record| record.file = "base.json".into());
    later
        .iter_mut()
        .for_each(|record| (record.file, record.timestamp) = ("new.json".into(), "2026-01-02T00:00:00Z".into()));
    let document = Document { schema_version: 1, records: [records, later].concat() };
    let said: Vec<String> =
        case::cases(&document).iter().flat_map(|case| verdicts(case, None)).map(|v| v.to_string()).collect();
    assert_eq!(said.len(), 2);
    assert!(said[0].starts_with("base.json, 2026-01-01T00:00:00Z: nf4 decodes fastest"), "{said:?}");
    assert!(said[1].starts_with("new.json, 2026-01-02T00:00:00Z: int8: no difference within 5 %"), "{said:?}");
    assert!(!said.iter().any(|said| said.contains("nf4 and nf4")), "{said:?}");
}
