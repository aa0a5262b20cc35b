//! How much of a product of cases runs: pairs that have every member once, or with `QUANTBENCH_FULL=1` all of it.
#![allow(dead_code)] // A test binary that needs one of these does not need the other.

/// Returns whether this is a full run, as `.ci/run --full` starts it.
pub fn is_full() -> bool {
    std::env::var_os("QUANTBENCH_FULL").is_some_and(|value| value == "1")
}

/// All of `members` in a full run; otherwise one, in turn.
pub fn in_turn<T: Copy>(members: &[T], turn: usize) -> Vec<T> {
    match is_full() {
        true => members.to_vec(),
        false => vec![members[turn % members.len()]],
    }
}

/// Every row with every column in a full run; otherwise each row and each column at least once, in turn from column `offset` on, so that
/// tests with other offsets make other pairs.
pub fn combinations<A: Copy, B: Copy>(rows: &[A], columns: &[B], offset: usize) -> Vec<(A, B)> {
    if is_full() {
        return rows.iter().flat_map(|row| columns.iter().map(|column| (*row, *column))).collect();
    }
    let pair = |at: usize| (rows[at % rows.len()], columns[(at + offset) % columns.len()]);
    (0..rows.len().max(columns.len())).map(pair).collect()
}
