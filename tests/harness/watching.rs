//! What the machine does during the repeats, scripted: discarded samples, warnings, energy, memory; and the ways to run.

use std::collections::BTreeMap;

use quantbench::engine::fake::FakeRun;
use quantbench::engine::memory::PoolUse;
use quantbench::events::Silent;
use quantbench::harness::assemble::records;
use quantbench::harness::schedule::{RunOrder, VariantOutcome, WorkerHandle};
use quantbench::harness::task::{Task, Wait};
use quantbench::harness::watch::energy::Counter;
use quantbench::harness::watch::{GpuReading, MachineReading, Watched};
use quantbench::harness::{Case, MeasurementProtocol, Method, RunContext};
use quantbench::protocol::Failure;
use quantbench::record::{self, Record, Status};

use super::scene::*;

fn gpu(change: impl Fn(&mut GpuReading)) -> Watched {
    let mut gpu = GpuReading { sm_mhz: Some(1980), default_sm_mhz: Some(1980), ..GpuReading::default() };
    change(&mut gpu);
    let reading = |at_ns| MachineReading { at_ns, gpu: Some(gpu.clone()), ..MachineReading::default() };
    Watched { readings: vec![reading(0), reading(100), reading(200)] }
}

fn clock(mhz: u32) -> Watched {
    gpu(|gpu| gpu.sm_mhz = Some(mhz))
}

/// fp16's record of `counted` repeats under a scripted watch, and the watch.
fn watched(repeats: usize, script: Vec<Watched>) -> (Record, VariantOutcome, Scripted) {
    let case = case(&["fp16"], counted(repeats));
    let mut watch = Scripted { script: script.into(), ..Scripted::default() };
    let scripts = [("fp16", vec![run_ms(50, &[10])])];
    let outcomes = watched_outcomes(&case.protocol, RunOrder::Interleaved, &scripts, &Journal::default(), &mut watch);
    let record = records(&facts(&case), &case, &outcomes, &|_| None).remove(0);
    (record, outcomes.into_iter().next().unwrap(), watch)
}

fn names(record: &Record) -> Vec<&str> {
    record.warnings.iter().map(|text| text.split(':').next().unwrap()).collect()
}

#[test]
fn a_sample_at_a_low_clock_is_taken_again_after_a_pause() {
    let journal = Journal::default();
    let mut watch = Scripted {
        script: [clock(1980), clock(1980), clock(1400), clock(1300), clock(1485), clock(1980)].into(),
        ..Scripted::default()
    };
    let scripts = [("fp16", vec![run_ms(50, &[10])]), ("nf4", vec![run_ms(50, &[10])])];
    let outcomes = watched_outcomes(&counted(2), RunOrder::Interleaved, &scripts, &journal, &mut watch);
    let repeats: Vec<String> = journal.borrow().iter().filter(|what| what.starts_with("repeat")).cloned().collect();
    let of = |name: &str| format!("repeat {name}");
    assert_eq!(repeats, [of("fp16"), of("nf4"), of("nf4"), of("nf4"), of("nf4"), of("fp16")]);
    assert_eq!(outcomes.iter().map(|outcome| outcome.samples.len()).collect::<Vec<_>>(), [2, 2]);
    assert_eq!((outcomes[0].n_discarded, outcomes[1].n_discarded, watch.n_pauses), (0, 2, 2));
    let case = case(&["fp16", "nf4"], counted(2));
    let records = records(&facts(&case), &case, &outcomes, &|_| None);
    assert_eq!((names(&records[1]), records[1].tainted), (vec!["discarded"], false));
    assert_eq!((records[1].protocol.n_discarded, names(&records[0]).len()), (2, 0));
}

#[test]
fn a_clock_that_stays_low_is_kept_in_the_end_and_taints() {
    let (record, outcome, watch) = watched(2, vec![clock(900); 12]);
    assert_eq!((outcome.samples.len(), outcome.n_discarded, watch.n_pauses), (2, 10, 10));
    assert_eq!((names(&record), record.tainted), (vec!["low_clock", "discarded"], true));
    assert!(record.warnings[0].contains("900 MHz instead of 1980 in 2 of 2 repeats"), "{}", record.warnings[0]);
}

