//! Statistics of repeated measurements, and of nothing else: no benchmark and no record is known here.
//!
//! Sources, by the names used below:
//! - *Hahn & Meeker*, Statistical Intervals (1991), section 5.2: distribution-free interval of a median from order statistics;
//! - *Efron & Tibshirani*, An Introduction to the Bootstrap (1993), section 13.3: the percentile interval;
//! - *Hyndman & Fan*, Sample Quantiles in Statistical Packages (1996): definition 7 of a quantile;
//! - *Davison & Hinkley*, Bootstrap Methods and their Application (1997), section 3.8: resampling groups, then within groups;
//! - *Wilks*, Statistical Methods in the Atmospheric Sciences (2006), section 5.2.3: how many independent values a series is worth;
//! - *Iglewicz & Hoaglin*, How to Detect and Handle Outliers (1993): the modified Z score and its threshold 3.5.

mod interval;

pub use interval::{Interval, MIN_LAUNCHES, interval, launch_interval, median_interval};
use interval::{bootstrap, by_launch, dependence, middle, redraw, resampled};

/// Modified Z score from which a value is an outlier (Iglewicz & Hoaglin).
const OUTLIER_Z: f64 = 3.5;

/// An outlier is also this far from the median. Without it a run whose median absolute deviation is near zero would
/// find outliers in differences that nobody cares for.
const OUTLIER_SHARE: f64 = 0.05;

/// A ratio of two medians, or the median of paired ratios.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RatioEstimate {
    pub median: f64,
    pub interval: Option<Interval>,
}

/// `None` for no values.
pub fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 0.5)
}

/// `None` for no values.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Sample standard deviation, n − 1; `None` below two values.
pub fn stdev(values: &[f64]) -> Option<f64> {
    let mean = mean(values)?;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() >= 2).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Quantile `q`, from 0 to 1, by definition 7 of Hyndman & Fan; `None` for no values.
pub fn percentile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, q)
}

/// Quantile `q` of ascending values by definition 7 of Hyndman & Fan.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = q * last as f64;
    let below = sorted[at.floor() as usize];
    let above = sorted[at.ceil() as usize];
    // Equal neighbours are returned untouched: `below + 0 · ∞` would be NaN.
    Some(if below == above { below } else { below + (above - below) * at.fract() })
}

/// Percentile `p` of ascending values where at least one value is expected beyond it: p50 from 2 values, p90 from 10, p95
/// from 20, p99 from 100.
pub fn carried_percentile(sorted: &[f64], p: u32) -> Option<f64> {
    let beyond = sorted.len() as u64 * u64::from(100 - p);
    if beyond >= 100 { quantile(sorted, f64::from(p) / 100.0) } else { None }
}

/// `above[i] / below[i]` where repeat i of both ran in the same round, so that drift cancels. Surplus values are dropped.
pub fn paired_ratio(above: &[f64], below: &[f64]) -> Option<RatioEstimate> {
    paired_ratio_launches(above, below, &[])
}

/// The same where the rounds come from several starts, as many from each as `launches` says.
pub fn paired_ratio_launches(above: &[f64], below: &[f64], launches: &[u64]) -> Option<RatioEstimate> {
    let ratios: Vec<f64> = above.iter().zip(below).map(|(a, b)| a / b).collect();
    Some(RatioEstimate { median: median(&ratios)?, interval: interval(&ratios, launches) })
}

/// Ratio of the medians of samples taken at different times; both sides are resampled, from 6 values a side on.
pub fn unpaired_ratio(above: &[f64], below: &[f64]) -> Option<RatioEstimate> {
    unpaired_ratio_launches(above, below, &[])
}

