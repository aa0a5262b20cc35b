//! Models whose values inside exceed fp16's 65504, in steps and in a prompt.

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::planted::{PROMPT, planted};
use super::session::Session;
use super::step::TOLERANCE;

/// Whether the prompt is steps or one call, then how far logits may lie from those of the same weights in the reference executor. LLM.int8's
/// activations are fp16 here: a value that crosses a rounding boundary moves logits by up to 0.7 (tests/architectures/range.rs).
const RUNS: [(&str, f32); 3] = [("fp16", TOLERANCE), ("nf4", TOLERANCE), ("int8", 0.7)];

pub fn values_beyond_fp16_stay_in_range() {
    let mut turn = 0;
    for planted in planted() {
        for ((precision, tolerance), is_call) in RUNS.into_iter().flat_map(|run| [(run, false), (run, true)]) {
            turn += 1;
            let expected = planted.logits(precision);
            let memory = Memory::default();
            let host = Host { chip: CHIPS[turn % CHIPS.len()], memory: &memory };
            let mut session = Session::open(planted.folder.path(), false, precision, &host, 16);
            if is_call {
                session.prefill(&PROMPT);
            } else {
                for id in PROMPT {
                    session.place(id);
                    session.step();
                }
            }
            let logits = session.logits();
            let off = logits.iter().zip(&expected).map(|(logit, expected)| (logit - expected).abs());
            let off = off.fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a });
            println!("{} {precision}, a call: {is_call}: off by {off}", planted.name);
            assert!(off <= tolerance, "{} {precision}, a call: {is_call}: off by {off}", planted.name);
        }
    }
}
