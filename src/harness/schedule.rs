//! The order of work: workers load and warm up one after the other, then run repeats ABC BCA CAB. Where they do not fit
//! together, each runs to its end before the next one starts. Several launches do all of this several times.

use super::load::LoadReport;
use super::measured::{FinishReport, Sample, WarmupReport};
use super::measurement_protocol::MeasurementProtocol;
use super::stopping::{RepeatTally, RepeatsEnd, repeats_ended, repeats_left};
use super::watch::energy::EnergyWindow;
use super::watch::{Watch, Watched};
use crate::events::{Event, Listener, Unit};
use crate::protocol::Failure;
use crate::stats;

/// One variant, in a process of its own or, in tests, in this one.
pub trait WorkerHandle {
    /// Name in progress.
    fn label(&self) -> &str;
    /// Number of the process, once it runs.
    fn pid(&self) -> Option<u32> {
        None
    }
    fn load(&mut self, events: &dyn Listener) -> Result<LoadReport, Failure>;
    /// Makes ready for a counted run: one that was stopped while others ran goes on, with one run that counts for nothing.
    fn take_turn(&mut self, _events: &dyn Listener) -> Result<(), Failure> {
        Ok(())
    }
    fn warm_up(&mut self, events: &dyn Listener) -> Result<WarmupReport, Failure>;
    fn repeat(&mut self, events: &dyn Listener) -> Result<Sample, Failure>;
    fn finish(&mut self, events: &dyn Listener) -> Result<FinishReport, Failure>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunOrder {
    Interleaved,
    InTurn,
}

impl RunOrder {
    pub fn name(self) -> &'static str {
        match self {
            RunOrder::Interleaved => "interleaved",
            RunOrder::InTurn => "in_turn",
        }
    }
}

/// Most samples of one variant that are discarded, each with its repeat taken again.
const MAX_DISCARDED: usize = 10;

/// Most repeats of a block for the energy counter: each takes longer than the 0.2 ms at which so many fill a window of 2 s.
const MAX_BLOCK: usize = 10_000;

/// Why a precision has no repeats where the user ended the run.
const INTERRUPTED: &str = "interrupted before its first repeat";

/// Measurements of one variant, up to where it failed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VariantOutcome {
    /// Load and warm-up are those of the first launch.
    pub loaded: Option<LoadReport>,
    pub warmed: Option<WarmupReport>,
    pub samples: Vec<Sample>,
    /// Readings of the machine during each sample.
    pub watched: Vec<Watched>,
    /// Energy of an untimed block of repeats; empty without an energy counter, and where the samples are long enough for it.
    pub energy: Vec<EnergyWindow>,
    /// Samples that did not count because the device's clock was held down.
    pub n_discarded: usize,
    /// Samples of each launch, in order.
    pub launches: Vec<usize>,
    pub ended: Option<RepeatsEnd>,
    pub finished: Option<FinishReport>,
    pub failure: Option<Failure>,
    /// The variant did not fit in memory beside the others, and ran after them.
    pub alone: bool,
    /// Estimated memory of its worker; 0 where unknown.
    pub needed_bytes: u64,
}

impl VariantOutcome {
    /// Adds what a later launch gave. Memory is the highest of all; of the criteria, the first that
    /// cut a launch short is kept.
    fn add(&mut self, later: VariantOutcome) {
        self.launches.push(later.samples.len());
        self.samples.extend(later.samples);
        self.watched.extend(later.watched);
        self.energy.extend(later.energy);
        self.n_discarded += later.n_discarded;
        self.failure = later.failure;
        self.alone |= later.alone;
        self.ended = match (self.ended, later.ended) {
            (Some(first), Some(_)) if first != RepeatsEnd::RelCi => Some(first),
            (_, later) => later,
        };
        self.finished = match (self.finished.take(), later.finished) {
            (Some(first), Some(later)) => Some(first.highest(later)),
            (_, later) => later,
        };
    }
}

/// All that a schedule runs with: a source of workers, the watch of the machine, and progress.
pub struct ScheduleContext<'a, 'w> {
    /// A fresh worker for the precision of this index.
    pub start: &'a dyn Fn(usize) -> Box<dyn WorkerHandle + 'w>,
    pub n_workers: usize,
    pub order: RunOrder,
    pub watch: &'a mut dyn Watch,
    pub events: &'a dyn Listener,
}

