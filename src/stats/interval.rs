//! 95 % intervals of medians. The sources are named in the parent module.

use super::quantile;
use crate::rng::SplitMix64;

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

/// Standard errors by which the autocorrelation of independent values exceeds its mean in one series of twenty.
const DEPENDENT_Z: f64 = 1.645;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
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
pub(super) fn dependence(values: &[f64]) -> f64 {
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
    pub(super) fn around(self, center: f64, factor: f64) -> Self {
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
pub(super) fn by_launch<'a>(values: &'a [f64], launches: &[u64]) -> Option<Vec<&'a [f64]>> {
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
pub(super) fn resampled(launches: &[&[f64]], rng: &mut SplitMix64) -> f64 {
    middle((0..launches.len()).map(|_| middle(redraw(launches[rng.below(launches.len())], rng))).collect())
}

/// As many of `values` as there are, drawn with replacement.
pub(super) fn redraw(values: &[f64], rng: &mut SplitMix64) -> Vec<f64> {
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
pub(super) fn bootstrap(size: usize, mut statistic: impl FnMut(&mut SplitMix64) -> f64) -> Interval {
    let mut rng = SplitMix64::new(BOOTSTRAP_SEED ^ size as u64);
    let mut found: Vec<f64> = (0..RESAMPLES).map(|_| statistic(&mut rng)).collect();
    found.sort_by(f64::total_cmp);
    let cut = RESAMPLES / 40;
    Interval { low: found[cut], high: found[RESAMPLES - 1 - cut] }
}

/// Median of a non-empty buffer by selection: the bootstrap's inner loop.
pub(super) fn middle(mut values: Vec<f64>) -> f64 {
    let half = values.len() / 2;
    let (below, &mut upper, _) = values.select_nth_unstable_by(half, f64::total_cmp);
    if below.len() == half && values.len() % 2 == 1 {
        return upper;
    }
    let lower = values[..half].iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (lower + upper) / 2.0
}

#[cfg(test)]
mod tests {
    use super::super::median;
    use super::*;

    /// In an order that says nothing.
    fn shuffled(mut values: Vec<f64>, rng: &mut SplitMix64) -> Vec<f64> {
        (1..values.len()).for_each(|i| values.swap(i, rng.below(i + 1)));
        values
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
        // First-order autoregressive noise around 10; the part `phi` of each value carries over to the next. The signs of Gaussian
        // values k apart correlate by 2/π · arcsin φᵏ, so that the variance of a median is s = 1 + 2 Σ 2/π · arcsin φᵏ times that of
        // independent values: 2.31 for φ = 0.5, 6.39 for 0.8.
        //
        // Shuffled, the same values pass for independent ones, and the interval covers P(|Z| < 1.96 / √s) = 80.3 % and 56.2 %; three
        // standard errors of the simulation, 3 · √(p · (1 − p) / 400), are 6.0 and 7.4 points. That is `most`.
        //
        // In order, the estimate of φ spreads by √((1 − φ²) / n). Two of these too low, it gives P(|Z| < 1.96 · √((1 + ρ) / (1 − ρ) / s)):
        // 89.5 %, 88.5 % and 92.4 %. Less 1.5 points for the bootstrap, and 4.6, 4.8 and 4.0 for the simulation, that is `least`.
        for (phi, n, least, most) in [(0.5, 40, 0.834, 0.863), (0.8, 40, 0.822, 0.636), (0.8, 100, 0.869, 0.636)] {
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
            assert!(as_independent <= most, "phi {phi}, {n} values: {as_independent} as independent");
        }
    }

    #[test]
    fn intervals_over_launches_cover_where_those_over_repeats_do_not() {
        const TRIALS: usize = 300;
        const REPEATS: usize = 6;
        let mut rng = SplitMix64::new(11);
        // What a start adds to all its repeats spreads three times as far as the repeats; both are symmetric, so the median is 10.
        // Repeats of a start correlate by 9/10 and their signs by 2/π · arcsin 0.9 = 0.71, so that the variance of the median is
        // 1 + 5 · 0.71 = 4.6 times that of independent values. An interval that takes them for such covers P(|Z| < 1.96 / √4.6) = 64.1 %,
        // and three standard errors of the simulation are 8.3 points.
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
                share(over_repeats) < 0.641 + 0.083,
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

    /// The seed makes an interval a function of its samples, here and on every machine. The ranks 10 and 21 of 30 enclose the median with
    /// 95.7 %, 11 and 20 with 90.1 % (Hahn & Meeker): the values 9 to 10 and 19 to 20, and a median may lie between two values.
    #[test]
    fn the_same_samples_give_the_same_interval_everywhere() {
        let values: Vec<f64> = (0..30).map(|i| f64::from(i * 13 % 30)).collect();
        assert_eq!(median_interval(&values), Some(Interval { low: 9.5, high: 19.5 }));
    }
}
