//! Joules per token from an energy counter, less the energy of the idle machine.
//!
//! One definition: the counter's increase over a window of back-to-back repeats, less the idle power times the window's length, over the
//! tokens that were generated in it. A counted repeat is a window where it is long enough for the counter. Where it is not, a block of
//! untimed repeats after the counted ones is one.

/// Fewest update periods of the counter in a window: an end of the window can be off by a whole one, so that 20 bound
/// the error by 10 %.
const MIN_PERIODS: f64 = 20.0;

/// An energy counter and its period.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counter {
    /// Spelling in records: `nvml` or `rapl`.
    pub name: &'static str,
    /// Longest time between two updates.
    pub period_s: f64,
    /// Mean power of the machine before any worker was started.
    pub idle_watts: Option<f64>,
}

/// The shortest window that a counter of this period can be trusted with.
pub fn shortest_window_s(period_s: f64) -> f64 {
    MIN_PERIODS * period_s
}

/// A counter at one of its updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    /// Time by a monotonic clock with any start.
    pub at_ns: u64,
    /// Reading of a counter that only grows, with any start.
    pub joules: f64,
}

/// Energy of back-to-back repeats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EnergyWindow {
    pub joules: f64,
    pub seconds: f64,
    /// Tokens generated in the window.
    pub tokens: u64,
}

impl EnergyWindow {
    pub fn between(begin: Mark, end: Mark, tokens: u64) -> Self {
        let seconds = end.at_ns.saturating_sub(begin.at_ns) as f64 / 1e9;
        Self { joules: end.joules - begin.joules, seconds, tokens }
    }
}

/// Reason why windows give no energy; `None` where they can be used. `windows` are `None` where the counter did not answer in
/// all of them.
pub fn refusal(counter: &Counter, windows: Option<&[EnergyWindow]>) -> Option<String> {
    let needed_s = shortest_window_s(counter.period_s);
    let Some(known) = windows.filter(|known| !known.is_empty()) else {
        return Some(format!("the {} counter did not answer in every window", counter.name));
    };
    if counter.idle_watts.is_none() {
        return Some(format!("the idle power could not be read from the {} counter", counter.name));
    }
    let shortest_s = known.iter().map(|window| window.seconds).fold(f64::INFINITY, f64::min);
    (shortest_s < needed_s)
        .then(|| format!("a window is {shortest_s:.2} s long and the {} counter needs {needed_s:.2} s", counter.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_are_too_short_or_incomplete_are_refused() {
        let counter = Counter { name: "nvml", period_s: 0.1, idle_watts: Some(70.0) };
        let window = |seconds| EnergyWindow { joules: 9.0, seconds, tokens: 4 };
        assert_eq!(refusal(&counter, Some(&[window(2.0), window(2.5)])), None);
        for (windows, said) in [
            (Some(vec![]), "did not answer"),
            (None, "did not answer"),
            (Some(vec![window(3.0), window(1.5)]), "a window is 1.50 s long and the nvml counter needs 2.00 s"),
        ] {
            let reason = refusal(&counter, windows.as_deref()).unwrap_or_default();
            assert!(reason.contains(said), "{windows:?}: {reason}");
        }
        let unknown = Counter { idle_watts: None, ..counter };
        assert!(refusal(&unknown, Some(&[window(3.0)])).unwrap().contains("idle power"));
    }

    #[test]
    fn a_window_lies_between_two_marks() {
        let mark = |at_ns, joules| Mark { at_ns, joules };
        let window = EnergyWindow::between(mark(5, 100.0), mark(2_000_000_005, 350.5), 96);
        assert_eq!(window, EnergyWindow { joules: 250.5, seconds: 2.0, tokens: 96 });
    }
}