/// Runs all variants in the launches of `protocol`; outcomes are in their order. A worker that fails ends, and the others continue.
/// Fails only on input that no worker can use.
pub fn measure(context: &mut ScheduleContext, protocol: &MeasurementProtocol) -> Result<Vec<VariantOutcome>, Failure> {
    let mut outcomes = launch(context, protocol, &vec![true; context.n_workers])?;
    for outcome in &mut outcomes {
        outcome.launches.push(outcome.samples.len());
    }
    for _ in 1..protocol.launches {
        if context.watch.is_interrupted() {
            break;
        }
        let runs: Vec<bool> = outcomes.iter().map(|outcome| outcome.failure.is_none()).collect();
        let later = launch(context, protocol, &runs)?;
        for (outcome, later) in outcomes.iter_mut().zip(later).filter(|(outcome, _)| outcome.failure.is_none()) {
            outcome.add(later);
        }
    }
    Ok(outcomes)
}

/// One start of every worker that `runs`.
fn launch(
    context: &mut ScheduleContext,
    protocol: &MeasurementProtocol,
    runs: &[bool],
) -> Result<Vec<VariantOutcome>, Failure> {
    let mut protocol = protocol.one_launch();
    let slot = |at: usize| if runs[at] { WorkerSlot::new((context.start)(at)) } else { WorkerSlot::empty() };
    let mut slots: Vec<WorkerSlot> = (0..context.n_workers).map(slot).collect();
    match context.order {
        RunOrder::Interleaved => {
            run_slots(&mut slots, &protocol, context.watch, context.events)?;
            rerun_alone(&mut slots, context, protocol)?;
        }
        RunOrder::InTurn => {
            for at in 0..slots.len() {
                run_slots(&mut slots[at..=at], &protocol, context.watch, context.events)?;
                // The others take as many repeats as the first that ran, so that counts are equal.
                let n = slots[at].outcome.samples.len();
                if protocol.repeats.is_none() && slots[at].outcome.finished.is_some() {
                    protocol.repeats = Some(n);
                }
            }
        }
    }
    Ok(slots.into_iter().map(|slot| slot.outcome).collect())
}

/// Runs variants again, one after the other, that found too little memory beside workers that have ended since: they may fit alone.
/// Their samples from beside the others are dropped.
fn rerun_alone<'w>(
    slots: &mut [WorkerSlot<'w>],
    context: &mut ScheduleContext<'_, 'w>,
    mut protocol: MeasurementProtocol,
) -> Result<(), Failure> {
    let is_oom = |slot: &WorkerSlot| matches!(slot.outcome.failure, Some(Failure::OutOfMemory { .. }));
    // The same number of repeats as the others.
    let finished = slots.iter().find(|slot| slot.outcome.finished.is_some());
    protocol.repeats = protocol.repeats.or(finished.map(|slot| slot.outcome.samples.len()));
    for at in 0..slots.len() {
        if is_oom(&slots[at]) && slots[at].beside_others {
            slots[at] = WorkerSlot::new((context.start)(at));
            run_slots(&mut slots[at..=at], &protocol, context.watch, context.events)?;
            slots[at].outcome.alone = true;
        }
    }
    Ok(())
}

/// A worker that still runs, and what it gave.
struct WorkerSlot<'a> {
    /// `None` once it ended: dropping it frees its memory.
    worker: Option<Box<dyn WorkerHandle + 'a>>,
    outcome: VariantOutcome,
    tally: RepeatTally,
    /// Others held memory when it last needed more.
    beside_others: bool,
}

impl<'a> WorkerSlot<'a> {
    fn new(worker: Box<dyn WorkerHandle + 'a>) -> Self {
        Self { worker: Some(worker), ..Self::empty() }
    }

    fn empty() -> Self {
        Self { worker: None, outcome: VariantOutcome::default(), tally: RepeatTally::default(), beside_others: false }
    }

    fn pid(&self) -> Option<u32> {
        self.worker.as_ref()?.pid()
    }

