//! Metrics, ratios, order, validity and the warnings of repeats.

use std::cell::RefCell;
use std::collections::BTreeMap;

use quantbench::engine::fake::FakeRun;
use quantbench::events::{Event, Listener, Silent};
use quantbench::harness::assemble::records;
use quantbench::harness::load::LoadReport;
use quantbench::harness::measured::WarmupEnd;
use quantbench::harness::schedule::{RunOrder, ScheduleContext, VariantOutcome, WorkerHandle};
use quantbench::harness::task::Task;
use quantbench::harness::warnings::Warning;
use quantbench::harness::watch::NoWatch;
use quantbench::harness::{Case, MeasurementProtocol, RunContext, schedule};
use quantbench::os::cpu_usage::CpuUsage;
use quantbench::protocol::{Encode, Failure};
use quantbench::record::metrics::METRICS;
use quantbench::record::{self, Record, Status};

use super::scene::*;

#[test]
fn every_metric_is_exact() {
    // Prefill 50 ms, then steps of 10, 20 and 30 ms: 110 ms end to end.
    let records = measured(counted(3), &[("fp16", vec![run_ms(50, &[10, 20, 30])])]);
    let record = &records[0];
    assert_eq!((record.status, &record.reason), (Status::Ok, &None));
    let expected = [
        ("ttft_ms", 50.0),
        ("tpot_ms", 20.0),
        ("itl_ms", 20.0),
        ("decode_tps", 3.0 / 0.06),
        ("decode_tps_per_sequence", 3.0 / 0.06),
        ("prefill_tps", 8.0 / 0.05),
        ("output_tps", 4.0 / 0.11),
        ("latency_s", 0.11),
        ("latency_per_token_ms", 27.5),
        ("load_s", 2.5),
        ("weights_bytes", 1000.0),
        ("kv_cache_bytes", 500.0),
        ("scratch_bytes", 60.0),
        ("weight_bytes_per_token", 900.0),
        // 10 bytes a position; decode steps read 11, 12 and 13 positions.
        ("kv_bytes_per_token", 120.0),
        ("achieved_gb_s", 1020.0 * 50.0 / 1e9),
        ("mbu", 1020.0 * 50.0 / 1e9 / 1e-3),
        ("read_gb_s", 1e-3),
        ("copy_gb_s", 5e-4),
        ("theoretical_gb_s", 1.1e-3),
        // 40 operations a step.
        ("flops_per_step", 40.0),
        ("achieved_gflop_s", 40.0 * 50.0 / 1e9),
        ("matmul_gflop_s", 0.5),
        ("mfu", 40.0 * 50.0 / 1e9 / 0.5),
    ];
    for (key, value) in expected {
        assert_eq!(metric(record, key), Some(value), "{key}");
    }
    // What only a machine with these sensors, a device or a second precision defines.
    let undefined = [
        "speedup_vs_fp16",
        "bytes_ratio",
        "peak_bytes",
        "start_bytes",
        "end_bytes",
        "load_peak_bytes",
        "prefill_peak_bytes",
        "decode_peak_bytes",
        "process_peak_rss_bytes",
        "outlier_columns_mean",
        "device_itl_ms",
        "decode_synced_tps",
        "device_share",
        "joules_per_token",
        "memory_alone_share",
        "arithmetic_alone_share",
        "context_bytes",
        "device_process_bytes",
        "growth_bytes",
        "agreement_kl_mean",
        "agreement_top1",
        "host_ms_per_token",
    ];
    for key in undefined {
        assert_eq!(metric(record, key), None, "{key}");
    }
    let of_quality: Vec<_> = METRICS.iter().filter(|metric| metric.path.starts_with("quality.")).collect();
    assert!(of_quality.iter().all(|metric| metric.value(record).is_none()), "no quality was asked for");
    let n_expected = expected.len() + undefined.len() + of_quality.len();
    assert_eq!(METRICS.len(), n_expected, "a metric without an expectation");
    assert_eq!(record.samples.prefill_ns, [50_000_000; 3]);
    assert_eq!(record.samples.decode_step_ns[2], [10_000_000, 20_000_000, 30_000_000]);
    assert_eq!(record.metrics["itl_ms"].n, 9);
    assert_eq!(record.output.token_ids, [5, 6, 7, 7]);
}

