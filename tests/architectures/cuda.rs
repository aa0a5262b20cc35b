//! Every family on a GPU, which a machine without one skips: its logits beside the reference executor's, the same bits each time, and values
//! beyond fp16.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::planted::{PROMPT, logits_behind_prompt, planted};
use super::{
    Executor, Golden, forced, generate, kl_divergence, largest_difference, load, load_from, models, plan, worst,
};

/// fp16 compute moves logits of such models by up to 0.04 (tests/models.rs has the sum).
const TOLERANCE: f32 = 0.1;
/// Of LLM.int8 behind planted weights: its activations are fp16 here, and a value that crosses a rounding boundary moves logits by up to this.
const INT8_TOLERANCE: f32 = 0.7;
const REPLAYS: usize = 4;

/// The device, for one test at a time. Prints why there is none.
#[track_caller]
fn device() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    if let Err(error) = quantbench::kernels::cuda::probe(0) {
        super::skips::skip(error);
        return None;
    }
    Some(ONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Fed the reference's own tokens, so that a close call between two of them does not part the runs. Where one rounding changes a logit by much, as a
/// code of LLM.int8 or an expert that a quantized router chooses, it is the cost that is near: the mean divergence from fp32 (tests/models.rs).
#[test]
fn logits_stay_near_the_reference() {
    let Some(_device) = device() else { return };
    for model in models() {
        let (golden, plan) = (Golden::open(&model, "golden"), plan(&model));
        for precision in ["fp16", "int8", "nf4"] {
            let mut cuda = load(&model, &plan, precision, Executor::Cuda).unwrap();
            let mut reference = load(&model, &plan, precision, Executor::Reference).unwrap();
            for (i, (prompt, tokens)) in golden.prompts().iter().enumerate() {
                let (_, expected) = forced(reference.as_mut(), prompt, tokens);
                let (_, logits) = forced(cuda.as_mut(), prompt, tokens);
                let difference = worst(&logits, &expected);
                println!("{model} {precision} prompt {i}: {difference}");
                if precision == "int8" || (precision == "nf4" && plan.experts().is_some()) {
                    let fp32 = golden.steps(&format!("p{i}.step_logits"));
                    let cost =
                        |logits: &[Vec<f32>]| fp32.iter().zip(logits).map(|(p, q)| kl_divergence(p, q)).sum::<f64>();
                    let (seen, known) = (cost(&logits), cost(&expected));
                    let is_near = seen <= 2.0 * known && seen >= known / 2.0;
                    assert!(is_near, "{model} {precision} prompt {i}: divergence {seen}, reference {known}");
                } else {
                    assert!(difference <= TOLERANCE, "{model} {precision} prompt {i}: {difference}");
                }
            }
        }
    }
}

#[test]
fn replays_are_bit_equal() {
    let Some(_device) = device() else { return };
    for model in models() {
        let (golden, plan) = (Golden::open(&model, "golden"), plan(&model));
        let prompt = &golden.prompts()[0].0;
        for precision in ["fp16", "int8", "nf4"] {
            let mut session = load(&model, &plan, precision, Executor::Cuda).unwrap();
            let first = generate(session.as_mut(), prompt);
            for replay in 1..REPLAYS {
                assert!(generate(session.as_mut(), prompt) == first, "{model} {precision}: replay {replay}");
            }
        }
    }
}

/// In a prompt of one call, and in steps.
#[test]
fn values_beyond_fp16_stay_in_range() {
    let Some(_device) = device() else { return };
    for planted in planted() {
        let (model, checkpoint) = (planted.model(), planted.checkpoint());
        let source = checkpoint.source(&model.matrices, &model.vectors).unwrap();
        for precision in ["fp16", "int8", "nf4"] {
            let expected = planted.logits(precision);
            let mut session =
                load_from(source.as_ref(), &checkpoint.config, &model, precision, Executor::Cuda).unwrap();
            let of_call = logits_behind_prompt(session.as_mut());
            session.rewind(0);
            for id in PROMPT {
                session.prefill(&[id]).unwrap();
            }
            let of_steps = session.logits().unwrap();
            for (what, logits) in [("a call", of_call), ("steps", of_steps)] {
                let difference = largest_difference(&logits, &expected);
                println!("{} {precision}, {what}: {difference}", planted.name);
                let tolerance = if precision == "int8" { INT8_TOLERANCE } else { TOLERANCE };
                assert!(difference <= tolerance, "{} {precision}, {what}: {difference}", planted.name);
            }
        }
    }
}
