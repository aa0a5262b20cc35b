//! Caches with a sliding window hold no more than the window, and a session goes back behind it all the same.

use quantbench::engine::Session;
use quantbench::plan::{AttentionSpec, Model, Op, Window};

use super::{Executor, FP32_LOGIT_TOLERANCE, executors, largest_difference, load, models, plan};

/// As `load` asks for.
const CAPACITY: usize = 64;

/// Models with windows as they are, and with windows of two sizes.
fn windowed() -> impl Iterator<Item = (String, Model)> {
    let is_windowed = |(_, model): &(String, Model)| model.caches.iter().any(|cache| cache.window.is_some());
    let windowed = models().into_iter().map(|name| (name.clone(), plan(&name))).filter(is_windowed);
    windowed.flat_map(|(name, model)| {
        let mixed = with_another_window(model.clone());
        [(name.clone(), model), (name, mixed)]
    })
}

/// The first window is half as long, and the last layer's three times.
fn with_another_window(mut model: Model) -> Model {
    let attentions = model.decoder.ops.iter_mut();
    let mut attentions: Vec<&mut AttentionSpec> =
        attentions.filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None }).collect();
    let window = attentions.iter().find_map(|spec| spec.window).expect("a window").0;
    let first = attentions.iter().position(|spec| spec.window.is_some()).expect("a window");
    let last = attentions.len() - 1;
    for (index, len) in [(first, window.div_ceil(2)), (last, 3 * window)] {
        attentions[index].window = Some(Window(len));
        model.caches[attentions[index].cache.0].window = Some(len);
    }
    model
}

fn tokens(model: &Model, count: usize) -> Vec<u32> {
    (0..count as u32).map(|at| 3 + at * 37 % (model.vocab as u32 - 3)).collect()
}

/// Logits behind `all`, whose last token is a call of its own.
fn reference(name: &str, model: &Model, all: &[u32]) -> Vec<f32> {
    let mut session = load(name, model, "fp16", Executor::Reference).unwrap();
    session.prefill(&all[..all.len() - 1]).unwrap();
    session.prefill(&all[all.len() - 1..]).unwrap();
    session.logits().unwrap()
}

fn check(session: &mut dyn Session, expected: &[f32], what: &str) {
    let difference = largest_difference(&session.logits().unwrap(), expected);
    assert!(difference <= FP32_LOGIT_TOLERANCE, "{what}: {difference}");
}

#[test]
fn a_cache_on_a_cpu_holds_no_more_than_its_window() {
    for (name, model) in windowed() {
        let expected: usize = model
            .caches
            .iter()
            .map(|cache| 2 * 4 * cache.kv_heads * cache.head_dim * cache.window.unwrap_or(CAPACITY).min(CAPACITY))
            .sum();
        for executor in executors().into_iter().filter(|executor| matches!(executor, Executor::Cpu(_))) {
            let session = load(&name, &model, "fp16", executor).unwrap();
            assert_eq!(session.footprint().kv_cache_bytes, expected as u64, "{name} {executor:?}");
        }
    }
}

/// A rewind to where a prompt began takes what was kept there, any other one runs the tokens again; both see what was there.
#[test]
fn a_session_goes_back_behind_its_window() {
    for (name, model) in windowed() {
        let tokens = tokens(&model, 60);
        let [long, short, other] = [&tokens[..50], &tokens[..31], &tokens[..13]];
        let expected = [long, short, other].map(|all| reference(&name, &model, all));
        for executor in executors() {
            let what = |step: &str| format!("{name} {executor:?} {step}");
            let mut session = load(&name, &model, "fp16", executor).unwrap();
            // In two calls, the second of which begins inside the window and outgrows it.
            session.prefill(&tokens[..30]).unwrap();
            for turn in ["first", "second", "third"] {
                // 30 is where this prompt begins.
                session.prefill(&tokens[30..49]).unwrap();
                session.prefill(&tokens[49..50]).unwrap();
                check(session.as_mut(), &expected[0], &what(turn));
                session.decode(6, &mut |_| {}).unwrap();
                session.rewind(30);
            }
            session.prefill(&tokens[30..31]).unwrap();
            check(session.as_mut(), &expected[1], &what("at the mark"));
            session.decode(20, &mut |_| {}).unwrap();
            session.rewind(12);
            assert_eq!(session.position(), 12);
            session.prefill(&tokens[12..13]).unwrap();
            check(session.as_mut(), &expected[2], &what("where nothing was kept"));
            let mut rows = 0;
            session.score(&tokens[13..31], &mut |_, _| rows += 1).unwrap();
            session.rewind(30);
            session.prefill(&tokens[30..31]).unwrap();
            check(session.as_mut(), &expected[1], &what("behind a scored text"));
            assert_eq!(rows, 18);
        }
    }
}
