//! Clock stamps of a step, as the traced build of the step kernel leaves them (`trace.cuh`): what each block did when.

use std::collections::BTreeMap;

/// The same as in trace.cuh.
pub const TRACED_STEPS: usize = 8;
const HEADER: usize = 16;
const STAMPS: usize = 8;

/// State of a block. States exclude each other and leave no time out, from the begin of a step to the begin of the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// From the launch to the first instruction: tables, the first instructions, and in the trace alone a tick of the timer.
    Start,
    /// Waits until the first inputs of its first thread are there.
    Wait,
    /// Reads, norms and converts the inputs, all of them.
    Read,
    /// Its first warp waits for weights.
    Weights,
    /// Its first warp multiplies; or attends.
    Product,
    /// Its first warp waits for the others.
    Warps,
    /// Sums over warps, epilogue, and the stores that publish the results.
    Epilogue,
    /// From its last store to the next instruction.
    Turn,
    /// Behind the last instruction: all blocks meet, and the last one writes the token.
    End,
    /// From the end of this step to the begin of the next.
    Launch,
}

impl State {
    pub const ALL: [State; 10] = [
        State::Start,
        State::Wait,
        State::Read,
        State::Weights,
        State::Product,
        State::Warps,
        State::Epilogue,
        State::Turn,
        State::End,
        State::Launch,
    ];

    pub fn name(self) -> &'static str {
        match self {
            State::Start => "start",
            State::Wait => "wait",
            State::Read => "read",
            State::Weights => "weights",
            State::Product => "product",
            State::Warps => "warps",
            State::Epilogue => "epilogue",
            State::Turn => "turn",
            State::End => "end",
            State::Launch => "launch",
        }
    }
}

/// A time in which a block was in one state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    pub block: usize,
    /// `None` outside of instructions.
    pub instruction: Option<usize>,
    pub state: State,
    /// Since the first block of the step began.
    pub start_ns: f64,
    pub ns: f64,
}

/// A step and the way to the next one.
#[derive(Debug, Clone, PartialEq)]
pub struct TracedStep {
    pub spans: Vec<Span>,
    /// From the begin of the step to the begin of the next, the mean over blocks.
    pub step_ns: f64,
    /// Time between an instruction's last store anywhere and the end of a block's wait for it, the mean over waits that end behind that
    /// store: what passing values on takes by itself.
    pub pass_ns: BTreeMap<usize, f64>,
}

/// Words of 32 bits that a trace of `blocks` needs.
pub fn words(blocks: usize, instructions: usize) -> usize {
    TRACED_STEPS * blocks * block_words(instructions)
}

fn block_words(instructions: usize) -> usize {
    HEADER + instructions * STAMPS
}

/// A block's words of one step.
#[derive(Clone, Copy)]
struct Block<'a> {
    words: &'a [u32],
    clocks_per_ns: f64,
}

impl Block<'_> {
    const ENTERED: usize = 0;
    const TICK: usize = 1;
    const DONE: usize = 5;
    const ENDED: usize = 6;
    const STEP: usize = 7;

    fn step(&self) -> u32 {
        self.words[Self::STEP]
    }

    fn tick_ns(&self) -> u64 {
        u64::from(self.words[3]) << 32 | u64::from(self.words[2])
    }

    /// A clock as nanoseconds of the timer that all blocks share.
    fn ns(&self, clock: u32) -> f64 {
        let behind = clock.wrapping_sub(self.words[Self::TICK]).cast_signed();
        self.tick_ns() as f64 + f64::from(behind) / self.clocks_per_ns
    }

    fn stamps(&self, instruction: usize) -> &[u32] {
        &self.words[HEADER + instruction * STAMPS..][..STAMPS]
    }
}

