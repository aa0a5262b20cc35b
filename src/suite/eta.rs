//! Estimates the time that a suite still takes.

/// From what ended in this session. `None` before the first case ended.
pub fn left_s(elapsed_s: f64, n_ended: usize, n_left: usize) -> Option<f64> {
    (n_ended > 0).then(|| elapsed_s / n_ended as f64 * n_left as f64)
}

/// `40 s`, `3 min`, `2.5 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_ended_cases_is_expected_of_the_others() {
        assert_eq!(left_s(30.0, 0, 5), None);
        assert_eq!(left_s(30.0, 2, 4), Some(60.0));
        assert_eq!(left_s(30.0, 3, 0), Some(0.0));
    }

    #[test]
    fn durations_are_short() {
        for (seconds, text) in [(0.4, "0 s"), (119.0, "119 s"), (180.0, "3 min"), (9000.0, "2.5 h")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