/// Of three sequences: tokens a second are those of all, times those of each; a step reads the weights once and every cache.
#[test]
fn a_batch_counts_the_tokens_of_all_sequences() {
    let of_three = Task { sequences: 3, depth: vec![1; 6], prompt: vec![3; 24], ..task() };
    let case = Case { sequences: 3, ..case(&["fp16"], counted(2)) };
    let local = Local::new("fp16", of_three, vec![filling(), run_ms(50, &[10, 20, 30])], &Journal::default());
    let outcomes =
        measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &case.protocol, RunOrder::Interleaved, &Silent)
            .unwrap();
    let facts = RunContext { workload: record::Workload { batch_size: 3, ..facts(&case).workload }, ..facts(&case) };
    let record = &records(&facts, &case, &outcomes, &|_| None)[0];
    assert_eq!((record.status, &record.reason), (Status::Ok, &None));
    for (key, value) in [
        ("decode_tps", 3.0 * 3.0 / 0.06),
        ("decode_tps_per_sequence", 3.0 / 0.06),
        ("prefill_tps", 3.0 * 8.0 / 0.05),
        ("output_tps", 3.0 * 4.0 / 0.11),
        ("ttft_ms", 50.0),
        ("tpot_ms", 20.0),
        ("itl_ms", 20.0),
        ("weight_bytes_per_token", 900.0),
        ("kv_bytes_per_token", 3.0 * 120.0),
        ("achieved_gb_s", 1260.0 * 50.0 / 1e9),
        ("achieved_gflop_s", 40.0 * 50.0 / 1e9),
    ] {
        assert_eq!(metric(record, key), Some(value), "{key}");
    }
    assert_eq!(record.output.token_ids, [5, 6, 7, 7]);
    assert_eq!(record.output.further_token_ids, [[5, 6, 7, 7], [5, 6, 7, 7]]);
    assert_eq!(outcomes[0].samples[0].n_tokens(), 12);
}

#[test]
fn steps_and_prefill_add_up_to_the_whole() {
    let scripts = [run_ms(50, &[10, 20, 30]), run_ms(7, &[1, 2, 3]), run_ms(1, &[9])];
    let samples = measured(counted(3), &[("fp16", scripts.to_vec())])[0].samples.clone();
    for (i, end_to_end_ns) in samples.end_to_end_ns.iter().enumerate() {
        assert_eq!(samples.prefill_ns[i] + samples.decode_step_ns[i].iter().sum::<u64>(), *end_to_end_ns);
    }
}

#[test]
fn an_encoder_counts_as_prefill() {
    let task = Task { encode: Encode::Tokens(vec![1; 5]), depth: Vec::new(), ..task() };
    let run = FakeRun { encode_ns: 30, prefill_ns: 20, ..FakeRun::default() };
    let mut local = Local::new("fp16", task, vec![run], &Journal::default());
    assert_eq!(local.repeat(&Silent).unwrap().prefill_ns, 50);
}

#[test]
fn one_token_has_no_decode_metrics() {
    let single = Task { n_gen: 1, ..task() };
    let case = Case { n_gen: 1, ..case(&["fp16"], counted(2)) };
    let local = Local::new("fp16", single, vec![filling(), run_ms(50, &[10])], &Journal::default());
    let outcomes =
        measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &case.protocol, RunOrder::Interleaved, &Silent)
            .unwrap();
    let facts = RunContext { workload: record::Workload { n_gen: 1, ..facts(&case).workload }, ..facts(&case) };
    let record = &records(&facts, &case, &outcomes, &|_| None)[0];
    for key in ["decode_tps", "tpot_ms", "itl_ms", "mbu", "achieved_gb_s"] {
        assert_eq!(metric(record, key), None, "{key}");
    }
    assert_eq!((metric(record, "latency_s"), metric(record, "ttft_ms")), (Some(0.05), Some(50.0)));
    assert_eq!(record.status, Status::Ok);
}

#[test]
fn warm_up_ends_when_flat_and_keeps_the_first_run_apart() {
    let task = Task { warmup: None, ..task() };
    let runs = vec![filling(), run_ms(900, &[50]), run_ms(100, &[10]), run_ms(98, &[10]), run_ms(96, &[10])];
    let mut local = Local::new("fp16", task, runs, &Journal::default());
    let warmed = local.warm_up(&Silent).unwrap();
    assert_eq!(warmed.ended, WarmupEnd::Agreed);
    assert_eq!(warmed.runs_ns, [1_050_000_000, 130_000_000, 128_000_000]);
    assert_eq!(warmed.duration_s, 1.308);
    assert_eq!(local.repeat(&Silent).unwrap().prefill_ns, 96_000_000, "the next run is the first counted one");
}