#[test]
fn every_cause_has_its_warning_with_advice() {
    let throttled = gpu(|gpu| gpu.throttled_by = vec!["power cap", "temperature"]);
    let shared = gpu(|gpu| gpu.n_others = 2);
    let hot = |counts: [u64; 2]| Watched {
        readings: counts
            .map(|count| MachineReading { cpu_throttle_count: Some(count), ..MachineReading::default() })
            .to_vec(),
    };
    let causes = [
        (vec![gpu(|_| {}), hot([5, 5])], "", ""),
        (vec![gpu(|_| {}), throttled], "gpu_throttled", "in 1 of 2 repeats (power cap, temperature); cool it"),
        (vec![hot([5, 7]), hot([7, 8])], "cpu_throttled", "3 times during the repeats; cool it"),
        (vec![shared], "gpu_shared", "2 other processes use the GPU; stop them"),
    ];
    for (script, name, part) in causes {
        let (record, ..) = watched(2, script);
        let expected: Vec<&str> = Some(name).filter(|name| !name.is_empty()).into_iter().collect();
        assert_eq!((names(&record), record.tainted), (expected, !name.is_empty()));
        assert!(record.warnings.iter().all(|text| text.contains(part)), "{:?}", record.warnings);
    }
}

/// A repeat over which the counter moved.
fn energy(joules: f64, seconds: f64) -> Watched {
    let reading = |at_ns, energy_j| MachineReading { at_ns, energy_j: Some(energy_j), ..MachineReading::default() };
    Watched { readings: vec![reading(7, 1000.0), reading(7 + (seconds * 1e9) as u64, 1000.0 + joules)] }
}

fn energetic(script: Vec<Watched>, change: impl Fn(&mut VariantOutcome)) -> Record {
    let (_, mut outcome, _) = watched(script.len(), script.clone());
    change(&mut outcome);
    let case = case(&["fp16"], counted(script.len()));
    let counter = Counter { name: "nvml", period_s: 0.1, idle_watts: Some(50.0) };
    let facts = RunContext { counter: Some(counter), ..facts(&case) };
    records(&facts, &case, &[outcome], &|_| None).remove(0)
}

#[test]
fn joules_per_token_are_those_above_idle() {
    // 4 tokens a repeat; 50 W of them are the idle machine's: 100, 120 and 100 J are left.
    let script = vec![energy(200.0, 2.0), energy(270.0, 3.0), energy(200.0, 2.0)];
    let record = energetic(script.clone(), |_| {});
    let summary = &record.metrics["joules_per_token"];
    assert_eq!((summary.median, summary.max, summary.n), (Some(25.0), Some(30.0), 3));
    assert_eq!(
        (&record.samples.energy_j, &record.samples.energy_window_s),
        (&vec![200.0, 270.0, 200.0], &vec![2.0, 3.0, 2.0])
    );
    assert_eq!(record.samples.energy_tokens, [4, 4, 4]);
    let told = record.energy.unwrap();
    assert_eq!((told.source.as_str(), told.idle_watts, told.refused), ("nvml", Some(50.0), None));
    assert_eq!(told.window, "repeat");
    // A run that waits after every token lies in the same window.
    let both = energetic(script, |outcome| {
        outcome.samples.iter_mut().for_each(|sample| sample.synced_step_ns = vec![10_000_000; 3]);
    });
    assert_eq!(both.metrics["joules_per_token"].median, Some(12.5));
}

#[test]
fn windows_that_are_too_short_give_no_joules() {
    let record = energetic(vec![energy(200.0, 2.0), energy(90.0, 0.9)], |_| {});
    assert_eq!(record.metrics["joules_per_token"].median, None);
    let refused = record.energy.unwrap().refused.unwrap();
    assert_eq!(refused, "a window is 0.90 s long and the nvml counter needs 2.00 s");
    let silent = energetic(vec![energy(200.0, 2.0), Watched::default()], |_| {});
    assert!(silent.energy.unwrap().refused.unwrap().contains("did not answer"));
    assert!(silent.samples.energy_j.is_empty());
}

