//! The router's choice: which experts a token goes through, and how much each counts.

use crate::plan::ExpertWeighting;

/// Memory of choices, kept from token to token.
#[derive(Debug, Default, Clone)]
pub struct Routing {
    order: Vec<usize>,
    /// Index and weight of each chosen expert, from the largest score on.
    pub chosen: Vec<(usize, f32)>,
}

impl Routing {
    /// The `top_k` largest scores, the lowest index first where several tie, and the weight of each.
    pub fn choose(&mut self, scores: &[f32], top_k: usize, weighting: ExpertWeighting) -> &[(usize, f32)] {
        self.order.clear();
        self.order.extend(0..scores.len());
        self.order.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let experts = &self.order[..top_k.min(scores.len())];
        let largest = experts.first().map_or(0.0, |&expert| scores[expert]);
        let weight = |expert: &usize| (scores[*expert] - largest).exp();
        let sum: f32 = match weighting {
            ExpertWeighting::Chosen => experts.iter().map(weight).sum(),
            ExpertWeighting::All => self.order.iter().map(weight).sum(),
        };
        self.chosen.clear();
        self.chosen.extend(experts.iter().map(|expert| (*expert, weight(expert) / sum)));
        &self.chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_scores_are_chosen_and_weighed() {
        let scores = [0.0, 2f32.ln(), 4f32.ln(), 2f32.ln()];
        let mut routing = Routing::default();
        let mut near = |top_k, weighting, expected: &[(usize, f32)]| {
            let chosen = routing.choose(&scores, top_k, weighting);
            assert_eq!(chosen.len(), expected.len());
            // exp, a sum of four and a division: a few ulps of numbers below 1.
            let is_near = |(a, b): (&(usize, f32), &(usize, f32))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6;
            assert!(chosen.iter().zip(expected).all(is_near), "{chosen:?}");
        };
        near(2, ExpertWeighting::Chosen, &[(2, 4.0 / 6.0), (1, 2.0 / 6.0)]);
        near(2, ExpertWeighting::All, &[(2, 4.0 / 9.0), (1, 2.0 / 9.0)]);
        let all = [(2, 4.0 / 9.0), (1, 2.0 / 9.0), (3, 2.0 / 9.0), (0, 1.0 / 9.0)];
        near(4, ExpertWeighting::Chosen, &all);
        near(9, ExpertWeighting::All, &all);
    }
}