/// The same where both sides' values come from as many starts as `launches` says.
pub fn unpaired_ratio_launches(above: &[f64], below: &[f64], launches: &[u64]) -> Option<RatioEstimate> {
    let ratio = median(above)? / median(below)?;
    let interval = match (by_launch(above, launches), by_launch(below, launches)) {
        (Some(a), Some(b)) => (a.len().min(b.len()) >= MIN_LAUNCHES)
            .then(|| bootstrap(above.len(), |rng| resampled(&a, rng) / resampled(&b, rng))),
        _ => (above.len().min(below.len()) >= 6)
            .then(|| bootstrap(above.len(), |rng| middle(redraw(above, rng)) / middle(redraw(below, rng))))
            .map(|interval| interval.around(ratio, dependence(above).max(dependence(below)))),
    };
    Some(RatioEstimate { median: ratio, interval })
}

/// Half width of the interval over the median; `None` where there is no interval. `launches` says how many values come from each start.
pub fn relative_half_width(values: &[f64], launches: &[u64]) -> Option<f64> {
    let interval = interval(values, launches)?;
    Some((interval.high - interval.low) / 2.0 / median(values)?.abs())
}

/// Indices of values whose modified Z score 0.6745 · |x − median| / MAD exceeds 3.5 (Iglewicz & Hoaglin) and that lie over
/// 5 % off the median.
pub fn outliers(values: &[f64]) -> Vec<usize> {
    let Some(center) = median(values) else { return Vec::new() };
    let deviations: Vec<f64> = values.iter().map(|value| (value - center).abs()).collect();
    let mad = median(&deviations).unwrap_or(0.0);
    let is_outlier = |deviation: f64| deviation > OUTLIER_SHARE * center.abs() && 0.6745 * deviation > OUTLIER_Z * mad;
    (0..values.len()).filter(|&i| is_outlier(deviations[i])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn location_and_spread() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(mean(&[1.0, 2.0, 6.0]), Some(3.0));
        assert_eq!(stdev(&[1.0]), None);
        // Squares of 2, 4, 4, 4, 5, 5, 7, 9 about their mean 5 sum to 32; over n − 1 = 7.
        let spread = stdev(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!(spread, Some((32.0f64 / 7.0).sqrt()));
    }

    #[test]
    fn percentiles_appear_when_the_count_carries_them() {
        for (n, p, carried) in [(1, 50, false), (2, 50, true), (9, 90, false), (10, 90, true), (19, 95, false)]
            .into_iter()
            .chain([(20, 95, true), (99, 99, false), (100, 99, true)])
        {
            let values: Vec<f64> = (0..n).map(f64::from).collect();
            assert_eq!(carried_percentile(&values, p).is_some(), carried, "p{p} of {n}");
        }
        let eleven: Vec<f64> = (0..11).map(f64::from).collect();
        assert_eq!(carried_percentile(&eleven, 90), Some(9.0));
    }

    #[test]
    fn pairing_cancels_drift() {
        let slowing: Vec<f64> = (0..8).map(|i| 100.0 / f64::from(i + 1)).collect();
        let doubled: Vec<f64> = slowing.iter().map(|v| 2.0 * v).collect();
        let paired = paired_ratio(&doubled, &slowing).unwrap();
        assert_eq!(paired, RatioEstimate { median: 2.0, interval: Some(Interval { low: 2.0, high: 2.0 }) });
        let unpaired = unpaired_ratio(&doubled, &slowing).unwrap();
        assert_eq!(unpaired.median, 2.0);
        assert!(unpaired.interval.unwrap().low < 1.0);
        assert_eq!(paired_ratio(&[], &[]), None);
    }

    #[test]
    fn outliers_are_far_by_both_measures() {
        assert_eq!(outliers(&[10.0, 10.1, 9.9, 10.0, 14.0]), [4]);
        // Far in deviations, but within 5 % of the median.
        assert!(outliers(&[10.0, 10.0, 10.0, 10.001, 10.2]).is_empty());
        // No spread at all but for one.
        assert_eq!(outliers(&[10.0, 10.0, 10.0, 11.0]), [3]);
        assert!(outliers(&[]).is_empty());
    }
}
