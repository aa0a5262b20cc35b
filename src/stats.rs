//! Statistics of repeated measurements. Leaf module: it knows no benchmark.
//!
//! Sources, by the names used below:
//! - *Hahn & Meeker*, Statistical Intervals (1991), section 5.2: distribution-free interval of a median from order statistics;
//! - *Efron & Tibshirani*, An Introduction to the Bootstrap (1993), section 13.3: the percentile interval;
//! - *Hyndman & Fan*, Sample Quantiles in Statistical Packages (1996): definition 7 of a quantile;
//! - *Davison & Hinkley*, Bootstrap Methods and their Application (1997), section 3.8: resampling groups, then within groups;
//! - *Wilks*, Statistical Methods in the Atmospheric Sciences (2006), section 5.2.3: how many independent values a series is worth;
//! - *Iglewicz & Hoaglin*, How to Detect and Handle Outliers (1993): the modified Z score and its threshold 3.5.

use crate::record::Summary;

/// Below this many samples the interval of a median comes from order statistics, from it on from the bootstrap: few samples
/// make few distinct resamples, and many make the ranks' exact coverage coarser than the bootstrap's error.
pub const BOOTSTRAP_FROM: usize = 20;

/// Resamples of a bootstrap. The Monte Carlo error of a 2.5 % tail is then √(0.025 · 0.975 / 2000) = 0.35 points.
const RESAMPLES: usize = 2000;

/// Seed of every bootstrap, so that the same samples give the same interval.
const BOOTSTRAP_SEED: u64 = 0x5eed;

/// Fewer starts give no interval: the widest that resampling 4 of them finds covers 1 − 2/2⁴ = 87.5 % where starts differ, that of
/// 5 starts 93.75 %.
pub const MIN_LAUNCHES: usize = 5;

/// Modified Z score from which a value is an outlier (Iglewicz & Hoaglin).
const OUTLIER_Z: f64 = 3.5;

/// An outlier is also this far from the median. Without it a run whose median absolute deviation is near zero would
/// find outliers in differences that nobody cares for.
const OUTLIER_SHARE: f64 = 0.05;

/// Standard errors by which the autocorrelation of independent values exceeds its mean in one series of twenty.
const DEPENDENT_Z: f64 = 1.645;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

/// A ratio of two medians, or the median of paired ratios.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RatioEstimate {
    pub median: f64,
    pub interval: Option<Interval>,
}

/// Everything a record says about one metric. `groups` holds the values of each repeat; most metrics have one value a
/// repeat. Values of one repeat are not independent of each other, so the interval is that of the median of the repeats'
/// medians, while every other number is taken over all values.
pub fn summarize(unit: &str, groups: &[Vec<f64>]) -> Summary {
    summarize_launches(unit, groups, &[])
}

/// The same where the repeats come from several starts: `launches` says how many from each, in order. The interval then spans
/// starts too.
pub fn summarize_launches(unit: &str, groups: &[Vec<f64>], launches: &[u64]) -> Summary {
    let mut values: Vec<f64> = groups.iter().flatten().copied().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let medians: Vec<f64> = groups.iter().filter_map(|group| median(group)).collect();
    let interval = interval(&medians, launches);
    Summary {
        unit: unit.to_owned(),
        median: median(&values),
        min: values.first().copied(),
        max: values.last().copied(),
        mean: mean(&values),
        stdev: stdev(&values),
        n: values.len() as u64,
        ci95_low: interval.map(|i| i.low),
        ci95_high: interval.map(|i| i.high),
        p50: carried_percentile(&values, 50),
        p90: carried_percentile(&values, 90),
        p95: carried_percentile(&values, 95),
        p99: carried_percentile(&values, 99),
    }
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

/// 95 % interval of the median of `values`, which are in the order of time. `None` below 6 values: the widest ranks of 5 cover
/// 1 − 2/2⁵ = 93.75 %. Where neighbours resemble each other, the values are worth fewer independent ones, and the interval is
/// wider by `dependence`, at most as wide as the values spread.
pub fn median_interval(values: &[f64]) -> Option<Interval> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let independent = if values.len() >= BOOTSTRAP_FROM {
        bootstrap(values.len(), |rng| middle(redraw(values, rng)))
    } else {
        let rank = median_rank(sorted.len())?;
        Interval { low: sorted[rank - 1], high: sorted[sorted.len() - rank] }
    };
    let (median, factor) = (quantile(&sorted, 0.5)?, dependence(values));
    let wider = independent.around(median, factor);
    Some(Interval {
        low: wider.low.max(sorted[0]).min(independent.low),
        high: wider.high.min(sorted[sorted.len() - 1]).max(independent.high),
    })
}

