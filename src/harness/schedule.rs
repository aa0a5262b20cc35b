//! Who runs when: workers load and warm up one after the other, then hand in repeats ABC BCA CAB, or, where they do not fit
//! together, each runs to its end before the next one starts. Several launches do all of this several times.

use super::measurement_protocol::MeasurementProtocol;
use super::stopping::{RepeatsEnd, Tally, repeats_ended};
use super::watch::energy::Window;
use super::watch::{Watch, Watched};
use crate::events::{Event, Listener, Unit};
use crate::protocol::{Failure, FinishReport, LoadReport, Sample, WarmupReport};

/// One precision, in a process of its own or, in tests, in this one.
pub trait Worker {
    /// For progress.
    fn label(&self) -> &str;
    /// Of the process, once it runs.
    fn pid(&self) -> Option<u32> {
        None
    }
    fn load(&mut self, events: &dyn Listener) -> Result<LoadReport, Failure>;
    fn warm_up(&mut self, events: &dyn Listener) -> Result<WarmupReport, Failure>;
    fn repeat(&mut self, events: &dyn Listener) -> Result<Sample, Failure>;
    fn finish(&mut self, events: &dyn Listener) -> Result<FinishReport, Failure>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Interleaved,
    InTurn,
}

impl Order {
    pub fn name(self) -> &'static str {
        match self {
            Order::Interleaved => "interleaved",
            Order::InTurn => "in_turn",
        }
    }
}

/// Samples of one precision that are discarded at most, and their repeats taken again.
const MAX_DISCARDED: usize = 10;

/// Repeats of a block for the energy counter at most: one of them takes longer than the 0.2 ms that fill a window of 2 s.
const MAX_BLOCK: usize = 10_000;

/// What one precision gave, up to where it failed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// Of the first launch, as the warm-up.
    pub loaded: Option<LoadReport>,
    pub warmed: Option<WarmupReport>,
    pub samples: Vec<Sample>,
    /// Of each sample.
    pub watched: Vec<Watched>,
    /// Of an untimed block of repeats; empty without an energy counter, and where the samples are long enough for it.
    pub energy: Vec<Window>,
    /// Samples that did not count because the device's clock was held down.
    pub n_discarded: usize,
    /// Samples of each launch, in order.
    pub launches: Vec<usize>,
    pub ended: Option<RepeatsEnd>,
    pub finished: Option<FinishReport>,
    pub failure: Option<Failure>,
    /// It did not fit beside the others, and ran when they had ended.
    pub alone: bool,
    /// What its worker was estimated to hold; 0 where that is unknown.
    pub needed_bytes: u64,
}

