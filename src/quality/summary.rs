//! All tokens of a text in a few numbers.

use super::cost::TokenCost;
use crate::stats;

/// Standard errors on each side of a mean that hold it in 95 % of samples. The tokens of a text are taken for independent,
/// which they nearly are once the differences of two models over the same token are what is averaged.
const Z95: f64 = 1.96;

/// Numbers over at least one token. Entropies are in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QualitySummary {
    pub n_tokens: usize,
    pub nll_mean: f64,
    pub reference_nll_mean: f64,
    /// exp of the mean negative log likelihood.
    pub perplexity: f64,
    pub kl_mean: f64,
    /// Half the 95 % interval of [`Self::kl_mean`]; `None` for one token.
    pub kl_mean_half_width: Option<f64>,
    pub kl_median: f64,
    /// By definition 7 of Hyndman & Fan, as numpy has it.
    pub kl_p99: f64,
    /// Share of the tokens.
    pub top1_agreement: f64,
    pub logit_error_max: f64,
}

/// `None` for no tokens. Sums are in fp64: their rounding, n · 2⁻⁵³ of the sum, shows in no figure.
pub fn summarize(costs: &[TokenCost]) -> Option<QualitySummary> {
    let values = |value: fn(&TokenCost) -> f64| costs.iter().map(value).collect::<Vec<_>>();
    let kl = values(|cost| cost.kl);
    let nll_mean = stats::mean(&values(|cost| cost.nll))?;
    Some(QualitySummary {
        n_tokens: costs.len(),
        nll_mean,
        reference_nll_mean: stats::mean(&values(|cost| cost.reference_nll))?,
        perplexity: nll_mean.exp(),
        kl_mean: stats::mean(&kl)?,
        kl_mean_half_width: half_width(&kl),
        kl_median: stats::median(&kl)?,
        kl_p99: stats::percentile(&kl, 0.99)?,
        top1_agreement: stats::mean(&values(|cost| f64::from(u8::from(cost.agrees))))?,
        logit_error_max: costs.iter().map(|cost| cost.logit_error).fold(0.0, f64::max),
    })
}

/// A ratio of perplexities with its 95 % interval, from the differences of each token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerplexityRatio {
    pub ratio: f64,
    /// `None` for one token.
    pub ci95: Option<(f64, f64)>,
}

/// Perplexity over that of `base` on the same tokens: exp of the mean difference of their log likelihoods. `None` where the
/// tokens are not as many, or none.
pub fn perplexity_ratio(costs: &[TokenCost], base: &[TokenCost]) -> Option<PerplexityRatio> {
    if costs.len() != base.len() {
        return None;
    }
    let differences: Vec<f64> = costs.iter().zip(base).map(|(cost, base)| cost.nll - base.nll).collect();
    let mean = stats::mean(&differences)?;
    let ci95 = half_width(&differences).map(|half| ((mean - half).exp(), (mean + half).exp()));
    Some(PerplexityRatio { ratio: mean.exp(), ci95 })
}

fn half_width(values: &[f64]) -> Option<f64> {
    stats::stdev(values).map(|stdev| Z95 * stdev / (values.len() as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(kl: f64, nll: f64, agrees: bool) -> TokenCost {
        TokenCost { kl, nll, reference_nll: 1.0, agrees, logit_error: kl }
    }

    #[test]
    fn numbers_are_those_of_the_definitions() {
        let costs = [cost(0.1, 2.0, true), cost(0.3, 4.0, false), cost(0.2, 3.0, true), cost(0.4, 3.0, true)];
        let found = summarize(&costs).unwrap();
        assert_eq!((found.n_tokens, found.nll_mean, found.reference_nll_mean), (4, 3.0, 1.0));
        assert_eq!((found.perplexity, found.top1_agreement, found.logit_error_max), (3f64.exp(), 0.75, 0.4));
        for (value, expected) in [(found.kl_mean, 0.25), (found.kl_median, 0.25), (found.kl_p99, 0.397)] {
            assert!((value - expected).abs() < 1e-12, "{value} for {expected}");
        }
        // The values' variance is 0.05 / 3.
        let expected = 1.96 * (0.05f64 / 3.0).sqrt() / 2.0;
        assert!((found.kl_mean_half_width.unwrap() - expected).abs() < 1e-12);
        assert_eq!(summarize(&[]), None);
    }

    #[test]
    fn a_ratio_is_paired_by_token() {
        // Differences 0.5 everywhere: the interval is a point although both texts vary.
        let base: Vec<_> = (0..9).map(|at| cost(0.0, f64::from(at), true)).collect();
        let worse: Vec<_> = (0..9).map(|at| cost(0.0, f64::from(at) + 0.5, true)).collect();
        let found = perplexity_ratio(&worse, &base).unwrap();
        assert_eq!((found.ratio, found.ci95), (0.5f64.exp(), Some((0.5f64.exp(), 0.5f64.exp()))));
        assert_eq!(perplexity_ratio(&base, &base).unwrap().ratio, 1.0);
        assert_eq!(perplexity_ratio(&base[1..], &base), None);
        assert_eq!(perplexity_ratio(&worse[..1], &base[..1]).unwrap().ci95, None);
    }
}
