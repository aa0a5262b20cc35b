//! Joules per token from an energy counter, less what the idle machine takes.

/// Fewer update periods of the counter in a repeat say nothing: an end of the window can be off by a whole one, so that 20 bound
/// the error by 10 %.
const MIN_PERIODS: f64 = 20.0;

/// What a counter counts, and how often it does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Counter {
    /// As records have it: `nvml` or `rapl`.
    pub name: &'static str,
    /// Between two updates, at most.
    pub period_s: f64,
    /// Mean power of the machine before any worker was started.
    pub idle_watts: Option<f64>,
}

/// One repeat on a counter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    pub joules: f64,
    pub seconds: f64,
}

/// Why windows tell nothing; `None` where they can be used. `windows` has one entry a repeat.
pub fn refusal(counter: &Counter, windows: &[Option<Window>]) -> Option<String> {
    let needed_s = MIN_PERIODS * counter.period_s;
    let Some(known) = windows.iter().copied().collect::<Option<Vec<Window>>>().filter(|known| !known.is_empty()) else {
        return Some(format!("the {} counter did not answer in every repeat", counter.name));
    };
    if counter.idle_watts.is_none() {
        return Some(format!("the idle power could not be read from the {} counter", counter.name));
    }
    let shortest_s = known.iter().map(|window| window.seconds).fold(f64::INFINITY, f64::min);
    (shortest_s < needed_s).then(|| {
        format!(
            "a repeat takes {shortest_s:.2} s and the {} counter needs {needed_s:.2} s; raise `--max-new-tokens`",
            counter.name
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_are_too_short_or_incomplete_are_refused() {
        let counter = Counter { name: "nvml", period_s: 0.1, idle_watts: Some(70.0) };
        let window = |seconds| Some(Window { joules: 9.0, seconds });
        assert_eq!(refusal(&counter, &[window(2.0), window(2.5)]), None);
        for (windows, said) in [
            (vec![], "did not answer"),
            (vec![window(3.0), None], "did not answer"),
            (vec![window(3.0), window(1.5)], "a repeat takes 1.50 s and the nvml counter needs 2.00 s"),
        ] {
            let reason = refusal(&counter, &windows).unwrap_or_default();
            assert!(reason.contains(said), "{windows:?}: {reason}");
        }
        let unknown = Counter { idle_watts: None, ..counter };
        assert!(refusal(&unknown, &[window(3.0)]).unwrap().contains("idle power"));
    }
}