/// √(n / n′), where n values that resemble their neighbours are worth n′ = n · (1 − ρ) / (1 + ρ) independent ones (Wilks); ρ is
/// the correlation of the values' ranks with the next ones', so that no outlier decides. 1 where ρ is what independent values
/// may show by chance: its mean is −1/n, its standard error 1/√n.
fn dependence(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let ranks = ranks(values);
    let centered: Vec<f64> = ranks.iter().map(|rank| rank - (n - 1.0) / 2.0).collect();
    let square: f64 = centered.iter().map(|c| c * c).sum();
    if values.len() < 2 || square == 0.0 {
        return 1.0;
    }
    let rho = centered.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / square;
    if rho <= DEPENDENT_Z / n.sqrt() - 1.0 / n {
        return 1.0;
    }
    // The estimate is low by about (1 + 3ρ) / n (Kendall).
    let rho = (rho + (1.0 + 3.0 * rho) / n).min(1.0 - 2.0 / (n + 1.0));
    ((1.0 + rho) / (1.0 - rho)).sqrt()
}

/// Places in ascending order from 0 on; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let last = first + equal.len() - 1;
        equal.iter().for_each(|&i| ranks[i] = (first + last) as f64 / 2.0);
        first = last + 1;
    }
    ranks
}

impl Interval {
    /// Both ends `factor` times as far from `center`.
    fn around(self, center: f64, factor: f64) -> Self {
        Self { low: center - factor * (center - self.low), high: center + factor * (self.high - center) }
    }
}

/// [`median_interval`], or where the values come from several starts, [`launch_interval`].
pub fn interval(values: &[f64], launches: &[u64]) -> Option<Interval> {
    match by_launch(values, launches) {
        Some(launches) => launch_interval(&launches),
        None => median_interval(values),
    }
}

/// `values` cut where a new start began; `None` where all are from one, or where the counts are of other values.
fn by_launch<'a>(values: &'a [f64], launches: &[u64]) -> Option<Vec<&'a [f64]>> {
    if launches.len() < 2 || launches.iter().sum::<u64>() != values.len() as u64 {
        return None;
    }
    let mut rest = values;
    let cut = launches.iter().map(|&n| {
        // The sum is the length, so every count fits what is left.
        let (launch, behind) = rest.split_at(n as usize);
        rest = behind;
        launch
    });
    Some(cut.filter(|launch| !launch.is_empty()).collect())
}

/// 95 % interval of the median of what starts differ around: the starts are resampled, then the repeats within each (Davison &
/// Hinkley), and the statistic is the median of the starts' medians. Repeats of one start share what differs between starts, so
/// that taking them for independent makes the interval too narrow. `None` below [`MIN_LAUNCHES`]. Where starts differ much more
/// than repeats, it covers what the bootstrap of a median of so few values does: 93.75 % at 5, least at 7 with 87.5 %, about 95 %
/// from 10 on.
pub fn launch_interval(launches: &[&[f64]]) -> Option<Interval> {
    let n_values = launches.iter().map(|launch| launch.len()).sum();
    (launches.len() >= MIN_LAUNCHES).then(|| bootstrap(n_values, |rng| resampled(launches, rng)))
}

/// The median of the medians of as many starts as there are, drawn with replacement, and of the repeats of each.
fn resampled(launches: &[&[f64]], rng: &mut SplitMix64) -> f64 {
    middle((0..launches.len()).map(|_| middle(redraw(launches[rng.below(launches.len())], rng))).collect())
}

/// As many of `values` as there are, drawn with replacement.
fn redraw(values: &[f64], rng: &mut SplitMix64) -> Vec<f64> {
    (0..values.len()).map(|_| values[rng.below(values.len())]).collect()
}

/// Largest rank r for which the r-th smallest and the r-th largest of `n` values enclose the median with at least 95 %:
/// the tail P(X < r) of X ~ Binomial(n, 1/2) stays within 2.5 % (Hahn & Meeker).
fn median_rank(n: usize) -> Option<usize> {
    let mut probability = 0.5f64.powi(n as i32);
    let mut tail = 0.0;
    let mut rank = 0;
    while rank < n && tail + probability <= 0.025 {
        tail += probability;
        rank += 1;
        probability *= (n - rank + 1) as f64 / rank as f64;
    }
    (rank > 0).then_some(rank)
}

