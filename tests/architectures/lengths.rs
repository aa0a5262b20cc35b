//! Rotary frequencies that depend on the length of the sequence.

use super::{Executor, FP32_LOGIT_TOLERANCE, executors, forced, largest_difference, load, plan};

/// A cache that crosses LongRoPE's original length is computed anew, whichever call crosses it, and back again after a rewind.
#[test]
fn a_sequence_that_outgrows_its_frequencies_is_computed_anew() {
    let plan = plan("phi3");
    let tokens: Vec<u32> = (0..24).map(|i| 3 + i * 37 % 250).collect();
    for executor in executors() {
        let mut whole = load("phi3", &plan, "fp16", Executor::Reference).unwrap();
        whole.prefill(&tokens).unwrap();
        let expected = whole.logits().unwrap();
        let mut session = load("phi3", &plan, "fp16", executor).unwrap();
        for first in [1, 15, 16, 17, 23] {
            session.rewind(0);
            session.prefill(&tokens[..first]).unwrap();
            session.prefill(&tokens[first..]).unwrap();
            assert_eq!(session.position(), tokens.len());
            let difference = largest_difference(&session.logits().unwrap(), &expected);
            assert!(difference <= FP32_LOGIT_TOLERANCE, "{executor:?} {first} tokens first: {difference}");
        }
        // Back within the original length, keys have the short frequencies again.
        session.rewind(9);
        let (_, back) = forced(session.as_mut(), &tokens[..10], &tokens[10..12]);
        session.rewind(0);
        session.prefill(&tokens).unwrap();
        session.rewind(9);
        session.prefill(&tokens[9..10]).unwrap();
        let difference = largest_difference(&session.logits().unwrap(), &back[0]);
        assert!(difference <= FP32_LOGIT_TOLERANCE, "{executor:?}: {difference}");
    }
}

/// Greedy steps that cross the length inside of one `decode` are those that one `decode` a token gives.
#[test]
fn decode_crosses_the_length_at_any_step() {
    let plan = plan("phi3");
    for executor in executors() {
        let mut session = load("phi3", &plan, "fp16", executor).unwrap();
        let first = session.prefill(&[5, 6, 7, 8, 9, 10, 11, 12]).unwrap();
        let mut one_by_one = vec![first];
        for _ in 0..20 {
            session.decode(1, &mut |token| one_by_one.push(token)).unwrap();
        }
        session.rewind(0);
        let mut at_once = vec![session.prefill(&[5, 6, 7, 8, 9, 10, 11, 12]).unwrap()];
        session.decode(20, &mut |token| at_once.push(token)).unwrap();
        assert_eq!(at_once, one_by_one, "{executor:?}");
        assert_eq!(session.position(), 28);
        let mut rows = 0;
        session.rewind(10);
        session
            .score(&[4, 5, 6, 7, 8, 9, 10], &mut |row, _| {
                assert_eq!(row, rows);
                rows += 1;
            })
            .unwrap();
        assert_eq!((rows, session.position()), (7, 17));
    }
}
