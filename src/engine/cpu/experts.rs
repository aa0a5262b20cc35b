//! Mixtures of experts: the router's choice, and the chosen experts' matrices.
//!
//! One row goes through all of its experts together, in three phases with a barrier between them: gates and ups of all, the
//! preparation of their products, downs of all. Of several rows, those that chose the same expert go through it together.

use std::ops::Range;

use super::run::Runner;
use crate::kernels::cpu::activation;
use crate::kernels::cpu::pool::Worker;
use crate::kernels::cpu::shared::SharedSlice;
use crate::plan::{
    ActivationKind, CLAMPED_SWIGLU_ALPHA, ExpertMatrix, ExpertWeighting, ExpertsSpec, GatedActivation, MatrixId, Model,
    Op,
};
use crate::quant::Prepared;

/// Memory of the mixtures of a model, for calls of up to `rows` rows.
#[derive(Default)]
pub(super) struct ExpertMemory {
    /// The choices of all rows, expert by expert.
    chosen: Vec<Choice>,
    /// Scores in the order of a row.
    order: Vec<(f32, usize)>,
    /// The rows of one expert, `[rows, hidden]`.
    gathered: Vec<f32>,
    /// Products of gates and ups, what the activation makes of them, and products of downs: see [`Regions`].
    products: Vec<f32>,
    /// One for each expert of a row.
    inputs: Vec<Prepared>,
}

/// One row's choice of one expert.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Choice {
    expert: usize,
    row: usize,
    weight: f32,
}

impl ExpertMemory {
    /// Grows to calls of `rows` rows.
    pub fn grow(&mut self, model: &Model, rows: usize) {
        for op in model.plans().flat_map(|plan| &plan.ops) {
            let Op::Experts(spec) = op else { continue };
            let Some(first) = spec.experts.first() else { continue };
            let (hidden, inner) = (model.matrices[first.down.weight.0].n, model.matrices[first.gate.weight.0].n);
            let slots = rows.max(spec.top_k);
            let products = slots * (3 * inner + hidden);
            if self.products.len() < products {
                self.products.resize(products, 0.0);
            }
            self.chosen.reserve((rows * spec.top_k).saturating_sub(self.chosen.len()));
            self.order.reserve(spec.experts.len());
            self.gathered.reserve((rows * hidden).saturating_sub(self.gathered.len()));
            if self.inputs.len() < spec.top_k {
                self.inputs.resize_with(spec.top_k, Prepared::default);
            }
        }
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        let prepared = |input: &Prepared| 4 * (input.f32s.capacity() + input.scales.capacity()) + input.i8s.capacity();
        4 * (self.products.len() + self.gathered.capacity())
            + self.inputs.iter().map(prepared).sum::<usize>()
            + size_of::<Choice>() * self.chosen.capacity()
    }

    pub fn share(&mut self) -> SharedExperts<'_> {
        SharedExperts {
            products: SharedSlice::new(&mut self.products),
            inputs: SharedSlice::new(&mut self.inputs),
            gathered: SharedSlice::new(std::slice::from_mut(&mut self.gathered)),
            route: SharedSlice::new(std::slice::from_mut(&mut self.chosen)),
            order: SharedSlice::new(std::slice::from_mut(&mut self.order)),
        }
    }
}

/// [`ExpertMemory`] that the workers of a call share. All but `products` is one worker's at a time.
pub(super) struct SharedExperts<'a> {
    products: SharedSlice<'a, f32>,
    inputs: SharedSlice<'a, Prepared>,
    gathered: SharedSlice<'a, Vec<f32>>,
    route: SharedSlice<'a, Vec<Choice>>,
    order: SharedSlice<'a, Vec<(f32, usize)>>,
}

/// Where the products of up to `slots` rows lie, region behind region.
#[derive(Clone, Copy)]
struct Regions {
    slots: usize,
    inner: usize,
    hidden: usize,
}

impl Regions {
    /// Rows `rows` of region 0 (gates), 1 (ups) or 2 (activations).
    fn inner(self, region: usize, rows: Range<usize>) -> Range<usize> {
        let start = region * self.slots * self.inner;
        start + rows.start * self.inner..start + rows.end * self.inner
    }

    /// Rows of the downs' products.
    fn down(self, rows: Range<usize>) -> Range<usize> {
        let start = 3 * self.slots * self.inner;
        start + rows.start * self.hidden..start + rows.end * self.hidden
    }
}