/// Percentile interval of a statistic over resamples. `size` varies the stream of random numbers with the sample count.
fn bootstrap(size: usize, mut statistic: impl FnMut(&mut SplitMix64) -> f64) -> Interval {
    let mut rng = SplitMix64::new(BOOTSTRAP_SEED ^ size as u64);
    let mut found: Vec<f64> = (0..RESAMPLES).map(|_| statistic(&mut rng)).collect();
    found.sort_by(f64::total_cmp);
    let cut = RESAMPLES / 40;
    Interval { low: found[cut], high: found[RESAMPLES - 1 - cut] }
}

/// Median of a non-empty buffer by selection: the bootstrap's inner loop.
fn middle(mut values: Vec<f64>) -> f64 {
    let half = values.len() / 2;
    let (below, &mut upper, _) = values.select_nth_unstable_by(half, f64::total_cmp);
    if below.len() == half && values.len() % 2 == 1 {
        return upper;
    }
    let lower = values[..half].iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (lower + upper) / 2.0
}

/// `above[i] / below[i]` where repeat i of both ran in the same round, so that drift cancels. Surplus values are dropped.
pub fn paired_ratio(above: &[f64], below: &[f64]) -> Option<RatioEstimate> {
    paired_ratio_launches(above, below, &[])
}

/// The same where the rounds come from several starts, as [`summarize_launches`] has them.
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

/// Half width of the interval over the median; `None` where there is no interval. `launches` is as in [`summarize_launches`].
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

