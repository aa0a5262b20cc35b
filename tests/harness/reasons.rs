//! What holds decoding back and what it costs in energy, by scripted engines and counters: each reason, and each way to a window.

use quantbench::engine::Alone;
use quantbench::engine::fake::FakeRun;
use quantbench::events::Silent;
use quantbench::harness::assemble::records;
use quantbench::harness::schedule::{RunOrder, VariantOutcome, WorkerHandle};
use quantbench::harness::watch::energy::{Counter, EnergyWindow, Mark};
use quantbench::harness::watch::{MachineReading, Watched};
use quantbench::harness::{Case, MeasurementProtocol, RunContext};
use quantbench::record::{self, Document, Record, SCHEMA_VERSION};
use quantbench::report;

use super::scene::*;

/// Rounds of a step of 10 ms whose parts take these shares.
fn alone(memory: f64, arithmetic: f64) -> Option<Alone> {
    let ns = |share: f64| [0.5, 1.0, 9.0].map(|noise| (share * noise * 1e7) as u64).to_vec();
    Some(Alone { step_ns: ns(1.0), arithmetic_ns: ns(arithmetic), memory_ns: ns(memory) })
}

/// fp16's record of two repeats: 1020 bytes a step at 50 steps a second are 5 % of 1 MB/s.
fn decoded(alone: Option<Alone>, device_step_ns: Vec<u64>, change: impl Fn(&mut RunContext)) -> Record {
    let case = case(&["fp16"], counted(2));
    let run = FakeRun { device_step_ns, ..run_ms(50, &[20]) };
    let local = Local::with_alone("fp16", task(), vec![filling(), run], &Journal::default(), alone);
    let outcomes =
        measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &case.protocol, RunOrder::Interleaved, &Silent);
    let mut facts = facts(&case);
    change(&mut facts);
    records(&facts, &case, &outcomes.unwrap(), &|_| None).remove(0)
}

fn bound(record: &Record) -> &str {
    record.bandwidth.bound.as_deref().unwrap_or("none")
}

fn on_cuda(facts: &mut RunContext) {
    facts.device = record::DeviceFacts { kind: "cuda".to_owned(), name: "cuda:0".to_owned() };
}

#[test]
fn on_a_cpu_a_reason_is_what_was_measured() {
    for (memory, arithmetic, expected) in
        [(0.91, 0.4, "memory"), (0.4, 0.91, "compute"), (0.5, 0.4, "mixed"), (0.93, 0.91, "mixed")]
    {
        let record = decoded(alone(memory, arithmetic), vec![], |_| {});
        assert_eq!(bound(&record), expected);
        assert_eq!(metric(&record, "memory_alone_share"), Some(memory));
        assert_eq!(metric(&record, "arithmetic_alone_share"), Some(arithmetic));
        assert_eq!(record.samples.alone_step_ns, [5_000_000, 10_000_000, 90_000_000]);
        assert_eq!(record.samples.alone_memory_ns.len(), 3);
    }
    // What lies in the cache keeps its word, with the shares beside it.
    let cached = decoded(alone(0.4, 0.91), vec![], |facts| facts.cache_bytes = Some(1000));
    assert_eq!((bound(&cached), metric(&cached, "arithmetic_alone_share")), ("cache-resident", Some(0.91)));
    // Where nothing was measured nothing is known, however much of the bandwidth it takes.
    let fast = decoded(None, vec![], |facts| facts.read_gb_s = Some(5.2e-5));
    assert_eq!((bound(&fast), metric(&fast, "memory_alone_share")), ("not known", None));
    assert!(metric(&fast, "mbu").unwrap() > 0.9);
}

#[test]
fn on_a_gpu_compute_is_never_a_reason() {
    let of = |device_ms: &[u64], read_gb_s| {
        let device_step_ns = device_ms.iter().map(|ms| ms * 1_000_000).collect();
        decoded(None, device_step_ns, |facts| {
            on_cuda(facts);
            facts.read_gb_s = read_gb_s;
        })
    };
    for (device_ms, read_gb_s, expected) in [
        (&[20; 3][..], Some(5.5e-5), "memory"),
        (&[4; 3], Some(5.5e-5), "memory"),
        (&[17; 3], Some(1e-3), "host"),
        (&[4; 3], None, "host"),
        (&[19; 3], Some(1e-3), "not known"),
        (&[20; 3], Some(7e-5), "not known"),
        (&[], Some(1e-3), "not known"),
        (&[], None, "not known"),
    ] {
        let record = of(device_ms, read_gb_s);
        assert_eq!(bound(&record), expected, "{device_ms:?} {read_gb_s:?}");
        let document = Document { schema_version: SCHEMA_VERSION, records: vec![record] };
        let table = (report::find("table").unwrap().write)(&document, &report::Options::default()).unwrap();
        assert!(table.contains(expected) && !table.contains("compute"), "{table}");
    }
}