#[test]
fn ranges_are_always_kept_and_series_on_request() {
    let reading = |ms: u64, mhz: [u32; 2], celsius| MachineReading {
        at_ns: ms * 1_000_000,
        core_mhz: mhz.to_vec(),
        cpu_celsius: celsius,
        ..MachineReading::default()
    };
    let script = Watched { readings: vec![reading(5, [2000, 3000], None), reading(15, [2500, 2600], Some(61.5))] };
    let (record, outcome, _) = watched(1, vec![script]);
    let expected = record::Range { min: 2000.0, median: 2550.0, max: 3000.0, n: 4 };
    assert_eq!((record.monitor["cpu_mhz"], record.monitor["cpu_temperature_c"].n), (expected, 1));
    assert!(record.series.is_empty());

    let case = case(&["fp16"], MeasurementProtocol { keep_series: true, ..counted(1) });
    let record = records(&facts(&case), &case, &[outcome], &|_| None).remove(0);
    let series = &record.series[0];
    assert_eq!(series.at_ms, [0.0, 10.0]);
    let values = BTreeMap::from([
        ("cpu_mhz.0".to_owned(), vec![Some(2000.0), Some(2500.0)]),
        ("cpu_mhz.1".to_owned(), vec![Some(3000.0), Some(2600.0)]),
        ("cpu_temperature_c".to_owned(), vec![None, Some(61.5)]),
    ]);
    assert_eq!((series.values.clone(), record.series.len()), (values, 1));
}

#[test]
fn the_watch_knows_the_worker_and_its_crew() {
    let mut watch = Scripted::default();
    let start = |at: usize| -> Box<dyn WorkerHandle> {
        let local = Local::new("fp16", task(), vec![filling(), run_ms(1, &[1])], &Journal::default());
        Box::new(Local { pid: Some(70 + at as u32), ..local })
    };
    let order = RunOrder::Interleaved;
    let mut stage = quantbench::harness::schedule::ScheduleContext {
        start: &start,
        n_workers: 2,
        order,
        watch: &mut watch,
        events: &Silent,
    };
    quantbench::harness::schedule::measure(&mut stage, &counted(1)).unwrap();
    assert_eq!(watch.crews, [(Some(70), vec![70, 71]), (Some(71), vec![70, 71])]);
}

#[test]
fn launches_start_every_worker_anew_and_keep_their_repeats_apart() {
    let journal = Journal::default();
    let protocol = MeasurementProtocol { launches: 3, ..counted(2) };
    let scripts = [("fp16", vec![run_ms(50, &[20])]), ("nf4", vec![run_ms(50, &[10])])];
    let outcomes = outcomes(&protocol, RunOrder::Interleaved, &scripts, &journal);
    let said = |what: &str, order: [&str; 2]| order.map(|name| format!("{what} {name}"));
    let (ab, ba) = (["fp16", "nf4"], ["nf4", "fp16"]);
    let one = [said("load", ab), said("warm", ab), said("repeat", ab), said("repeat", ba), said("finish", ab)].concat();
    assert_eq!(*journal.borrow(), [one.clone(), one.clone(), one].concat());
    let case = case(&["fp16", "nf4"], protocol);
    let records = records(&facts(&case), &case, &outcomes, &|_| None);
    let nf4 = &records[1];
    assert_eq!((nf4.samples.launches.as_slice(), nf4.protocol.n_repeats), (&[2, 2, 2][..], 6));
    assert_eq!(nf4.protocol.interval, "between-launches");
    // Three starts carry no interval, neither of a speed nor of a ratio.
    assert_eq!((names(nf4), nf4.metrics["decode_tps"].ci95_low), (vec!["few_launches"], None));
    let ratio = nf4.ratio_to_fp16.unwrap();
    assert_eq!((ratio.median, ratio.ci95_low), (2.0, None));
}