#[test]
fn a_text_that_may_end_has_its_length_found_untimed() {
    let task = Task { stop_at: vec![7], n_gen: 10, ..task() };
    let mut local = Local::new("fp16", task, vec![filling(), run_ms(1, &[1])], &Journal::default());
    assert_eq!(local.warm_up(&Silent).unwrap().n_gen, 3);
    assert_eq!(local.repeat(&Silent).unwrap().ids, [5, 6, 7]);
}

#[test]
fn precisions_take_turns() {
    let journal = Journal::default();
    let scripts = [("fp16", vec![]), ("int8", vec![]), ("nf4", vec![])];
    outcomes(&counted(4), RunOrder::Interleaved, &scripts, &journal);
    let said = |what: &str, order: [&str; 3]| order.map(|name| format!("{what} {name}"));
    let [a, b, c] = ["fp16", "int8", "nf4"];
    let rounds = [[a, b, c], [b, c, a], [c, a, b], [a, b, c]].map(|order| said("repeat", order));
    let expected =
        [vec![said("load", [a, b, c]), said("warm", [a, b, c])], rounds.to_vec(), vec![said("finish", [a, b, c])]];
    assert_eq!(*journal.borrow(), expected.concat().concat());
}

#[test]
fn in_turn_all_take_as_many_repeats_as_the_first() {
    let journal = Journal::default();
    // 0.6 s of decode a repeat and no noise: 6 repeats are 3.6 s, enough in number, time and width.
    let scripts = [("fp16", vec![run_ms(50, &[200])]), ("nf4", vec![run_ms(50, &[20])])];
    let outcomes = outcomes(&MeasurementProtocol::default(), RunOrder::InTurn, &scripts, &journal);
    assert_eq!(outcomes.iter().map(|outcome| outcome.samples.len()).collect::<Vec<_>>(), [6, 6]);
    assert_eq!(journal.borrow()[8..11], ["finish fp16", "load nf4", "warm nf4"]);
}

#[test]
fn interleaved_repeats_go_on_until_all_are_narrow_with_equal_counts() {
    // fp16 satisfies every criterion at 6 repeats; nf4 takes 20 to measure 3 s.
    let scripts = [("fp16", vec![run_ms(50, &[200])]), ("nf4", vec![run_ms(50, &[50])])];
    let records = measured(MeasurementProtocol::default(), &scripts);
    for record in &records {
        assert_eq!((record.protocol.n_repeats, record.protocol.ended.as_str()), (20, "rel_ci"));
    }
    let ratio = records[1].ratio_to_fp16.unwrap();
    assert_eq!((ratio.median, ratio.ci95_low, ratio.ci95_high, ratio.paired), (4.0, Some(4.0), Some(4.0), true));
    assert_eq!((ratio.by_bytes, records[0].ratio_to_fp16), (1.0, None));
}

#[test]
fn ratios_are_taken_pair_by_pair() {
    // Both slow down together, and nf4 is twice as fast in every round.
    let slowing = |factor: u64| (1..=6).map(|i| run_ms(10, &[factor * 10 * i])).collect::<Vec<_>>();
    let records = measured(counted(6), &[("fp16", slowing(2)), ("nf4", slowing(1))]);
    let ratio = records[1].ratio_to_fp16.unwrap();
    assert_eq!((ratio.median, ratio.ci95_low, ratio.ci95_high), (2.0, Some(2.0), Some(2.0)));
}

#[test]
fn a_worker_that_fails_leaves_the_others_running() {
    let failing = |at: usize| {
        let bad = FakeRun { failure: Some("it broke".to_owned()), ..run_ms(50, &[10]) };
        [vec![run_ms(50, &[10]); at], vec![bad]].concat()
    };
    let records = measured(counted(4), &[("fp16", vec![run_ms(50, &[10])]), ("int8", failing(2)), ("nf4", failing(0))]);
    assert_eq!(
        records.iter().map(|record| record.status).collect::<Vec<_>>(),
        [Status::Ok, Status::Error, Status::Error]
    );
    assert_eq!(records[1].reason.as_deref(), Some("it broke"));
    let counts: Vec<u64> = records.iter().map(|record| record.protocol.n_repeats).collect();
    assert_eq!((counts, records[1].ratio_to_fp16), (vec![4, 2, 0], None));
}