#[test]
fn of_another_engine_nothing_is_known() {
    let mut case = case(&["fp16"], counted(2));
    case.engines = vec![quantbench::engine::Engine::Candle.into()];
    let local = Local::with_alone("fp16", task(), vec![filling(), run_ms(50, &[20])], &Journal::default(), None);
    let outcomes =
        measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &case.protocol, RunOrder::Interleaved, &Silent);
    // As much as the memory gives, and within the cache.
    let facts = RunContext { read_gb_s: Some(5.2e-5), cache_bytes: Some(1000), ..facts(&case) };
    let record = records(&facts, &case, &outcomes.unwrap(), &|_| None).remove(0);
    assert_eq!((record.engine.name.as_str(), bound(&record)), ("candle", "not known"));
}

#[test]
fn what_does_not_decode_has_no_reason() {
    let case = Case { n_gen: 1, ..case(&["fp16"], counted(2)) };
    let single = quantbench::harness::task::Task { n_gen: 1, ..task() };
    let local =
        Local::with_alone("fp16", single, vec![filling(), run_ms(50, &[])], &Journal::default(), alone(0.9, 0.1));
    let outcomes =
        measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &case.protocol, RunOrder::Interleaved, &Silent)
            .unwrap();
    assert_eq!(outcomes[0].finished.as_ref().unwrap().alone, None, "there is no step to run beside");
    let facts = RunContext { workload: record::Workload { n_gen: 1, ..facts(&case).workload }, ..facts(&case) };
    assert_eq!(records(&facts, &case, &outcomes, &|_| None)[0].bandwidth.bound, None);
}

#[test]
fn rounds_are_left_out_where_they_would_take_too_long() {
    let of = |step_ms, max_time_s| {
        let task = quantbench::harness::task::Task { max_time_s, ..task() };
        let runs = vec![filling(), run_ms(50, &[step_ms])];
        let local = Local::with_alone("fp16", task, runs, &Journal::default(), alone(0.9, 0.1));
        let outcomes =
            measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &counted(1), RunOrder::Interleaved, &Silent);
        outcomes.unwrap()[0].finished.clone().unwrap().alone.is_some()
    };
    // 18 steps.
    assert!(of(1000, 18.0));
    assert!(!of(1001, 18.0));
    assert!(of(1001, 20.0));
}

#[test]
fn rounds_of_all_launches_count() {
    let case = case(&["fp16"], MeasurementProtocol { launches: 2, ..counted(1) });
    let start = |_: usize| -> Box<dyn WorkerHandle> {
        let runs = vec![filling(), run_ms(50, &[20])];
        Box::new(Local::with_alone("fp16", task(), runs, &Journal::default(), alone(0.9, 0.1)))
    };
    let mut watch = Scripted::default();
    let (order, events) = (RunOrder::Interleaved, &Silent);
    let mut stage = quantbench::harness::schedule::ScheduleContext {
        start: &start,
        n_workers: 1,
        order,
        watch: &mut watch,
        events,
    };
    let outcomes = quantbench::harness::schedule::measure(&mut stage, &case.protocol).unwrap();
    assert_eq!(records(&facts(&case), &case, &outcomes, &|_| None)[0].samples.alone_memory_ns.len(), 6);
}

/// A counter that needs 2 s, and pairs of marks: how much it moved and how long that took.
fn counting(blocks: &[(f64, f64)]) -> Scripted {
    let mark = |(joules, seconds): &(f64, f64)| {
        let begin = Mark { at_ns: 77, joules: 500.0 };
        [begin, Mark { at_ns: 77 + (seconds * 1e9) as u64, joules: 500.0 + joules }]
    };
    Scripted { energy_window_s: Some(2.0), marks: blocks.iter().flat_map(mark).collect(), ..Scripted::default() }
}

/// 50 ms of prefill and three steps: 0.65 s a repeat, of which four make 2.6 s.
fn short_repeat() -> FakeRun {
    run_ms(50, &[200])
}

fn of_counter(case: &Case, outcomes: &[VariantOutcome]) -> Vec<Record> {
    let counter = Counter { name: "nvml", period_s: 0.1, idle_watts: Some(50.0) };
    records(&RunContext { counter: Some(counter), ..facts(case) }, case, outcomes, &|_| None)
}