#[test]
fn the_interval_of_launches_spans_them() {
    // Six starts; each is flat in itself, and they differ by up to 5 ms a step.
    let case = case(&["fp16"], MeasurementProtocol { launches: 6, ..counted(4) });
    let mut outcome = VariantOutcome::default();
    for start in 0..6u64 {
        let steps = [10 + start; 3];
        let one =
            outcomes(&counted(4), RunOrder::Interleaved, &[("fp16", vec![run_ms(50, &steps)])], &Journal::default());
        outcome.samples.extend(one[0].samples.clone());
        outcome.launches.push(4);
    }
    let record = records(&facts(&case), &case, &[outcome], &|_| None).remove(0);
    let spanned = &record.metrics["tpot_ms"];
    assert_eq!((spanned.median, spanned.ci95_low, spanned.ci95_high), (Some(12.5), Some(10.5), Some(14.5)));
}

#[test]
fn launches_share_the_times_and_a_failure_ends_its_precision() {
    let protocol = MeasurementProtocol { launches: 4, ..MeasurementProtocol::default() };
    let one = protocol.one_launch();
    assert_eq!((one.min_time_s, one.max_time_s, one.min_repeats), (0.75, 5.0, 6));
    let journal = Journal::default();
    let bad = FakeRun { failure: Some("it broke".to_owned()), ..run_ms(50, &[10]) };
    let scripts = [("fp16", vec![run_ms(50, &[10])]), ("nf4", vec![bad])];
    let protocol = MeasurementProtocol { launches: 2, ..counted(1) };
    let outcomes = outcomes(&protocol, RunOrder::Interleaved, &scripts, &journal);
    assert!(matches!(&outcomes[1].failure, Some(Failure::Error { message }) if message == "it broke"));
    assert_eq!((outcomes[0].launches.as_slice(), outcomes[1].launches.as_slice()), (&[1, 1][..], &[0][..]));
    assert_eq!(journal.borrow().iter().filter(|what| *what == "load nf4").count(), 1);
}

/// A run whose device is asked after every token at a cost of 5 ms.
fn slow_to_wait() -> FakeRun {
    let device_step_ns = vec![8_000_000, 16_000_000, 24_000_000];
    FakeRun { synchronize_ns: 5_000_000, device_step_ns, ..run_ms(50, &[10, 20, 30]) }
}

fn of_task(task: Task, protocol: MeasurementProtocol, run: FakeRun) -> Record {
    let case = case(&["fp16"], protocol);
    let local = Local::new("fp16", task, vec![filling(), run], &Journal::default());
    let outcomes =
        measure(vec![Box::new(local) as Box<dyn WorkerHandle>], &case.protocol, RunOrder::Interleaved, &Silent);
    records(&facts(&case), &case, &outcomes.unwrap(), &|_| None).remove(0)
}

#[test]
fn waiting_after_each_token_is_timed_beside_the_repeat() {
    let task = Task { wait: Wait::BothWays, ..task() };
    let record = of_task(task, MeasurementProtocol { sync_each_token: true, ..counted(2) }, slow_to_wait());
    assert_eq!(metric(&record, "decode_tps"), Some(3.0 / 0.06));
    assert_eq!(metric(&record, "decode_synced_tps"), Some(3.0 / 0.075));
    assert_eq!(record.samples.decode_step_ns[1], [10_000_000, 20_000_000, 30_000_000]);
    assert_eq!(record.samples.synced_step_ns[1], [15_000_000, 25_000_000, 35_000_000]);
    assert_eq!(names(&record), ["sync_differs"]);
    assert!(record.warnings[0].contains("50.0 tokens/s, and 40.0 where"), "{}", record.warnings[0]);
    assert_eq!((record.tainted, record.samples.end_to_end_ns[0]), (false, 110_000_000));
    let cheap = FakeRun { synchronize_ns: 500_000, ..slow_to_wait() };
    let record = of_task(Task { wait: Wait::BothWays, ..super::scene::task() }, counted(2), cheap);
    assert_eq!(names(&record), [""; 0], "2.4 % are not told");
}