#[test]
fn out_of_memory_is_a_record_and_bad_input_an_error() {
    let full = Failure::OutOfMemory { message: "no room".to_owned(), wanted_bytes: 70, free_bytes: 0 };
    let case = case(&["fp16", "nf4"], counted(1));
    let workers = |failure: &Failure| -> Vec<Box<dyn WorkerHandle>> {
        let local = |name| Local::new(name, task(), vec![filling(), run_ms(1, &[1])], &Journal::default());
        vec![Box::new(Local { loading: Err(failure.clone()), ..local("fp16") }), Box::new(local("nf4"))]
    };
    let outcomes = measure(workers(&full), &case.protocol, RunOrder::Interleaved, &Silent).unwrap();
    let oom = records(&facts(&case), &case, &outcomes, &|_| None);
    assert_eq!((oom[0].status, oom[0].reason.as_deref()), (Status::Oom, Some("no room")));
    assert_eq!((oom[0].memory.wanted_bytes, oom[0].memory.free_bytes), (Some(70), None));
    assert_eq!(oom[1].status, Status::Ok);
    let wrong = Failure::Invalid { message: "wrong kernels".to_owned() };
    let invalid = measure(workers(&wrong), &case.protocol, RunOrder::Interleaved, &Silent).unwrap();
    let invalid = records(&facts(&case), &case, &invalid, &|_| None);
    assert_eq!((invalid[0].status, invalid[0].reason.as_deref()), (Status::Invalid, Some("wrong kernels")));
    assert_eq!(invalid[1].status, Status::Ok);
    let bad = Failure::BadInput { message: "no such file".to_owned(), hint: Some("look again".to_owned()) };
    assert_eq!(measure(workers(&bad), &case.protocol, RunOrder::Interleaved, &Silent), Err(bad));
}

#[test]
fn garbage_is_invalid_and_has_no_ratio() {
    let fine = run_ms(50, &[10]);
    let nan = FakeRun { logits: vec![0.0, f32::NAN], ..fine.clone() };
    let records = measured(counted(2), &[("fp16", vec![fine.clone()]), ("nf4", vec![fine, nan])]);
    assert_eq!(records[1].status, Status::Invalid);
    assert_eq!(records[1].reason.as_deref(), Some("the logits are not finite after repeat 2"));
    assert_eq!(records[1].ratio_to_fp16, None);
}

/// Names of the warnings of one precision's script.
fn warned(protocol: MeasurementProtocol, runs: Vec<FakeRun>) -> Vec<String> {
    let names =
        |record: &Record| record.warnings.iter().map(|text| text.split(':').next().unwrap().to_owned()).collect();
    names(&measured(protocol, &[("fp16", runs)])[0])
}

#[test]
fn repeats_raise_their_warnings() {
    let short = MeasurementProtocol { max_time_s: 1.0, ..MeasurementProtocol::default() };
    let tokens = FakeRun { tokens: vec![9], ..run_ms(50, &[10]) };
    let noisy = |i: u64| run_ms(50, &[10 + i % 3]);
    let cases: [(&str, MeasurementProtocol, Vec<FakeRun>); 5] = [
        ("", counted(8), vec![run_ms(50, &[10])]),
        ("few_repeats", short, vec![run_ms(300, &[10])]),
        ("tokens_differ", counted(2), vec![run_ms(50, &[10]), tokens]),
        ("outliers", counted(4), vec![run_ms(50, &[10]), run_ms(500, &[10]), run_ms(50, &[10])]),
        ("wide_interval", counted(9), (0..9).map(noisy).collect()),
    ];
    for (expected, protocol, runs) in cases {
        let expected: Vec<&str> = Some(expected).into_iter().filter(|name| !name.is_empty()).collect();
        assert_eq!(warned(protocol, runs), expected);
    }
}

