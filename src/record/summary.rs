//! Statistics of a metric as records hold them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats;

/// Statistics of one metric over the counted repeats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    pub unit: String,
    pub median: Option<f64>,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    /// Sample standard deviation, n − 1.
    pub stdev: Option<f64>,
    pub n: u64,
    /// 95 % interval of the median.
    pub ci95_low: Option<f64>,
    pub ci95_high: Option<f64>,
    /// Only where the count carries them.
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p95: Option<f64>,
    pub p99: Option<f64>,
}

impl Summary {
    /// Summarizes one metric of a record. `groups` holds the values of each repeat; most metrics have one value a
    /// repeat. Values of one repeat are not independent of each other, so the interval is that of the median of the repeats'
    /// medians, while every other number is taken over all values. `launches` has the number of repeats of each fresh start, in
    /// order; the interval then spans starts too.
    pub fn of(unit: &str, groups: &[Vec<f64>], launches: &[u64]) -> Self {
        let mut values: Vec<f64> = groups.iter().flatten().copied().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let medians: Vec<f64> = groups.iter().filter_map(|group| stats::median(group)).collect();
        let interval = stats::interval(&medians, launches);
        Self {
            unit: unit.to_owned(),
            median: stats::median(&values),
            min: values.first().copied(),
            max: values.last().copied(),
            mean: stats::mean(&values),
            stdev: stats::stdev(&values),
            n: values.len() as u64,
            ci95_low: interval.map(|i| i.low),
            ci95_high: interval.map(|i| i.high),
            p50: stats::carried_percentile(&values, 50),
            p90: stats::carried_percentile(&values, 90),
            p95: stats::carried_percentile(&values, 95),
            p99: stats::carried_percentile(&values, 99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_one_repeat_do_not_narrow_the_interval() {
        let groups: Vec<Vec<f64>> = (0..6).map(|i| vec![f64::from(i); 50]).collect();
        let summary = Summary::of("ms", &groups, &[]);
        assert_eq!((summary.n, summary.median, summary.p99), (300, Some(2.5), Some(5.0)));
        assert_eq!((summary.ci95_low, summary.ci95_high), (Some(0.0), Some(5.0)));
    }
}