    /// Asks a worker that still runs. One that fails ends; bad input is an error for all.
    fn ask<T>(&mut self, ask: impl FnOnce(&mut dyn WorkerHandle) -> Result<T, Failure>) -> Result<Option<T>, Failure> {
        let Some(worker) = self.worker.as_mut() else { return Ok(None) };
        match ask(worker.as_mut()) {
            Ok(answer) => Ok(Some(answer)),
            Err(failure @ Failure::BadInput { .. }) => Err(failure),
            Err(failure) => {
                self.worker = None;
                self.outcome.failure = Some(failure);
                Ok(None)
            }
        }
    }

    /// Ends a worker that has measured nothing yet, where the user wants no more.
    fn end_if(&mut self, is_interrupted: bool) {
        if is_interrupted && self.worker.is_some() && self.outcome.samples.is_empty() {
            self.worker = None;
            self.outcome.failure = Some(Failure::Error { message: INTERRUPTED.to_owned() });
        }
    }

    /// One counted repeat. A repeat whose clock was held down is repeated after a pause. `run_pids` are the processes of all workers.
    fn repeat(&mut self, run_pids: &[u32], watch: &mut dyn Watch, events: &dyn Listener) -> Result<(), Failure> {
        while self.worker.is_some() {
            self.ask(|worker| worker.take_turn(events))?;
            watch.begin(self.pid(), run_pids);
            let sample = self.ask(|worker| worker.repeat(events));
            let watched = watch.end();
            let Some(sample) = sample? else { return Ok(()) };
            if watched.slow_clock().is_none() || self.outcome.n_discarded >= MAX_DISCARDED {
                self.tally.add(sample.prefill_ns, sample.end_to_end_ns);
                self.outcome.samples.push(sample);
                self.outcome.watched.push(watched);
                return Ok(());
            }
            self.outcome.n_discarded += 1;
            watch.pause();
        }
        Ok(())
    }

    /// Untimed repeats back to back until they are long enough for the energy counter, where the counted ones are not. Less than twice as long
    /// as it needs: no repeat of the block is as long as that.
    fn measure_energy(&mut self, watch: &mut dyn Watch, events: &dyn Listener) -> Result<(), Failure> {
        let Some(needed_s) = watch.energy_window_s() else { return Ok(()) };
        let is_long = |watched: &Watched| watched.window(0).is_some_and(|window| window.seconds >= needed_s);
        if self.worker.is_none() || self.outcome.watched.iter().all(is_long) {
            return Ok(());
        }
        let label = self.worker.as_ref().map_or("", |worker| worker.label());
        events.on(Event::Begin { label: format!("energy {label}"), total: 1, unit: Unit::Runs });
        self.ask(|worker| worker.take_turn(events))?;
        let begin = watch.energy_mark();
        let tokens = if begin.is_some() { self.block(needed_s, events)? } else { None };
        let end = tokens.and_then(|_| watch.energy_mark());
        events.on(Event::End);
        if let (Some(begin), Some(tokens), Some(end)) = (begin, tokens, end) {
            self.outcome.energy.push(EnergyWindow::between(begin, end, tokens));
        }
        Ok(())
    }

    /// The tokens of repeats that take `needed_s` together; `None` where the worker ended.
    fn block(&mut self, needed_s: f64, events: &dyn Listener) -> Result<Option<u64>, Failure> {
        let (mut tokens, mut total_ns) = (0, 0);
        for _ in 0..MAX_BLOCK {
            let Some(sample) = self.ask(|worker| worker.repeat(events))? else { return Ok(None) };
            tokens += sample.n_tokens();
            total_ns += sample.total_ns();
            if total_ns as f64 >= needed_s * 1e9 {
                break;
            }
        }
        Ok(Some(tokens))
    }
}