#[test]
fn facts_and_outcomes_raise_their_warnings() {
    let case = case(&["fp16", "nf4"], counted(2));
    let script = vec![run_ms(50, &[10])];
    let clean = outcomes(
        &case.protocol,
        RunOrder::Interleaved,
        &[("fp16", script.clone()), ("nf4", script)],
        &Journal::default(),
    );
    let names = |facts: &RunContext, outcomes: &[VariantOutcome]| -> Vec<String> {
        let record = records(facts, &case, outcomes, &|_| None).remove(1);
        assert_eq!(record.tainted, record.warnings.iter().any(|text| text.starts_with("busy_cpus")));
        record.warnings.iter().map(|text| text.split(':').next().unwrap().to_owned()).collect()
    };
    let changed = |change: &dyn Fn(&mut VariantOutcome)| {
        let mut outcomes = clean.clone();
        change(&mut outcomes[1]);
        outcomes
    };
    let facts = facts(&case);
    assert_eq!(names(&facts, &clean), [""; 0]);
    let busy = CpuUsage { n_cpus: 2, total: 400, busy: 400, own: 200 };
    let cap = |outcome: &mut VariantOutcome| outcome.warmed.as_mut().unwrap().ended = WarmupEnd::Cap;
    let ended = |outcome: &mut VariantOutcome| {
        outcome.warmed.as_mut().unwrap().n_gen = 3;
        outcome.samples.iter_mut().for_each(|sample| sample.ids.truncate(3));
    };
    let inexact = |outcome: &mut VariantOutcome| outcome.finished.as_mut().unwrap().peak_bytes = Some(7);
    let overflow = |outcome: &mut VariantOutcome| outcome.loaded.as_mut().unwrap().own.fp16_overflow = 3;
    assert_eq!(names(&facts, &changed(&|outcome| outcome.samples[0].load = Some(busy))), ["busy_cpus"]);
    assert_eq!(names(&facts, &changed(&cap)), ["warmup_not_flat"]);
    assert_eq!(names(&facts, &changed(&ended)), ["unequal_lengths", "end_of_text"]);
    assert_eq!(names(&facts, &changed(&inexact)), ["peak_not_exact"]);
    assert_eq!(names(&facts, &changed(&overflow)), ["fp16_overflow"]);
    // A step of 1020 bytes within twice the cache, and one that seems faster than the memory.
    assert_eq!(names(&RunContext { cache_bytes: Some(511), ..facts.clone() }, &clean), ["cache-resident"]);
    let cached = RunContext { read_gb_s: Some(1e-6), theoretical_gb_s: Err("unknown".to_owned()), ..facts.clone() };
    assert_eq!(names(&cached, &clean), ["cache-resident"]);
    // 85 % of what the memory can give are enough.
    assert_eq!(names(&RunContext { theoretical_gb_s: Ok(1e-3 / 0.851), ..facts.clone() }, &clean), [""; 0]);
    assert_eq!(names(&RunContext { theoretical_gb_s: Ok(1e-3 / 0.849), ..facts.clone() }, &clean), ["slow_read"]);
    let unpaired = Warning::UnpairedRatios { needed_bytes: 9, free_bytes: 5 };
    let in_turn = RunContext { order: RunOrder::InTurn, warnings: vec![unpaired], ..facts };
    assert_eq!(names(&in_turn, &clean), ["unpaired_ratios"]);
}

#[test]
fn progress_counts_repeats_of_all_precisions() {
    #[derive(Default)]
    struct Heard(std::sync::Mutex<Vec<Event>>);
    impl Listener for Heard {
        fn on(&self, event: Event) {
            self.0.lock().unwrap().push(event);
        }
    }
    let heard = Heard::default();
    let local = |name| -> Box<dyn WorkerHandle> {
        Box::new(Local::new(name, task(), vec![filling(), run_ms(1, &[1])], &Journal::default()))
    };
    measure(vec![local("fp16"), local("nf4")], &counted(2), RunOrder::Interleaved, &heard).unwrap();
    let events = heard.0.into_inner().unwrap();
    let done: Vec<u64> = events
        .iter()
        .filter_map(|event| match event {
            Event::Progress { done } => Some(*done),
            _ => None,
        })
        .collect();
    assert_eq!(done, [1, 2, 3, 4]);
    assert!(events.iter().any(|event| matches!(event, Event::Begin { label, total: 4, .. } if label == "measure")));
}

