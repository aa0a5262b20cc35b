//! One predicted token: the reference's distribution against the measured one.

use anyhow::{Result, bail};

/// Cost of a precision at one token. Entropies are in nats.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TokenCost {
    /// KL(reference ‖ measured) of the distributions over the vocabulary.
    pub kl: f64,
    /// Negative log likelihood of the text's token, measured.
    pub nll: f64,
    /// The same by the reference.
    pub reference_nll: f64,
    /// Both expect the same token most.
    pub agrees: bool,
    /// Largest difference of a logit.
    pub logit_error: f64,
}

/// Compares two rows of logits over the same vocabulary, of which `next` is the text's token. Fails where a logit is not
/// finite or `next` lies outside.
///
/// With d = log p − log q, KL = Σ p · d, all in fp64 from the fp32 logits. A log-sum-exp of V terms is exact to
/// (V + 3) · 2⁻⁵³ + |l| · 2⁻⁵³, so every d to four times that, and as Σ p = 1 the sum as well: below 1e-10 for a vocabulary
/// of 256k and logits up to 1e4. Rounding may leave a sum of zero slightly negative, which no divergence is.
pub fn compare(reference: &[f32], measured: &[f32], next: u32) -> Result<TokenCost> {
    if reference.len() != measured.len() || next as usize >= reference.len() {
        bail!("{} reference logits and {} measured ones for token {next}", reference.len(), measured.len());
    }
    check_finite("the reference's", reference)?;
    check_finite("the measured", measured)?;
    let (p, q) = (Distribution::of(reference), Distribution::of(measured));
    let (mut kl, mut logit_error) = (0.0, 0.0f64);
    for (&r, &m) in reference.iter().zip(measured) {
        let log_p = p.log(r);
        kl += log_p.exp() * (log_p - q.log(m));
        logit_error = logit_error.max((f64::from(r) - f64::from(m)).abs());
    }
    let next = next as usize;
    Ok(TokenCost {
        kl: kl.max(0.0),
        nll: -q.log(measured[next]),
        reference_nll: -p.log(reference[next]),
        agrees: p.top == q.top,
        logit_error,
    })
}

/// Fails where a logit is not finite.
pub fn check_finite(whose: &str, logits: &[f32]) -> Result<()> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(at) => bail!("{whose} logit of token id {at} is {}", logits[at]),
        None => Ok(()),
    }
}

/// Distribution that a row of logits means.
struct Distribution {
    log_sum_exp: f64,
    /// Index of the largest logit, the lowest where several tie.
    top: usize,
}

impl Distribution {
    fn of(logits: &[f32]) -> Self {
        let first_largest = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
        let top = (0..logits.len()).fold(0, first_largest);
        let max = f64::from(logits[top]);
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Self { log_sum_exp: max + sum.ln(), top }
    }

    /// Log probability of a token with this logit.
    fn log(&self, logit: f32) -> f64 {
        f64::from(logit) - self.log_sum_exp
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    #[test]
    fn a_row_against_itself_costs_nothing() {
        let mut rng = SplitMix64::new(7);
        for vocab in [1, 2, 511, 50_000] {
            let row: Vec<f32> = (0..vocab).map(|_| (40.0 * rng.unit() - 20.0) as f32).collect();
            let cost = compare(&row, &row, 0).unwrap();
            assert_eq!((cost.kl, cost.logit_error, cost.agrees), (0.0, 0.0, true));
            assert_eq!(cost.nll, cost.reference_nll);
        }
    }

    /// p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): KL = 1/2 · ln 2 − 1/4 · ln 2. The logits hold ln 2 in fp32, an error of
    /// 2⁻²⁵, which reaches the result at most once.
    #[test]
    fn known_distributions_have_their_divergence() {
        let ln2 = std::f32::consts::LN_2;
        let cost = compare(&[ln2, 0.0, 0.0], &[1.0, 1.0 + ln2, 1.0], 1).unwrap();
        assert!((cost.kl - 0.25 * std::f64::consts::LN_2).abs() < 2f64.powi(-23), "{}", cost.kl);
        assert!((cost.reference_nll - 4f64.ln()).abs() < 2f64.powi(-23));
        assert!((cost.nll - 2f64.ln()).abs() < 2f64.powi(-22));
        assert!(!cost.agrees);
        assert!((cost.logit_error - (1.0 + f64::from(ln2))).abs() < 1e-6);
    }

    /// Shifting all logits changes no distribution; fp32 holds these shifted values exactly.
    #[test]
    fn a_shift_changes_no_distribution() {
        let row = [1.5f32, -2.25, 0.0, 3.0];
        let shifted = row.map(|logit| logit + 64.0);
        let cost = compare(&row, &shifted, 2).unwrap();
        assert!(cost.kl < 1e-13, "{}", cost.kl);
        assert!((cost.nll - cost.reference_nll).abs() < 1e-13);
        assert_eq!(cost.logit_error, 64.0);
    }

    #[test]
    fn rows_that_cannot_be_compared_are_refused() {
        let cases: [(&[f32], &[f32], u32, &str); 4] = [
            (&[0.0, f32::NAN], &[0.0, 1.0], 0, "the reference's logit of token id 1 is NaN"),
            (&[0.0, 1.0], &[f32::INFINITY, 1.0], 0, "the measured logit of token id 0 is inf"),
            (&[0.0, 1.0], &[0.0], 0, "2 reference logits and 1 measured"),
            (&[0.0, 1.0], &[0.0, 1.0], 2, "for token 2"),
        ];
        for (reference, measured, next, expected) in cases {
            let error = compare(reference, measured, next).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
