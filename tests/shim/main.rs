//! Every kernel against its Rust reference, on a machine without a GPU: the sources are compiled by the system's C++ compiler
//! and run thread by thread (include/block.hpp). What only a GPU shows stays out: the order of memory.
#![cfg(feature = "cuda")]

mod attention;
mod batch;
mod checks;
#[path = "../coverage/mod.rs"]
mod coverage;
mod head;
mod host;
mod loading;
mod matvec;
mod memory;
mod norms;
mod place;
mod plain;
#[path = "../range/mod.rs"]
mod planted;
mod prefill;
mod products;
mod prompt;
mod range;
mod reference;
mod rows;
mod session;
#[path = "../skips/mod.rs"]
mod skips;
mod step;

use std::sync::atomic::{AtomicUsize, Ordering};

/// Tests that launch kernels.
const GROUPS: usize = 26;

/// Runs the cases of a group; the last group to end checks that none of the sources' kernels was left out.
#[track_caller]
fn group(cases: fn()) {
    static ENDED: AtomicUsize = AtomicUsize::new(0);
    if !host::is_there() {
        return;
    }
    cases();
    if ENDED.fetch_add(1, Ordering::Relaxed) + 1 == GROUPS {
        let forgotten = host::never_launched();
        assert!(forgotten.is_empty(), "kernels that no case runs: {forgotten:?}");
    }
}

#[test]
fn products_of_one_row() {
    group(matvec::products_of_one_row);
}

#[test]
fn every_kernel_reads_halves_and_floats() {
    group(matvec::every_kernel_reads_halves_and_floats);
}

#[test]
fn work_split_over_multiprocessors() {
    group(matvec::work_split_over_multiprocessors);
}

#[test]
fn outliers_and_nan() {
    group(matvec::outliers_and_nan);
}

#[test]
fn products_between_norm_and_residual() {
    group(matvec::products_between_norm_and_residual);
}

#[test]
fn rows_of_a_checkpoint() {
    group(loading::rows_of_a_checkpoint);
}

#[test]
fn norms_of_one_row() {
    group(norms::norms_of_one_row);
}

#[test]
fn heads_find_the_token() {
    group(head::heads_find_the_token);
}

#[test]
fn attention_of_many_rows() {
    group(attention::attention_of_many_rows);
}

#[test]
fn attention_of_one_query() {
    group(attention::attention_of_one_query);
}

#[test]
fn int8_of_many_rows() {
    group(prompt::int8_of_many_rows);
}

#[test]
fn products_of_few_rows() {
    group(prompt::products_of_few_rows);
}

#[test]
fn nf4_as_halves() {
    group(prompt::nf4_as_halves);
}

#[test]
fn operations_over_rows() {
    group(rows::operations_over_rows);
}

#[test]
fn decode_steps_follow_the_reference() {
    group(step::decode_steps_follow_the_reference);
}

#[test]
fn decode_steps_of_every_kind_follow_the_reference() {
    group(step::decode_steps_of_every_kind_follow_the_reference);
}

#[test]
fn products_of_a_step_follow_their_reference() {
    group(step::products_of_a_step_follow_their_reference);
}

#[test]
fn decode_steps_of_families_follow_the_reference() {
    group(step::decode_steps_of_families_follow_the_reference);
}

#[test]
fn products_of_families_follow_their_reference() {
    group(step::products_of_families_follow_their_reference);
}

#[test]
fn values_beyond_fp16_stay_in_range() {
    group(range::values_beyond_fp16_stay_in_range);
}

#[test]
fn prompts_of_families_follow_the_reference() {
    group(prefill::prompts_of_families_follow_the_reference);
}

#[test]
fn prompts_follow_the_reference() {
    group(prefill::prompts_follow_the_reference);
}

#[test]
fn encoders_follow_the_reference() {
    group(prefill::encoders_follow_the_reference);
}

#[test]
fn prompts_find_the_outliers_of_the_cpu() {
    group(prefill::prompts_find_the_outliers_of_the_cpu);
}

#[test]
fn sequences_of_a_batch_follow_the_sequence_alone() {
    group(batch::sequences_of_a_batch_follow_the_sequence_alone);
}

#[test]
fn int8_takes_a_batch_as_one_call() {
    group(batch::int8_takes_a_batch_as_one_call);
}

#[test]
fn the_shim_finds_faults() {
    if host::is_there() {
        checks::faults_are_named();
        checks::blocks_run_at_once();
        checks::warps_fill_slots_for_others();
        checks::halves_are_rounded();
    }
}