/// Three precisions that load together; the second finds too little memory beside the first, and enough when the others have ended.
#[test]
fn what_does_not_fit_beside_the_others_runs_alone_behind_them() {
    let full = Failure::OutOfMemory { message: "out of memory: no room".to_owned(), wanted_bytes: 7, free_bytes: 5 };
    let (journal, starts) = (Journal::default(), RefCell::new(BTreeMap::<usize, usize>::new()));
    let run = |fits_alone: bool| {
        starts.borrow_mut().clear();
        let start = |at: usize| -> Box<dyn WorkerHandle> {
            let name = ["fp16", "int8", "nf4"][at];
            let local = Local::new(name, task(), vec![filling(), run_ms(50, &[10])], &journal);
            *starts.borrow_mut().entry(at).or_default() += 1;
            let refused = at == 1 && (starts.borrow()[&at] == 1 || !fits_alone);
            Box::new(if refused { Local { loading: Err(full.clone()), ..local } } else { local })
        };
        let case = case(&["fp16", "int8", "nf4"], counted(4));
        let (n_workers, order) = (3, RunOrder::Interleaved);
        let mut stage = ScheduleContext { start: &start, n_workers, order, watch: &mut NoWatch, events: &Silent };
        let outcomes = schedule::measure(&mut stage, &case.protocol).unwrap();
        records(&facts(&case), &case, &outcomes, &|_| None)
    };
    let found = run(true);
    assert!(found.iter().all(|record| record.status == Status::Ok && record.protocol.n_repeats == 4));
    assert_eq!(
        found.iter().map(|record| record.protocol.order.as_str()).collect::<Vec<_>>(),
        ["interleaved", "in_turn", "interleaved"]
    );
    let paired = |at: usize| found[at].ratio_to_fp16.map(|ratio| ratio.paired);
    assert_eq!((paired(1), paired(2)), (Some(false), Some(true)));
    let told = |at: usize| found[at].warnings.iter().any(|text| text.starts_with("ran_alone: `int8`"));
    assert_eq!([told(0), told(1), told(2)], [false, true, false]);
    let last = journal.borrow().iter().rposition(|what| what.ends_with("nf4")).unwrap();
    let again = journal.borrow().iter().rposition(|what| what == "load int8").unwrap();
    assert!(last < again, "the others have ended: {:?}", journal.borrow());

    // One that does not fit alone either is told once, as it was.
    let found = run(false);
    assert_eq!((found[1].status, found[1].reason.as_deref()), (Status::Oom, Some("out of memory: no room")));
    assert_eq!(*starts.borrow(), BTreeMap::from([(0, 1), (1, 2), (2, 1)]));
}

/// The first one to load had the memory to itself: nothing that ends later makes room for it.
#[test]
fn what_had_all_the_memory_does_not_run_again() {
    let full = Failure::OutOfMemory { message: "no room".to_owned(), wanted_bytes: 7, free_bytes: 5 };
    let starts = RefCell::new([0; 2]);
    let start = |at: usize| -> Box<dyn WorkerHandle> {
        starts.borrow_mut()[at] += 1;
        let local = Local::new(["fp16", "nf4"][at], task(), vec![filling(), run_ms(50, &[10])], &Journal::default());
        Box::new(if at == 0 { Local { loading: Err(full.clone()), ..local } } else { local })
    };
    let mut stage = ScheduleContext {
        start: &start,
        n_workers: 2,
        order: RunOrder::Interleaved,
        watch: &mut NoWatch,
        events: &Silent,
    };
    let outcomes = schedule::measure(&mut stage, &counted(2)).unwrap();
    assert_eq!(*starts.borrow(), [1, 1]);
    assert!(outcomes[0].failure.is_some() && outcomes[1].finished.is_some());
}

/// A record of a row that did not fit tells the allocation that failed and the estimate apart.
#[test]
fn what_failed_and_what_is_needed_are_two_numbers() {
    let full = Failure::OutOfMemory { message: "no room".to_owned(), wanted_bytes: 70, free_bytes: 5 };
    let outcome = VariantOutcome { failure: Some(full), needed_bytes: 900, ..VariantOutcome::default() };
    let case = case(&["fp16"], counted(1));
    let memory = &records(&facts(&case), &case, &[outcome], &|_| None)[0].memory;
    assert_eq!((memory.wanted_bytes, memory.needed_bytes, memory.free_bytes), (Some(70), Some(900), Some(5)));
}

/// The first row fails before it can say what it ran on; the title of a table is made from it.
#[test]
fn a_row_that_failed_has_the_instruction_set_of_its_device() {
    let full = Failure::OutOfMemory { message: "no room".to_owned(), wanted_bytes: 70, free_bytes: 5 };
    let failed = VariantOutcome { failure: Some(full), ..VariantOutcome::default() };
    let loaded = LoadReport { isa: "sm_90".to_owned(), ..LoadReport::default() };
    let ran = VariantOutcome { loaded: Some(loaded), ..VariantOutcome::default() };
    let case = case(&["fp16", "nf4"], counted(1));
    let mut facts = facts(&case);
    facts.device = record::DeviceFacts { kind: "cuda".to_owned(), name: "NVIDIA H200 (cuda:0)".to_owned() };
    let found = records(&facts, &case, &[failed, ran], &|_| None);
    assert_eq!(found.iter().map(|record| record.environment.isa.as_str()).collect::<Vec<_>>(), ["sm_90"; 2]);
}
