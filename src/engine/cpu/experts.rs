//! Mixtures of experts: worker 0 routes, then all workers multiply by every chosen expert, each its own rows of the matrices.
//!
//! Rows that chose one expert are a group, which is one product of each of its matrices; a group's rows lie together.

use std::ops::Range;

use super::run::Runner;
use super::schedule::Step;
use super::{Scratch, Weights};
use crate::engine::routing::Routing;
use crate::kernels::cpu::pool::Worker;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::cpu::{activation, vector};
use crate::plan::{ActivationKind, CLAMPED_SWIGLU_ALPHA, Expert, ExpertMatrix, ExpertsSpec, GatedActivation, MatrixId};
use crate::quant::{Activations, Prepared};

/// Memory that mixtures write, grown to what the longest call needs.
#[derive(Default)]
pub struct Mixtures {
    routes: Routes,
    /// The inputs of each group's gate and up, and of its down.
    inputs: Vec<Prepared>,
    betweens: Vec<Prepared>,
    /// Products of gates and of ups, `[rows · top_k, intermediate]` each.
    gates: Vec<f32>,
    ups: Vec<f32>,
    /// Products of the downs of one group, `[rows, hidden]`.
    downs: Vec<f32>,
}

/// The groups of a call.
#[derive(Default)]
struct Routes {
    routing: Routing,
    /// Expert, row and weight of each choice, by expert and row.
    choices: Vec<(usize, usize, f32)>,
    groups: Vec<Group>,
    /// Rows of one group, brought together.
    gathered: Vec<f32>,
}

/// Choices of one expert.
#[derive(Debug, Clone)]
struct Group {
    expert: usize,
    choices: Range<usize>,
}

impl Mixtures {
    /// Room for a call of `rows` rows.
    pub fn grow(&mut self, steps: &[Step], weights: &Weights, rows: usize) {
        for step in steps {
            let Step::Route(spec) = step else { continue };
            let Some(expert) = spec.experts.first() else { continue };
            let down = &weights.model.matrices[expert.down.weight.0];
            let choices = rows * spec.top_k;
            let groups = choices.min(spec.experts.len());
            let grow = |floats: &mut Vec<f32>, len: usize| floats.resize(floats.len().max(len), 0.0);
            grow(&mut self.gates, choices * down.k);
            grow(&mut self.ups, choices * down.k);
            grow(&mut self.downs, rows * down.n);
            for prepared in [&mut self.inputs, &mut self.betweens] {
                prepared.resize_with(prepared.len().max(groups), Prepared::default);
            }
        }
    }

    /// Experts that the last mixture sent rows through.
    pub fn chosen(&self) -> usize {
        self.routes.groups.len()
    }

    pub fn bytes(&self) -> usize {
        let floats = self.gates.len() + self.ups.len() + self.downs.len() + self.routes.gathered.capacity();
        let prepared: usize = self.inputs.iter().chain(&self.betweens).map(Prepared::capacity_bytes).sum();
        4 * floats + prepared
    }

    pub fn share(&mut self) -> SharedMixtures<'_> {
        SharedMixtures {
            routes: SharedSlice::new(std::slice::from_mut(&mut self.routes)),
            inputs: SharedSlice::new(&mut self.inputs),
            betweens: SharedSlice::new(&mut self.betweens),
            gates: SharedSlice::new(&mut self.gates),
            ups: SharedSlice::new(&mut self.ups),
            downs: SharedSlice::new(&mut self.downs),
        }
    }
}

/// [`Mixtures`] in one call.
pub struct SharedMixtures<'a> {
    /// One element, written by worker 0 in [`Step::Route`].
    routes: SharedSlice<'a, Routes>,
    /// Written by worker 0 in [`Step::Route`].
    inputs: SharedSlice<'a, Prepared>,
    /// One a group, written by its worker in [`Step::ExpertsBetween`].
    betweens: SharedSlice<'a, Prepared>,
    /// Columns are split over the workers.
    gates: SharedSlice<'a, f32>,
    ups: SharedSlice<'a, f32>,
    downs: SharedSlice<'a, f32>,
}