/// Random numbers for resampling and synthetic prompts: Steele, Lea & Flood, Fast Splittable Pseudorandom Number
/// Generators (2014).
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`, up to a bias of n / 2⁶⁴. `n` ≥ 1.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
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
    fn selection_agrees_with_sorting() {
        let mut rng = SplitMix64::new(1);
        for n in 1..40 {
            let values: Vec<f64> = (0..n).map(|_| (rng.below(10)) as f64).collect();
            assert_eq!(Some(middle(values.clone())), median(&values), "{values:?}");
        }
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
    fn ranks_equal_the_published_table() {
        // Lower ranks of the 95 % interval of a median, e.g. Conover, Practical Nonparametric Statistics, table A3.
        for (n, rank) in
            [(5, None), (6, Some(1)), (8, Some(1)), (9, Some(2)), (12, Some(3)), (15, Some(4)), (19, Some(5))]
        {
            assert_eq!(median_rank(n), rank, "{n} samples");
        }
    }

    #[test]
    fn intervals_cover_the_true_median() {
        const TRIALS: usize = 1000;
        let mut rng = SplitMix64::new(7);
        // A right-skewed distribution, as times are: 1 + the square of a uniform number, with median 1.25.
        for n in [6, 9, 14, 19, 20, 25, 40] {
            let covered = (0..TRIALS)
                .filter(|_| {
                    let values: Vec<f64> = (0..n).map(|_| 1.0 + rng.unit().powi(2)).collect();
                    median_interval(&values).is_some_and(|i| i.low <= 1.25 && 1.25 <= i.high)
                })
                .count();
            let share = covered as f64 / TRIALS as f64;
            // Ranks cover at least 95 % exactly. The percentile bootstrap of a median comes out at some order statistic and
            // may lose up to 1.5 points at these counts. Three standard errors of the simulation, 3 · √(0.95 · 0.05 / 1000),
            // are 2.1 points.
            let nominal = if n < BOOTSTRAP_FROM { 0.95 } else { 0.935 };
            assert!(share >= nominal - 0.021, "{n} samples: {share}");
        }
    }

    /// In an order that says nothing.
    fn shuffled(mut values: Vec<f64>, rng: &mut SplitMix64) -> Vec<f64> {
        (1..values.len()).for_each(|i| values.swap(i, rng.below(i + 1)));
        values
    }

    #[test]
    fn only_neighbours_that_resemble_each_other_widen_an_interval() {
        // Alternating values are worth no fewer than independent ones; a slope is worth about two.
        let alternating: Vec<f64> = (0..30).map(|i| f64::from(i % 2)).collect();
        let slope: Vec<f64> = (0..30).map(f64::from).collect();
        assert_eq!((dependence(&alternating), dependence(&[7.0; 30]), dependence(&[1.0])), (1.0, 1.0, 1.0));
        // ρ is capped where 30 values are worth one.
        assert!(dependence(&slope) <= 30f64.sqrt() + 1e-9 && dependence(&slope) > 4.0, "{}", dependence(&slope));
        let interval = median_interval(&slope).unwrap();
        assert_eq!((interval.low, interval.high), (0.0, 29.0), "no wider than the values");
    }

    #[test]
    fn intervals_of_drifting_values_cover_the_true_median() {
        const TRIALS: usize = 400;
        let mut rng = SplitMix64::new(13);
        // First-order autoregressive noise around 10; the part `phi` of each value carries over to the next. With n′ known the
        // coverage would be 95 %; estimated from so few values it is short of that by what `least` says, of which three
        // standard errors of the simulation are up to 5 points. Shuffled, the same values pass for independent ones.
        for (phi, n, least) in [(0.5, 40, 0.88), (0.8, 40, 0.83), (0.8, 100, 0.88)] {
            let (mut covered, mut as_independent) = (0, 0);
            for _ in 0..TRIALS {
                let mut noise = 0.0;
                let mut next = |rng: &mut SplitMix64| {
                    noise = phi * noise + rng.unit() - 0.5;
                    10.0 + noise
                };
                // Long enough for the noise to forget where it began.
                for _ in 0..50 {
                    next(&mut rng);
                }
                let values: Vec<f64> = (0..n).map(|_| next(&mut rng)).collect();
                let covers = |values: &[f64]| {
                    usize::from(median_interval(values).is_some_and(|i| i.low <= 10.0 && 10.0 <= i.high))
                };
                covered += covers(&values);
                as_independent += covers(&shuffled(values, &mut rng));
            }
            let share = |covered: usize| covered as f64 / TRIALS as f64;
            let (covered, as_independent) = (share(covered), share(as_independent));
            assert!(covered >= least, "phi {phi}, {n} values: {covered}");
            assert!(as_independent <= covered - 0.05, "phi {phi}, {n} values: {as_independent} as independent");
        }
    }

    #[test]
    fn intervals_over_launches_cover_where_those_over_repeats_do_not() {
        const TRIALS: usize = 300;
        const REPEATS: usize = 6;
        let mut rng = SplitMix64::new(11);
        // What a start adds to all its repeats spreads three times as far as the repeats; both are symmetric, so the median is 10.
        // The coverage that the bootstrap of a median of so many values has, less three standard errors of the simulation,
        // 3 · √(p · (1 − p) / 300).
        for (n_launches, nominal) in [(5, 0.9375 - 0.042), (7, 0.875 - 0.057), (10, 0.935 - 0.043), (20, 0.935 - 0.043)]
        {
            let counts = vec![REPEATS as u64; n_launches];
            let (mut over_launches, mut over_repeats) = (0, 0);
            for _ in 0..TRIALS {
                let launch = |rng: &mut SplitMix64| {
                    let start = 10.0 + 3.0 * (rng.unit() - 0.5);
                    (0..REPEATS).map(|_| start + rng.unit() - 0.5).collect::<Vec<f64>>()
                };
                let values: Vec<f64> = (0..n_launches).flat_map(|_| launch(&mut rng)).collect();
                let covers = |i: Option<Interval>| usize::from(i.is_some_and(|i| i.low <= 10.0 && 10.0 <= i.high));
                over_launches += covers(interval(&values, &counts));
                over_repeats += covers(median_interval(&shuffled(values, &mut rng)));
            }
            let share = |covered: usize| covered as f64 / TRIALS as f64;
            assert!(share(over_launches) >= nominal, "{n_launches}: {}", share(over_launches));
            assert!(
                share(over_repeats) < 0.75,
                "{n_launches} launches as independent repeats: {}",
                share(over_repeats)
            );
        }
    }

    #[test]
    fn launches_are_told_apart_only_where_the_counts_are_theirs() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(by_launch(&values, &[2, 0, 4]), Some(vec![&values[..2], &values[2..]]));
        for one_start in [&[][..], &[6], &[2, 3]] {
            assert_eq!(by_launch(&values, one_start), None);
            assert_eq!(interval(&values, one_start), median_interval(&values));
        }
        assert_eq!(interval(&values, &[1, 1, 1, 3]), None, "too few starts");
        let flat = [7.0; 10];
        assert_eq!(interval(&flat, &[2; 5]), Some(Interval { low: 7.0, high: 7.0 }));
    }

    #[test]
    fn same_samples_same_interval() {
        let values: Vec<f64> = (0..30).map(|i| f64::from(i * 7 % 30)).collect();
        assert_eq!(median_interval(&values), median_interval(&values));
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

    #[test]
    fn steps_of_one_repeat_do_not_narrow_the_interval() {
        let groups: Vec<Vec<f64>> = (0..6).map(|i| vec![f64::from(i); 50]).collect();
        let summary = summarize("ms", &groups);
        assert_eq!((summary.n, summary.median, summary.p99), (300, Some(2.5), Some(5.0)));
        assert_eq!((summary.ci95_low, summary.ci95_high), (Some(0.0), Some(5.0)));
    }
}