/// The last whole step among `words`, as many as [`words`] says. `None` where fewer than three steps were traced.
pub fn last_step(words: &[u32], blocks: usize, instructions: usize, writers: &[Vec<usize>]) -> Option<TracedStep> {
    let block = |slot: usize, block: usize| {
        let len = block_words(instructions);
        Block { words: &words[(slot * blocks + block) * len..][..len], clocks_per_ns: 1.0 }
    };
    // By step; a slot that nothing was written to has no tick.
    let mut slots: Vec<usize> = (0..TRACED_STEPS).filter(|slot| block(*slot, 0).tick_ns() != 0).collect();
    slots.sort_by_key(|slot| block(*slot, 0).step());
    let [first, .., at, next] = slots[..] else { return None };
    let mut traced = TracedStep { spans: Vec::new(), step_ns: 0.0, pass_ns: BTreeMap::new() };
    let rate = |of: usize| {
        let (first, next) = (block(first, of), block(next, of));
        let clocks = next.words[Block::TICK].wrapping_sub(first.words[Block::TICK]);
        f64::from(clocks) / next.tick_ns().wrapping_sub(first.tick_ns()) as f64
    };
    let both: Vec<(Block, Block)> = (0..blocks)
        .map(|of| {
            let clocks_per_ns = rate(of);
            (Block { clocks_per_ns, ..block(at, of) }, Block { clocks_per_ns, ..block(next, of) })
        })
        .collect();
    let zero = both.iter().map(|(this, _)| this.ns(this.words[Block::ENTERED])).fold(f64::INFINITY, f64::min);
    for (of, (this, next)) in both.iter().enumerate() {
        let mut at = this.ns(this.words[Block::ENTERED]);
        let mut until = |end: f64, instruction: Option<usize>, state: State| {
            let span = Span { block: of, instruction, state, start_ns: at - zero, ns: end - at };
            at = end;
            traced.spans.push(span);
        };
        for instruction in 0..instructions {
            let [begun, ready, read, multiplied, summed, stored, weights, _] = this.stamps(instruction) else {
                return None;
            };
            let inside = Some(instruction);
            until(
                this.ns(*begun),
                inside.filter(|at| *at > 0).map(|at| at - 1),
                if instruction == 0 { State::Start } else { State::Turn },
            );
            until(this.ns(*ready), inside, State::Wait);
            until(this.ns(*read), inside, State::Read);
            // Not when, but how long, estimated from some of the waits: drawn in front of the product.
            let weights = f64::from(*weights) / this.clocks_per_ns;
            let weights = weights.min(this.ns(*multiplied) - this.ns(*read));
            until(this.ns(*read) + weights, inside, State::Weights);
            until(this.ns(*multiplied), inside, State::Product);
            until(this.ns(*summed), inside, State::Warps);
            until(this.ns(*stored), inside, State::Epilogue);
        }
        until(this.ns(this.words[Block::DONE]), instructions.checked_sub(1), State::Turn);
        until(this.ns(this.words[Block::ENDED]), None, State::End);
        let begins = next.ns(next.words[Block::ENTERED]);
        until(begins, None, State::Launch);
        traced.step_ns += (begins - this.ns(this.words[Block::ENTERED])) / blocks as f64;
    }
    let stored = |instruction: usize| {
        let of_blocks = both.iter().map(|(this, _)| this.ns(this.stamps(instruction)[5]));
        of_blocks.fold(f64::NEG_INFINITY, f64::max)
    };
    for (instruction, writers) in writers.iter().enumerate() {
        let Some(last) = writers.iter().map(|writer| stored(*writer)).reduce(f64::max) else { continue };
        let waits = both.iter().map(|(this, _)| this.ns(this.stamps(instruction)[1]) - last).filter(|ns| *ns > 0.0);
        let waits: Vec<f64> = waits.collect();
        if !waits.is_empty() {
            traced.pass_ns.insert(instruction, waits.iter().sum::<f64>() / waits.len() as f64);
        }
    }
    Some(traced)
}