impl Runner<'_> {
    fn groups(&self) -> (&[Group], &[(usize, usize, f32)]) {
        // SAFETY: written by worker 0 in `route` only, with a barrier before any other step of the mixture.
        let routes = unsafe { &self.mixtures.routes.range(0..1)[0] };
        (&routes.groups, &routes.choices)
    }

    /// Worker 0 alone: chooses experts for each row, and prepares the rows of each group.
    pub(super) fn route(&self, spec: &ExpertsSpec) {
        // SAFETY: no other worker touches the routes in this step.
        let routes = unsafe { &mut self.mixtures.routes.range_mut(0..1)[0] };
        let Routes { routing, choices, groups, gathered } = routes;
        choices.clear();
        for row in 0..self.buffers.rows(spec.scores) {
            let scores = self.buffers.part(spec.scores, row, 0..self.buffers.width(spec.scores));
            let chosen = routing.choose(scores, spec.top_k, spec.weighting);
            choices.extend(chosen.iter().map(|(expert, weight)| (*expert, row, *weight)));
        }
        choices.sort_unstable_by_key(|(expert, row, _)| (*expert, *row));
        groups.clear();
        for (index, (expert, ..)) in choices.iter().enumerate() {
            match groups.last_mut().filter(|group| group.expert == *expert) {
                Some(group) => group.choices.end = index + 1,
                None => groups.push(Group { expert: *expert, choices: index..index + 1 }),
            }
        }
        for (index, group) in groups.iter().enumerate() {
            gathered.clear();
            for (_, row, _) in &choices[group.choices.clone()] {
                gathered.extend_from_slice(self.buffers.part(spec.x, *row, 0..self.buffers.width(spec.x)));
            }
            // SAFETY: as above.
            let prepared = unsafe { &mut self.mixtures.inputs.range_mut(index..index + 1)[0] };
            self.prepare_into(spec.experts[group.expert].gate.weight, gathered, group.choices.len(), prepared);
        }
    }

    /// Gates and ups of all groups, and their activation: each worker its own rows of the matrices.
    pub(super) fn experts_in(&self, spec: &ExpertsSpec, worker: &Worker) {
        let (groups, _) = self.groups();
        for (index, group) in groups.iter().enumerate() {
            let Expert { gate, up, .. } = spec.experts[group.expert];
            let (n, _) = self.weights.matrices[gate.weight.0].shape();
            let columns = worker.share(n, self.weights.granule);
            let of_group = group.choices.start * n..group.choices.end * n;
            // SAFETY: written by worker 0 before a barrier.
            let prepared = self.of_call(unsafe { &self.mixtures.inputs.range(index..index + 1)[0] }.view());
            let (gates, ups) = (self.mixtures.gates.part(of_group.clone()), self.mixtures.ups.part(of_group));
            self.multiply_expert(gate, prepared, columns.clone(), &gates, worker);
            self.multiply_expert(up, prepared, columns.clone(), &ups, worker);
            for row in 0..group.choices.len() {
                let of_row = row * n + columns.start..row * n + columns.end;
                // SAFETY: these columns are this worker's alone.
                let (gate, up) = unsafe { (gates.range_mut(of_row.clone()), ups.range(of_row)) };
                self.activate_expert(spec.activation, gate, up, worker);
            }
        }
    }

    /// `gate = act(gate) · up`
    fn activate_expert(&self, activation: GatedActivation, gate: &mut [f32], up: &[f32], worker: &Worker) {
        let (isa, gathered) = (self.weights.isa, &mut self.scratch(worker).gathered);
        gathered.clear();
        gathered.extend_from_slice(gate);
        let up_of = Some(up);
        match activation {
            GatedActivation::Plain(ActivationKind::Silu) => activation::silu(isa, gathered, up_of, gate),
            GatedActivation::Plain(ActivationKind::GeluTanh) => activation::gelu_tanh(isa, gathered, up_of, gate),
            GatedActivation::Plain(ActivationKind::Relu) => activation::relu(isa, gathered, up_of, gate),
            GatedActivation::ClampedSwiglu { limit } => {
                activation::clamped_swiglu(isa, gathered, up, limit, CLAMPED_SWIGLU_ALPHA, gate);
            }
        }
    }

    /// Prepares the inputs of the downs: each worker prepares whole groups.
    pub(super) fn experts_between(&self, spec: &ExpertsSpec, worker: &Worker) {
        let (groups, _) = self.groups();
        for (index, group) in groups.iter().enumerate().skip(worker.index()).step_by(worker.count()) {
            let down = spec.experts[group.expert].down.weight;
            let (_, k) = self.weights.matrices[down.0].shape();
            // SAFETY: gates were written before a barrier, and nobody writes them in this step.
            let x = unsafe { self.mixtures.gates.range(group.choices.start * k..group.choices.end * k) };
            // SAFETY: this group is this worker's alone.
            let prepared = unsafe { &mut self.mixtures.betweens.range_mut(index..index + 1)[0] };
            self.prepare_into(down, x, group.choices.len(), prepared);
        }
    }

    /// The weighted sum of all groups' downs.
    pub(super) fn experts_out(&self, step: usize, spec: &ExpertsSpec, worker: &Worker) {
        let n = self.buffers.width(spec.out);
        let columns = worker.share(n, self.weights.granule);
        for row in 0..self.buffers.rows(spec.out) {
            self.buffers.part_mut(spec.out, row, columns.clone()).fill(0.0);
        }
        let (groups, choices) = self.groups();
        for (index, group) in groups.iter().enumerate() {
            // SAFETY: written before a barrier.
            let prepared = self.of_call(unsafe { &self.mixtures.betweens.range(index..index + 1)[0] }.view());
            let downs = self.mixtures.downs.part(0..group.choices.len() * n);
            self.multiply_expert(spec.experts[group.expert].down, prepared, columns.clone(), &downs, worker);
            for (at, (_, row, weight)) in choices[group.choices.clone()].iter().enumerate() {
                // SAFETY: these columns are this worker's alone.
                let y = unsafe { downs.range(at * n + columns.start..at * n + columns.end) };
                vector::add_scaled(self.buffers.part_mut(spec.out, *row, columns.clone()), *weight, y);
            }
        }
        self.keep(step, 0, spec.out, columns);
    }

    fn multiply_expert(
        &self,
        ExpertMatrix { weight, bias }: ExpertMatrix,
        x: Activations,
        rows: Range<usize>,
        y: &SharedSlice<f32>,
        worker: &Worker,
    ) {
        let Scratch { kernel, .. } = self.scratch(worker);
        self.multiply(weight, x, rows, bias, y, kernel);
    }
}

/// All matrices of a mixture.
pub fn matrices(spec: &ExpertsSpec) -> impl Iterator<Item = MatrixId> + '_ {
    spec.experts.iter().flat_map(Expert::matrices).map(|matrix| matrix.weight)
}