/// Loads, warms up, repeats in rounds, measures energy one after the other, and finishes.
fn run_slots(
    slots: &mut [WorkerSlot],
    protocol: &MeasurementProtocol,
    watch: &mut dyn Watch,
    events: &dyn Listener,
) -> Result<(), Failure> {
    for at in 0..slots.len() {
        slots[at].end_if(watch.is_interrupted());
        slots[at].beside_others = slots[..at].iter().any(|slot| slot.worker.is_some());
        slots[at].outcome.loaded = slots[at].ask(|worker| worker.load(events))?;
    }
    let n_loaded = slots.iter().filter(|slot| slot.worker.is_some()).count();
    for slot in slots.iter_mut().filter(|slot| slot.worker.is_some()) {
        slot.beside_others = n_loaded > 1;
    }
    for slot in slots.iter_mut() {
        slot.end_if(watch.is_interrupted());
        slot.outcome.warmed = slot.ask(|worker| phase(worker, events))?;
    }
    repeat(slots, protocol, watch, events)?;
    let wants_energy = !watch.is_interrupted();
    for slot in slots.iter_mut().filter(|_| wants_energy) {
        slot.measure_energy(watch, events)?;
    }
    for slot in slots.iter_mut() {
        slot.outcome.finished = slot.ask(|worker| worker.finish(events))?;
        slot.worker = None;
    }
    Ok(())
}

fn phase(worker: &mut dyn WorkerHandle, events: &dyn Listener) -> Result<WarmupReport, Failure> {
    events.on(Event::Begin { label: format!("warm up {}", worker.label()), total: 1, unit: Unit::Runs });
    let warmed = worker.warm_up(events);
    events.on(Event::End);
    warmed
}

/// Runs one repeat per worker, round-robin, until a criterion holds for all that still run. Each round begins with another slot: between two rounds this
/// process decides whether to continue, and the next worker finds its caches and cores colder than the others do.
fn repeat(
    slots: &mut [WorkerSlot],
    protocol: &MeasurementProtocol,
    watch: &mut dyn Watch,
    events: &dyn Listener,
) -> Result<(), Failure> {
    let run_pids: Vec<u32> = slots.iter().filter_map(WorkerSlot::pid).collect();
    let n_running = slots.iter().filter(|slot| slot.worker.is_some()).count() as u64;
    let total = n_running * repeats_left(&[&RepeatTally::default()], protocol) as u64;
    events.on(Event::Begin { label: "measure".to_owned(), total, unit: Unit::Runs });
    let (mut done, mut round) = (0, 0);
    let ended = loop {
        slots.iter_mut().for_each(|slot| slot.end_if(watch.is_interrupted()));
        let running: Vec<&RepeatTally> =
            slots.iter().filter(|slot| slot.worker.is_some()).map(|slot| &slot.tally).collect();
        if running.is_empty() {
            break None;
        }
        if let Some(ended) = repeats_ended(&running, protocol) {
            break Some(ended);
        }
        if watch.is_interrupted() {
            break Some(RepeatsEnd::Interrupted);
        }
        if round > 0 {
            let left = repeats_left(&running, protocol).max(1) * running.len();
            events.on(Event::Expect { total: done + left as u64 });
            events.on(Event::Status { text: so_far(slots) });
        }
        let n_slots = slots.len();
        for at in 0..n_slots {
            let slot = &mut slots[(round + at) % n_slots];
            slot.repeat(&run_pids, watch, events)?;
            done += u64::from(slot.worker.is_some());
            events.on(Event::Progress { done });
        }
        round += 1;
    };
    events.on(Event::End);
    for slot in slots.iter_mut().filter(|slot| slot.worker.is_some()) {
        slot.outcome.ended = ended;
    }
    Ok(())
}

/// The decode speed of each precision as it looks now: `fp16 71.7, nf4 214 tokens/s`.
fn so_far(slots: &[WorkerSlot]) -> String {
    let speed = |slot: &WorkerSlot| {
        let label = slot.worker.as_ref()?.label().to_owned();
        let tps = |sample: &Sample| {
            let ns: u64 = sample.step_ns.iter().sum();
            (ns > 0).then(|| sample.step_ns.len() as f64 * 1e9 / ns as f64)
        };
        let speeds: Vec<f64> = slot.outcome.samples.iter().filter_map(tps).collect();
        let median = stats::median(&speeds)?;
        let decimals = if median < 100.0 { 1 } else { 0 };
        Some(format!("{label} {median:.decimals$}"))
    };
    let speeds: Vec<String> = slots.iter().filter_map(speed).collect();
    if speeds.is_empty() { String::new() } else { format!("{} tokens/s", speeds.join(", ")) }
}