#[test]
fn repeats_too_short_for_the_counter_are_followed_by_an_untimed_block_of_each_precision() {
    let case = case(&["fp16", "nf4"], counted(2));
    let (journal, mut watch) = (Journal::default(), counting(&[(450.0, 2.6), (293.0, 2.7)]));
    let scripts = [("fp16", vec![short_repeat()]), ("nf4", vec![short_repeat()])];
    let outcomes = watched_outcomes(&case.protocol, RunOrder::Interleaved, &scripts, &journal, &mut watch);
    let said = journal.borrow().join(", ");
    let block = |name: &str| vec![format!("repeat {name}"); 4].join(", ");
    let end = format!("{}, {}, finish fp16, finish nf4", block("fp16"), block("nf4"));
    assert!(said.ends_with(&end), "one precision after the other, behind the counted repeats: {said}");
    assert_eq!(said.matches("repeat").count(), 4 + 8);
    assert_eq!(watch.crews.len(), 4, "nothing else is read meanwhile");
    assert_eq!(outcomes[0].energy, [EnergyWindow { joules: 450.0, seconds: 2.6, tokens: 16 }]);
    let records = of_counter(&case, &outcomes);
    // 16 tokens; 130 and 135 J are the idle machine's.
    for (record, joules) in records.iter().zip([20.0, 9.875]) {
        let summary = &record.metrics["joules_per_token"];
        assert!((summary.median.unwrap() - joules).abs() < 1e-9, "{:?}", summary.median);
        assert_eq!((summary.n, record.samples.energy_tokens.as_slice()), (1, &[16][..]));
        let energy = record.energy.as_ref().unwrap();
        assert_eq!((energy.window.as_str(), &energy.refused), ("block", &None));
    }
    assert_eq!((&records[0].samples.energy_j, &records[1].samples.energy_window_s), (&vec![450.0], &vec![2.7]));
    // The counted repeats are those of a run without a counter.
    let blind = outcomes_without_counter(&case, &scripts);
    for (outcome, blind) in outcomes.iter().zip(&blind) {
        assert_eq!((&outcome.samples, &outcome.finished), (&blind.samples, &blind.finished));
    }
}

fn outcomes_without_counter(case: &Case, scripts: &[(&str, Vec<FakeRun>)]) -> Vec<VariantOutcome> {
    outcomes(&case.protocol, RunOrder::Interleaved, scripts, &Journal::default())
}

#[test]
fn repeats_long_enough_for_the_counter_are_its_windows() {
    let case = case(&["fp16"], counted(2));
    let reading = |at_ns, joules| MachineReading { at_ns, energy_j: Some(joules), ..MachineReading::default() };
    let long = |joules| Watched { readings: vec![reading(0, 7.0), reading(2_000_000_000, 7.0 + joules)] };
    let mut watch = Scripted { script: [long(300.0), long(500.0)].into(), ..counting(&[(1.0, 1.0)]) };
    let journal = Journal::default();
    let scripts = [("fp16", vec![short_repeat()])];
    let outcomes = watched_outcomes(&case.protocol, RunOrder::Interleaved, &scripts, &journal, &mut watch);
    assert_eq!(journal.borrow().iter().filter(|what| what.starts_with("repeat")).count(), 2, "no block");
    let record = of_counter(&case, &outcomes).remove(0);
    assert_eq!(record.energy.unwrap().window, "repeat");
    assert_eq!((record.samples.energy_tokens, record.metrics["joules_per_token"].median), (vec![4, 4], Some(75.0)));
}

#[test]
fn one_asked_repeat_is_enough_and_each_launch_has_a_block() {
    let case = case(&["fp16"], MeasurementProtocol { launches: 2, ..counted(1) });
    let mut watch = counting(&[(290.0, 2.6), (450.0, 2.6)]);
    let scripts = [("fp16", vec![short_repeat()])];
    let outcomes = watched_outcomes(&case.protocol, RunOrder::InTurn, &scripts, &Journal::default(), &mut watch);
    assert_eq!(outcomes[0].samples.len(), 2);
    let record = of_counter(&case, &outcomes).remove(0);
    assert_eq!((record.samples.energy_tokens.as_slice(), record.metrics["joules_per_token"].n), (&[16, 16][..], 2));
    assert_eq!(record.metrics["joules_per_token"].median, Some(15.0));
}

#[test]
fn a_counter_that_falls_silent_is_told_and_a_worker_that_dies_ends_alone() {
    let case = case(&["fp16", "nf4"], counted(1));
    let dies = FakeRun { failure: Some("it broke".to_owned()), ..short_repeat() };
    let scripts = [("fp16", vec![short_repeat(), short_repeat(), dies]), ("nf4", vec![short_repeat()])];
    // fp16 takes the first mark and dies; nf4 gets a begin, and no end.
    let mut watch = counting(&[(1.0, 1.0)]);
    let outcomes = watched_outcomes(&case.protocol, RunOrder::Interleaved, &scripts, &Journal::default(), &mut watch);
    assert!(outcomes[0].failure.is_some() && outcomes[0].samples.len() == 1);
    assert!(outcomes[1].failure.is_none() && outcomes[1].energy.is_empty());
    let record = of_counter(&case, &outcomes).remove(1);
    let energy = record.energy.unwrap();
    assert_eq!(energy.refused.as_deref(), Some("the nvml counter did not answer in every window"));
    assert_eq!(record.metrics["joules_per_token"].median, None);
}
