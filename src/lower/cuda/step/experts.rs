//! Mixtures of experts in a step: the router's choice, and the matvecs of what it has chosen.

use anyhow::{Context, Result};

use super::{EXECUTOR, Lowering};
use crate::kernels::cuda::launch::dimension;
use crate::kernels::cuda::matvec::{
    ACT_CLAMPED, ChosenExperts, Epilogue, InputDesc, MatrixDesc, Mode, OutputType, PowersOfTwo, Product,
};
use crate::kernels::cuda::route::{ExpertParts, Route};
use crate::lower::cuda::activation_number;
use crate::plan::fuse::FusedExperts;
use crate::plan::{Expert, ExpertMatrix, ExpertWeighting, ExpertsSpec, GatedActivation, refuse};

impl Lowering<'_> {
    /// The router's choice, the gates of all chosen experts together, and their downs.
    pub(super) fn choose(&mut self, FusedExperts { input, spec, residual }: &FusedExperts) -> Result<()> {
        let ExpertsSpec { x: _, scores, experts, top_k, weighting, activation, out } = spec;
        let x = residual.context("a mixture that is added to no residual")?;
        let (activation, limit) = match *activation {
            GatedActivation::Plain(kind) => (activation_number(kind), 0.0),
            GatedActivation::ClampedSwiglu { limit } => (ACT_CLAMPED, limit),
        };
        let table = self.memory.experts + (size_of::<ExpertParts>() * self.experts.len()) as u64;
        for expert in experts {
            self.check_alike(spec, expert)?;
            let part = |ExpertMatrix { weight, bias }: ExpertMatrix, activation| {
                self.on.matrix(weight).expert_part(bias.map_or(0, |bias| self.on.vector(bias)), activation)
            };
            let parts = [part(expert.gate, activation)?, part(expert.up, activation)?, part(expert.down, 0)?];
            self.experts.push(parts);
        }
        let first = experts.first().context("a mixture without experts")?;
        let [gate, up, down] = first.matrices().map(|part| self.on.matrix(part.weight));
        let (rows, hidden) = (gate.n, self.memory.at(*out)?);
        let rows_of_expert = dimension(rows)?;
        let route =
            Route { scores: self.memory.at(*scores)?, experts: table, hidden, rows_of_expert, ..Route::default() };
        let is_over_all = i32::from(*weighting == ExpertWeighting::All);
        self.instructions.route(Route { is_over_all, ..route.choosing(*top_k, experts.len())? })?;

        let (session, scale) = (self.on.session(), self.scales[out.0]);
        let plain = Epilogue {
            outlier_columns: session.outlier_columns,
            output_type: OutputType::TaggedHalves,
            softcap: limit,
            ..Epilogue::default()
        };
        // Operands that the chosen experts' replace, but for shapes, formats and the place of the results.
        let product = |matrix: MatrixDesc, out| Product { matrix, first_row: 0, bias: 0, out, activation: 0 };
        let of_all = [gate, up].map(|matrix| product(MatrixDesc { n: top_k * rows, ..matrix }, hidden));
        let chosen = ChosenExperts { count: dimension(*top_k)?, rows_of_expert };
        self.instructions.multiply(
            Mode::Gated,
            vec![self.input(input)?],
            &of_all,
            Epilogue { chosen, range: PowersOfTwo { read: 1.0, stored: scale, rounded: scale }, ..plain },
        )?;
        let results = InputDesc { x: hidden, scale: 1.0, is_tagged: 1, ..InputDesc::default() };
        let range = PowersOfTwo { read: scale, ..PowersOfTwo::default() };
        let epilogue = Epilogue { residual: self.memory.at(x)?, chosen, range, ..plain };
        self.instructions.multiply(Mode::Weighed, vec![results], &[product(down, 0)], epilogue)?;
        Ok(())
    }

    /// Refuses experts that are not alike: one instruction reads whichever are chosen.
    fn check_alike(&self, spec: &ExpertsSpec, expert: &Expert) -> Result<()> {
        let layout = |part: ExpertMatrix| {
            let matrix = self.on.matrix(part.weight);
            (matrix.family.name, matrix.n, matrix.k, matrix.stride_bytes, matrix.threshold.to_bits())
        };
        let [gate, up, down] = expert.matrices().map(layout);
        let is_alike = spec.experts[0].matrices().map(layout) == [gate, up, down] && gate == up;
        Ok(refuse(EXECUTOR, "a mixture", &[(!is_alike).then_some(&"experts of several formats or sizes")])?)
    }
}