#[test]
fn the_seeds_method_is_one_cold_run_that_waits() {
    let protocol = MeasurementProtocol::single_cold_run();
    assert_eq!((protocol.warmup, protocol.repeats), (Some(0), Some(1)));
    let record = of_task(Task { wait: Wait::EachToken, ..task() }, protocol, slow_to_wait());
    assert_eq!(
        (record.protocol.method.as_str(), record.protocol.n_repeats, record.protocol.n_warmup),
        ("single-cold-run", 1, 0)
    );
    assert_eq!(Method::SingleColdRun.name(), "single-cold-run");
    // 50 ms of prefill and three steps with 5 ms of waiting each, behind which the stamps are.
    assert_eq!((metric(&record, "latency_s"), metric(&record, "output_tps")), (Some(0.125), Some(32.0)));
    assert_eq!((record.samples.cold_ns, record.status), (None, Status::Ok));
    assert!(record.samples.synced_step_ns.is_empty());
}

#[test]
fn the_devices_own_clock_stands_beside_the_hosts() {
    let record = of_task(task(), counted(2), slow_to_wait());
    assert_eq!(metric(&record, "device_itl_ms"), Some(16.0));
    assert_eq!(metric(&record, "device_share"), Some(0.8));
    assert_eq!(record.samples.device_step_ns.len(), 2);
}

#[test]
fn a_pools_marks_become_the_memory_of_a_device() {
    let held = gpu(|gpu| gpu.process_bytes = Some(9000));
    let (_, mut outcome, _) = watched(2, vec![held]);
    let finished = outcome.finished.as_mut().unwrap();
    let phase = |used_bytes, used_high_bytes| PoolUse {
        used_bytes,
        used_high_bytes,
        reserved_bytes: 4000,
        reserved_high_bytes: 5000,
    };
    let phases = [
        ("load", 1900, 2500),
        ("prefill", 2000, 2400),
        ("decode", 2000, 2100),
        ("start", 1960, 2000),
        ("run", 1970, 2300),
    ];
    finished.pool = phases.map(|(name, used, high)| (name.to_owned(), phase(used, high))).into();
    finished.release_threshold_bytes = Some(u64::MAX);
    outcome.loaded.as_mut().unwrap().load_peak_bytes = Some(77);
    let by_format = BTreeMap::from([("fp16".to_owned(), 400), ("nf4".to_owned(), 600)]);
    outcome.loaded.as_mut().unwrap().own.weights_by_format = by_format.clone();
    let case = case(&["fp16"], counted(2));
    let device = record::DeviceFacts { kind: "cuda".to_owned(), name: "cuda:0".to_owned() };
    let memory = &records(&RunContext { device, ..facts(&case) }, &case, &[outcome.clone()], &|_| None)[0].memory;
    assert_eq!((memory.start_bytes, memory.peak_bytes, memory.end_bytes), (Some(1960), Some(2300), Some(1970)));
    let peaks = (memory.load_peak_bytes, memory.prefill_peak_bytes, memory.decode_peak_bytes);
    assert_eq!(peaks, (Some(2500), Some(2400), Some(2100)));
    // 1200 of weights as they lie, 500 of cache and 60 of scratch are known of the 1960.
    assert_eq!((memory.other_bytes, memory.weights_resident_bytes), (Some(200), Some(1200)));
    assert_eq!((memory.device_process_bytes, memory.context_bytes), (Some(9000), Some(4000)));
    assert_eq!((&memory.weights_by_format, memory.process_peak_rss_bytes), (&by_format, Some(77)));
    let pool = memory.pool.as_ref().unwrap();
    assert_eq!((pool.release_threshold_bytes, pool.phases.len()), (Some(u64::MAX), 5));
    assert_eq!(pool.phases["run"].reserved_high_bytes, 5000);
    // A worker on the CPU accounts for its resident set instead.
    let memory = &records(&facts(&case), &case, &[outcome], &|_| None)[0].memory;
    assert_eq!((memory.load_peak_bytes, memory.start_bytes, &memory.pool), (Some(77), None, &None));
}

#[test]
fn lengths_and_statuses_do_not_depend_on_the_watch() {
    let (record, ..) = watched(3, vec![gpu(|_| {}); 3]);
    let blind = Case { n_gen: N_GEN, ..case(&["fp16"], counted(3)) };
    let plain = measured(blind.protocol, &[("fp16", vec![run_ms(50, &[10])])]).remove(0);
    assert_eq!((record.status, record.samples, record.metrics), (plain.status, plain.samples, plain.metrics));
}