impl TracedStep {
    /// Nanoseconds of each state, the mean over blocks.
    pub fn by_state(&self) -> Vec<(State, f64)> {
        let blocks = self.spans.iter().map(|span| span.block + 1).max().unwrap_or(1) as f64;
        let of = |state| self.spans.iter().filter(|span| span.state == state).map(|span| span.ns).sum::<f64>() / blocks;
        State::ALL.into_iter().map(|state| (state, of(state))).collect()
    }

    /// The smallest share of a block's time that its spans explain: what lies in none, or in two, is missing.
    pub fn explained(&self) -> f64 {
        let mut of_blocks = BTreeMap::<usize, (f64, f64, f64)>::new();
        for span in &self.spans {
            let (start, end, sum) = of_blocks.entry(span.block).or_insert((f64::INFINITY, f64::NEG_INFINITY, 0.0));
            *start = start.min(span.start_ns);
            *end = end.max(span.start_ns + span.ns);
            // A span of negative length is time that two states claim.
            *sum += span.ns.max(0.0) + 2.0 * span.ns.min(0.0);
        }
        of_blocks.values().map(|(start, end, sum)| sum / (end - start)).fold(1.0, f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks, two instructions, three steps of 1000 ns; clocks run at 2 a nanosecond and differ between blocks.
    fn recorded() -> Vec<u32> {
        let mut all = vec![0; words(2, 2)];
        for step in 0..3u32 {
            for block in 0..2u32 {
                let zero = u32::MAX - 500 + block * 77_777 + step * 2000;
                let clock = |ns: u32| zero.wrapping_add(2 * ns);
                let tick = 1_000_000 + 1000 * step;
                let mut of_block = vec![0; block_words(2)];
                of_block[..8].copy_from_slice(&[
                    clock(0),
                    clock(10),
                    tick + 10,
                    0,
                    clock(20),
                    clock(700),
                    clock(900),
                    step,
                ]);
                for (at, stamps) in of_block[HEADER..].chunks_exact_mut(STAMPS).enumerate() {
                    let begun = 40 + 300 * at as u32;
                    // The second block has its inputs and stores 50 ns later.
                    let later = begun + 50 * block;
                    for (stamp, ns) in
                        stamps.iter_mut().zip([begun, later + 50, later + 60, later + 160, later + 180, later + 200])
                    {
                        *stamp = clock(ns);
                    }
                    stamps[6] = 2 * 30;
                }
                let from = (step as usize * 2 + block as usize) * block_words(2);
                all[from..][..of_block.len()].copy_from_slice(&of_block);
            }
        }
        all
    }

    #[test]
    fn states_explain_a_step_and_values_take_time_to_pass() {
        let step = last_step(&recorded(), 2, 2, &[vec![], vec![0]]).expect("three steps");
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-3, "{a} {b}");
        close(step.step_ns, 1000.0);
        close(step.explained(), 1.0);
        let by_state: BTreeMap<State, f64> = step.by_state().into_iter().collect();
        for (state, ns) in [
            (State::Start, 40.0),
            (State::Wait, 100.0 + 50.0),
            (State::Read, 20.0),
            (State::Weights, 60.0),
            (State::Product, 140.0),
            (State::Warps, 40.0),
            (State::Epilogue, 40.0),
            // 100 between the two and 160 behind the second, of which the second block's stores take 50 each.
            (State::Turn, 260.0 - 50.0),
            (State::End, 200.0),
            (State::Launch, 100.0),
        ] {
            assert!((by_state[&state] - ns).abs() < 1e-3, "{state:?}: {} for {ns}", by_state[&state]);
        }
        // Stored at 290 by the second block, read at 390 and 440.
        close(step.pass_ns[&1], 125.0);
        assert_eq!(step.pass_ns.len(), 1);
    }

    #[test]
    fn too_few_steps_are_no_trace() {
        let mut all = recorded();
        assert_eq!(last_step(&vec![0; words(2, 2)], 2, 2, &[]), None);
        all[2 * 2 * block_words(2)..].fill(0);
        assert_eq!(last_step(&all, 2, 2, &[]), None);
    }
}
