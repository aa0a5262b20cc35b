//! The same on a GPU, which a machine without one skips: sequences alone run by the step's program, those of a batch by calls of many rows.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Executor, Input, Tiny, alone, decoded, folders, one_by_one, together, together_of, unequal, worst};
#[path = "../skips/mod.rs"]
mod skips;

/// fp16 compute moves logits of such models by up to 0.04 (tests/models.rs has the sum), that of one sequence as that of several.
const TOLERANCE: f32 = 0.1;

const SIZES: [usize; 5] = [2, 5, 8, 17, 64];

/// The device, for one test at a time. Prints why there is none.
#[track_caller]
fn device() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    if let Err(error) = quantbench::kernels::cuda::probe(0) {
        skips::skip(error);
        return None;
    }
    Some(ONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// All models but mixtures, which run one sequence.
fn models() -> impl Iterator<Item = Tiny> {
    folders().into_iter().map(|folder| Tiny::open(&folder)).filter(|tiny| tiny.plan.experts().is_none())
}

#[test]
fn each_sequence_of_a_batch_gives_the_logits_that_it_gives_alone_on_a_gpu() {
    let Some(_device) = device() else { return };
    for (turn, tiny) in models().enumerate() {
        for precision in ["fp16", "nf4"] {
            for n in SIZES {
                // Of one length, or of several.
                let is_equal = (turn + n) % 2 == 0;
                let inputs = match is_equal {
                    true => (0..n).map(|sequence| tiny.input(sequence, 14)).collect::<Vec<Input>>(),
                    false => unequal(&tiny, n),
                };
                let mut session = tiny.load(precision, Executor::Cuda, n);
                let batched = match is_equal {
                    true => together(session.as_mut(), &inputs),
                    false => one_by_one(session.as_mut(), &inputs),
                };
                let mut one = tiny.load(precision, Executor::Cuda, 1);
                for (sequence, (input, batched)) in inputs.iter().zip(&batched).enumerate() {
                    let difference = worst(&alone(one.as_mut(), sequence, input), batched);
                    let case = format!("{} {precision} sequence {sequence} of {n}", tiny.name);
                    assert!(difference <= TOLERANCE, "{case}: {difference}");
                }
            }
        }
    }
}

/// The first run launches kernel by kernel, later ones replay graphs.
#[test]
fn replays_of_a_batch_are_bit_equal_on_a_gpu() {
    let Some(_device) = device() else { return };
    for tiny in models() {
        for precision in ["fp16", "int8", "nf4"] {
            for n in [5, 64] {
                let inputs: Vec<Input> = (0..n).map(|sequence| tiny.input(sequence, 9)).collect();
                let all = Input::together(&inputs);
                let shape = (n, all.prompt.len() / n);
                let mut session = tiny.load(precision, Executor::Cuda, n);
                let mut run = || (decoded(session.as_mut(), &all, shape), session.logits().unwrap());
                let first = run();
                for replay in 1..4 {
                    assert!(run() == first, "{} {precision} {n} sequences: replay {replay}", tiny.name);
                }
            }
        }
    }
}

/// Equal sequences have the outlier columns of one, and its logits.
#[test]
fn int8_takes_a_batch_as_one_call_on_a_gpu() {
    let Some(_device) = device() else { return };
    for tiny in models() {
        let same: Vec<Input> = (0..3).map(|_| tiny.input(0, 7)).collect();
        let mut session = tiny.load("int8", Executor::Cuda, 3);
        let batched = together_of(session.as_mut(), &same);
        let mut one = tiny.load("int8", Executor::Cuda, 1);
        let expected = together_of(one.as_mut(), &same[..1]);
        for (sequence, logits) in batched.iter().enumerate() {
            let difference = worst(std::slice::from_ref(logits), &expected);
            assert!(difference <= TOLERANCE, "{} sequence {sequence}: {difference}", tiny.name);
        }
        let columns = [session, one].map(|mut session| session.outlier_columns().unwrap().columns);
        assert_eq!(columns[0], columns[1], "{}", tiny.name);
    }
}

#[test]
fn mixtures_run_one_sequence_on_a_gpu() {
    let Some(_device) = device() else { return };
    let mixtures = folders().into_iter().map(|folder| Tiny::open(&folder)).filter(|tiny| tiny.plan.experts().is_some());
    for tiny in mixtures {
        let message = tiny.try_load("fp16", Executor::Cuda, 2).err().expect("a refusal").to_string();
        assert!(message.contains("a batch of 2 sequences of a mixture of experts"), "{}: {message}", tiny.name);
    }
}