impl Runner<'_> {
    pub(super) fn experts(&self, spec: &ExpertsSpec, worker: &Worker) {
        let rows = self.buffers.rows(spec.x);
        let Some(first) = spec.experts.first() else { return };
        let inner = self.weights.matrices[first.gate.weight.0].shape().0;
        let regions = Regions { slots: rows.max(spec.top_k), inner, hidden: self.buffers.width(spec.out) };
        if worker.index() == 0 {
            self.route(spec, rows);
            if rows == 1 {
                self.prepare(spec.x, first.gate.weight);
            }
        }
        let own = self.inner_columns(worker, regions.hidden);
        for row in 0..rows {
            self.buffers.part_mut(spec.out, row, own.clone()).fill(0.0);
        }
        worker.barrier();
        // SAFETY: written by worker 0 before the barrier alone.
        let chosen = unsafe { &self.experts.route.range(0..1)[0] };
        match rows {
            1 => self.one_row(spec, chosen, regions, worker),
            _ => chosen
                .chunk_by(|a, b| a.expert == b.expert)
                .for_each(|choices| self.rows_of_one(spec, choices, regions, worker)),
        }
    }

    fn inner_columns(&self, worker: &Worker, width: usize) -> Range<usize> {
        worker.share(width, self.weights.granule)
    }

    /// The choices of all rows, by expert and then by row.
    fn route(&self, spec: &ExpertsSpec, rows: usize) {
        // SAFETY: worker 0 alone routes, between two barriers.
        let (chosen, order) = unsafe { (self.experts.route.range_mut(0..1), self.experts.order.range_mut(0..1)) };
        let (chosen, order) = (&mut chosen[0], &mut order[0]);
        chosen.clear();
        for row in 0..rows {
            choose(self.buffers.part(spec.scores, row, 0..self.buffers.width(spec.scores)), spec, order);
            chosen.extend(order.iter().map(|(weight, expert)| Choice { expert: *expert, row, weight: *weight }));
        }
        if rows > 1 {
            chosen.sort_unstable_by_key(|choice| (choice.expert, choice.row));
        }
    }

    /// One row through all of its experts; `prepared` holds it.
    fn one_row(&self, spec: &ExpertsSpec, chosen: &[Choice], regions: Regions, worker: &Worker) {
        for (slot, choice) in chosen.iter().enumerate() {
            self.gate_and_up(spec, choice.expert, self.prepared(), slot..slot + 1, regions, worker);
        }
        worker.barrier();
        for (slot, choice) in chosen.iter().enumerate().filter(|(slot, _)| slot % worker.count() == worker.index()) {
            self.prepare_products(spec.experts[choice.expert].down.weight, slot, slot..slot + 1, regions);
        }
        worker.barrier();
        for (slot, choice) in chosen.iter().enumerate() {
            self.down(spec, std::slice::from_ref(choice), slot, slot..slot + 1, regions, worker);
        }
    }

    /// The rows that chose one expert, through it.
    fn rows_of_one(&self, spec: &ExpertsSpec, choices: &[Choice], regions: Regions, worker: &Worker) {
        let expert = &spec.experts[choices[0].expert];
        let rows = 0..choices.len();
        if worker.index() == 0 {
            // SAFETY: worker 0 alone gathers.
            let gathered = unsafe { &mut self.experts.gathered.range_mut(0..1)[0] };
            gathered.clear();
            for choice in choices {
                gathered.extend_from_slice(self.buffers.part(spec.x, choice.row, 0..self.buffers.width(spec.x)));
            }
            self.prepare_rows(gathered, choices.len(), expert.gate.weight);
        }
        worker.barrier();
        self.gate_and_up(spec, choices[0].expert, self.prepared(), rows.clone(), regions, worker);
        worker.barrier();
        if worker.index() == 0 {
            self.prepare_products(expert.down.weight, 0, rows.clone(), regions);
        }
        worker.barrier();
        self.down(spec, choices, 0, rows, regions, worker);
    }

    /// `act(gate · x) · (up · x)` of `rows` slots, in this worker's columns.
    fn gate_and_up(
        &self,
        spec: &ExpertsSpec,
        expert: usize,
        x: &Prepared,
        rows: Range<usize>,
        regions: Regions,
        worker: &Worker,
    ) {
        let columns = self.inner_columns(worker, regions.inner);
        let expert = &spec.experts[expert];
        for (region, matrix) in [expert.gate, expert.up].into_iter().enumerate() {
            let y = self.experts.products.part(regions.inner(region, rows.clone()));
            self.multiply(matrix, x, columns.clone(), &y, worker);
        }
        for row in rows {
            let at = |region: usize| {
                let start = regions.inner(region, row..row + 1).start;
                start + columns.start..start + columns.end
            };
            let products = &self.experts.products;
            // SAFETY: these columns are this worker's alone until the next barrier.
            let (gate, up, out) =
                unsafe { (products.range_mut(at(0)), products.range_mut(at(1)), products.range_mut(at(2))) };
            self.gated(spec.activation, gate, up, out);
        }
    }

    fn gated(&self, kind: GatedActivation, gate: &mut [f32], up: &mut [f32], out: &mut [f32]) {
        let isa = self.weights.isa;
        match kind {
            GatedActivation::Plain(ActivationKind::Silu) => activation::silu(isa, gate, Some(up), out),
            GatedActivation::Plain(ActivationKind::GeluTanh) => activation::gelu_tanh(isa, gate, Some(up), out),
            GatedActivation::Plain(ActivationKind::Relu) => activation::relu(isa, gate, Some(up), out),
            GatedActivation::ClampedSwiglu { limit } => {
                // g · σ(α g) = silu(α g) / α
                gate.iter_mut().for_each(|gate| *gate = gate.min(limit) * CLAMPED_SWIGLU_ALPHA);
                up.iter_mut().for_each(|up| *up = (up.clamp(-limit, limit) + 1.0) / CLAMPED_SWIGLU_ALPHA);
                activation::silu(isa, gate, Some(up), out);
            }
        }
    }

    /// Brings what the activation has made of `rows` into the form that `matrix` reads.
    fn prepare_products(&self, matrix: MatrixId, input: usize, rows: Range<usize>, regions: Regions) {
        // SAFETY: written before the last barrier; nothing writes activations before the next one.
        let x = unsafe { self.experts.products.range(regions.inner(2, rows.clone())) };
        // SAFETY: this input is this worker's alone until the next barrier.
        let prepared = unsafe { &mut self.experts.inputs.range_mut(input..input + 1)[0] };
        self.prepare_into(x, rows.len(), matrix, prepared);
    }

    /// Adds `weight · (down · h)` to the rows of the choices, in this worker's columns.
    fn down(
        &self,
        spec: &ExpertsSpec,
        choices: &[Choice],
        input: usize,
        rows: Range<usize>,
        regions: Regions,
        worker: &Worker,
    ) {
        let columns = self.inner_columns(worker, regions.hidden);
        let y = self.experts.products.part(regions.down(rows));
        // SAFETY: prepared before the last barrier.
        let x = unsafe { &self.experts.inputs.range(input..input + 1)[0] };
        self.multiply(spec.experts[choices[0].expert].down, x, columns.clone(), &y, worker);
        for (row, choice) in choices.iter().enumerate() {
            let start = row * regions.hidden;
            // SAFETY: these columns are this worker's alone.
            let product = unsafe { y.range(start + columns.start..start + columns.end) };
            let out = self.buffers.part_mut(spec.out, choice.row, columns.clone());
            out.iter_mut().zip(product).for_each(|(out, product)| *out += choice.weight * product);
        }
    }

    fn multiply(
        &self,
        ExpertMatrix { weight, bias }: ExpertMatrix,
        x: &Prepared,
        columns: Range<usize>,
        y: &SharedSlice<'_, f32>,
        worker: &Worker,
    ) {
        let bias = bias.map(|bias| self.weights.vectors[bias.0].as_slice());
        self.product(weight, x, columns, bias, y, worker);
    }
}

/// Leaves the weight and the index of each of the `top_k` largest scores in `order`, the lowest index first where several tie.
fn choose(scores: &[f32], spec: &ExpertsSpec, order: &mut Vec<(f32, usize)>) {
    order.clear();
    order.extend(scores.iter().enumerate().map(|(expert, score)| (*score, expert)));
    // Without allocation: no two entries are equal.
    order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let largest = order.first().map_or(0.0, |(score, _)| *score);
    order.iter_mut().for_each(|(score, _)| *score = (*score - largest).exp());
    let summed = match spec.weighting {
        ExpertWeighting::Chosen => spec.top_k.min(order.len()),
        ExpertWeighting::All => order.len(),
    };
    let sum: f32 = order[..summed].iter().map(|(weight, _)| weight).sum();
    order.truncate(spec.top_k);
    order.iter_mut().for_each(|(weight, _)| *weight /= sum);
}
