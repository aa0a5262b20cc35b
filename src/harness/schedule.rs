//! Who runs when: workers load and warm up one after the other, then hand in repeats ABCABC, or, where they do not fit
//! together, each runs to its end before the next one starts.

use super::Protocol;
use super::protocol::{Failure, Finished, LoadFacts, Sample, Warmed};
use super::stopping::{RepeatsEnd, Tally, repeats_ended};
use crate::events::{Event, Listener, Unit};

/// One precision, in a process of its own or, in tests, in this one.
pub trait Worker {
    fn precision(&self) -> &str;
    fn load(&mut self, events: &dyn Listener) -> Result<LoadFacts, Failure>;
    fn warm_up(&mut self, events: &dyn Listener) -> Result<Warmed, Failure>;
    fn repeat(&mut self, events: &dyn Listener) -> Result<Sample, Failure>;
    fn finish(&mut self, events: &dyn Listener) -> Result<Finished, Failure>;
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

/// What one worker gave, up to where it failed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    pub loaded: Option<LoadFacts>,
    pub warmed: Option<Warmed>,
    pub samples: Vec<Sample>,
    pub ended: Option<RepeatsEnd>,
    pub finished: Option<Finished>,
    pub failure: Option<Failure>,
}

/// Runs all workers; outcomes come in their order. A worker that fails ends, and the others go on. Only input that no worker
/// can use ends everything.
pub fn measure<'a>(
    workers: Vec<Box<dyn Worker + 'a>>,
    protocol: &Protocol,
    order: Order,
    events: &dyn Listener,
) -> Result<Vec<Outcome>, Failure> {
    let mut lanes: Vec<Lane> = workers.into_iter().map(Lane::new).collect();
    match order {
        Order::Interleaved => together(&mut lanes, protocol, events)?,
        Order::InTurn => {
            let mut protocol = protocol.clone();
            for at in 0..lanes.len() {
                together(&mut lanes[at..=at], &protocol, events)?;
                // The others take as many repeats as the first that ran, so that counts are equal.
                let n = lanes[at].outcome.samples.len();
                if protocol.repeats.is_none() && lanes[at].outcome.finished.is_some() {
                    protocol.repeats = Some(n);
                }
            }
        }
    }
    Ok(lanes.into_iter().map(|lane| lane.outcome).collect())
}

/// A worker that still runs, and what it gave.
struct Lane<'a> {
    /// `None` once it ended: dropping it frees its memory.
    worker: Option<Box<dyn Worker + 'a>>,
    outcome: Outcome,
    tally: Tally,
}

impl<'a> Lane<'a> {
    fn new(worker: Box<dyn Worker + 'a>) -> Self {
        Self { worker: Some(worker), outcome: Outcome::default(), tally: Tally::default() }
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

    fn repeat(&mut self, events: &dyn Listener) -> Result<(), Failure> {
        if let Some(sample) = self.ask(|worker| worker.repeat(events))? {
            self.tally.add(sample.prefill_ns, sample.end_to_end_ns);
            self.outcome.samples.push(sample);
        }
        Ok(())
    }
}

/// Loads, warms up, repeats ABCABC and finishes.
fn together(lanes: &mut [Lane], protocol: &Protocol, events: &dyn Listener) -> Result<(), Failure> {
    for lane in lanes.iter_mut() {
        lane.outcome.loaded = lane.ask(|worker| worker.load(events))?;
    }
    for lane in lanes.iter_mut() {
        lane.outcome.warmed = lane.ask(|worker| phase(worker, events))?;
    }
    repeat(lanes, protocol, events)?;
    for lane in lanes.iter_mut() {
        lane.outcome.finished = lane.ask(|worker| worker.finish(events))?;
        lane.worker = None;
    }
    Ok(())
}

fn phase(worker: &mut dyn Worker, events: &dyn Listener) -> Result<Warmed, Failure> {
    events.on(Event::Begin { label: format!("warm up {}", worker.precision()), total: 1, unit: Unit::Runs });
    let warmed = worker.warm_up(events);
    events.on(Event::End);
    warmed
}

/// Hands out rounds until a criterion holds for all that still run.
fn repeat(lanes: &mut [Lane], protocol: &Protocol, events: &dyn Listener) -> Result<(), Failure> {
    let n_running = lanes.iter().filter(|lane| lane.worker.is_some()).count() as u64;
    let at_least = protocol.repeats.unwrap_or(protocol.min_repeats) as u64;
    events.on(Event::Begin { label: "measure".to_owned(), total: n_running * at_least, unit: Unit::Runs });
    let mut done = 0;
    let ended = loop {
        let running: Vec<&Tally> = lanes.iter().filter(|lane| lane.worker.is_some()).map(|lane| &lane.tally).collect();
        if running.is_empty() {
            break None;
        }
        if let Some(ended) = repeats_ended(&running, protocol) {
            break Some(ended);
        }
        for lane in lanes.iter_mut() {
            lane.repeat(events)?;
            done += u64::from(lane.worker.is_some());
            events.on(Event::Progress { done });
        }
    };
    events.on(Event::End);
    for lane in lanes.iter_mut().filter(|lane| lane.worker.is_some()) {
        lane.outcome.ended = ended;
    }
    Ok(())
}