impl Outcome {
    /// Adds what a later launch gave. Memory is the highest of all, and the first criterion that cut one short is told.
    fn add(&mut self, later: Outcome) {
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

/// Who makes the workers, and what watches them.
pub struct ScheduleContext<'a, 'w> {
    /// A fresh worker for the precision of this index.
    pub start: &'a dyn Fn(usize) -> Box<dyn Worker + 'w>,
    pub n_workers: usize,
    pub order: Order,
    pub watch: &'a mut dyn Watch,
    pub events: &'a dyn Listener,
}

/// Runs all precisions in as many launches as `protocol` says; outcomes come in their order. A worker that fails ends, and the
/// others go on. Only input that no worker can use ends everything.
pub fn measure(context: &mut ScheduleContext, protocol: &MeasurementProtocol) -> Result<Vec<Outcome>, Failure> {
    let mut outcomes = launch(context, protocol, &vec![true; context.n_workers])?;
    for outcome in &mut outcomes {
        outcome.launches.push(outcome.samples.len());
    }
    for _ in 1..protocol.launches {
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
) -> Result<Vec<Outcome>, Failure> {
    let mut protocol = protocol.of_one_launch();
    let slot = |at: usize| if runs[at] { WorkerSlot::new((context.start)(at)) } else { WorkerSlot::empty() };
    let mut slots: Vec<WorkerSlot> = (0..context.n_workers).map(slot).collect();
    match context.order {
        Order::Interleaved => {
            together(&mut slots, &protocol, context.watch, context.events)?;
            again_alone(&mut slots, context, protocol)?;
        }
        Order::InTurn => {
            for at in 0..slots.len() {
                together(&mut slots[at..=at], &protocol, context.watch, context.events)?;
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

/// Runs again, one after the other, what found too little memory beside workers that have ended since: it may fit alone. What has
/// samples from beside the others keeps none of them.
fn again_alone<'w>(
    slots: &mut [WorkerSlot<'w>],
    context: &mut ScheduleContext<'_, 'w>,
    mut protocol: MeasurementProtocol,
) -> Result<(), Failure> {
    let is_oom = |slot: &WorkerSlot| matches!(slot.outcome.failure, Some(Failure::OutOfMemory { .. }));
    // As many repeats as the others took.
    let finished = slots.iter().find(|slot| slot.outcome.finished.is_some());
    protocol.repeats = protocol.repeats.or(finished.map(|slot| slot.outcome.samples.len()));
    for at in 0..slots.len() {
        if is_oom(&slots[at]) && slots[at].has_company {
            slots[at] = WorkerSlot::new((context.start)(at));
            together(&mut slots[at..=at], &protocol, context.watch, context.events)?;
            slots[at].outcome.alone = true;
        }
    }
    Ok(())
}

/// A worker that still runs, and what it gave.
struct WorkerSlot<'a> {
    /// `None` once it ended: dropping it frees its memory.
    worker: Option<Box<dyn Worker + 'a>>,
    outcome: Outcome,
    tally: Tally,
    /// Others held memory when it last needed more.
    has_company: bool,
}

impl<'a> WorkerSlot<'a> {
    fn new(worker: Box<dyn Worker + 'a>) -> Self {
        Self { worker: Some(worker), ..Self::empty() }
    }

    fn empty() -> Self {
        Self { worker: None, outcome: Outcome::default(), tally: Tally::default(), has_company: false }
    }

    fn pid(&self) -> Option<u32> {
        self.worker.as_ref()?.pid()
    }

    /// Asks a worker that still runs. One that fails ends; bad input is handed on.
    fn ask<T>(&mut self, ask: impl FnOnce(&mut dyn Worker) -> Result<T, Failure>) -> Result<Option<T>, Failure> {
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

    /// One repeat that counts: one whose clock was held down is taken again after a pause. `worker_pids` are the processes of all.
    fn repeat(&mut self, worker_pids: &[u32], watch: &mut dyn Watch, events: &dyn Listener) -> Result<(), Failure> {
        while self.worker.is_some() {
            watch.begin(self.pid(), worker_pids);
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
        let begin = watch.energy_mark();
        let tokens = if begin.is_some() { self.block(needed_s, events)? } else { None };
        let end = tokens.and_then(|_| watch.energy_mark());
        events.on(Event::End);
        if let (Some(begin), Some(tokens), Some(end)) = (begin, tokens, end) {
            self.outcome.energy.push(Window::between(begin, end, tokens));
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
fn together(
    slots: &mut [WorkerSlot],
    protocol: &MeasurementProtocol,
    watch: &mut dyn Watch,
    events: &dyn Listener,
) -> Result<(), Failure> {
    for at in 0..slots.len() {
        slots[at].has_company = slots[..at].iter().any(|slot| slot.worker.is_some());
        slots[at].outcome.loaded = slots[at].ask(|worker| worker.load(events))?;
    }
    let n_loaded = slots.iter().filter(|slot| slot.worker.is_some()).count();
    for slot in slots.iter_mut().filter(|slot| slot.worker.is_some()) {
        slot.has_company = n_loaded > 1;
    }
    for slot in slots.iter_mut() {
        slot.outcome.warmed = slot.ask(|worker| phase(worker, events))?;
    }
    repeat(slots, protocol, watch, events)?;
    for slot in slots.iter_mut() {
        slot.measure_energy(watch, events)?;
    }
    for slot in slots.iter_mut() {
        slot.outcome.finished = slot.ask(|worker| worker.finish(events))?;
        slot.worker = None;
    }
    Ok(())
}

fn phase(worker: &mut dyn Worker, events: &dyn Listener) -> Result<WarmupReport, Failure> {
    events.on(Event::Begin { label: format!("warm up {}", worker.label()), total: 1, unit: Unit::Runs });
    let warmed = worker.warm_up(events);
    events.on(Event::End);
    warmed
}

/// Hands out rounds until a criterion holds for all that still run. Each round begins with another slot: between two rounds this
/// process decides whether to go on, and whoever runs next finds its caches and cores colder than the others do.
fn repeat(
    slots: &mut [WorkerSlot],
    protocol: &MeasurementProtocol,
    watch: &mut dyn Watch,
    events: &dyn Listener,
) -> Result<(), Failure> {
    let worker_pids: Vec<u32> = slots.iter().filter_map(WorkerSlot::pid).collect();
    let n_running = slots.iter().filter(|slot| slot.worker.is_some()).count() as u64;
    let at_least = protocol.repeats.unwrap_or(protocol.min_repeats) as u64;
    events.on(Event::Begin { label: "measure".to_owned(), total: n_running * at_least, unit: Unit::Runs });
    let (mut done, mut round) = (0, 0);
    let ended = loop {
        let running: Vec<&Tally> = slots.iter().filter(|slot| slot.worker.is_some()).map(|slot| &slot.tally).collect();
        if running.is_empty() {
            break None;
        }
        if let Some(ended) = repeats_ended(&running, protocol) {
            break Some(ended);
        }
        let n_slots = slots.len();
        for at in 0..n_slots {
            let slot = &mut slots[(round + at) % n_slots];
            slot.repeat(&worker_pids, watch, events)?;
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
