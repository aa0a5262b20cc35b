//! Whole decode steps of tiny models, each one launch as the engine has it, against the reference runs in tests/golden, and each of
//! their products against its format's reference.

use quantbench::kernels::cuda::matvec::{InputDesc, NORM_CAST, NORM_LAYER, NORM_RMS};
use quantbench::lower::cuda::{Addresses, scales};
use quantbench::plan::fuse::{FusedInput, FusedOp, FusedPart, Join, MatvecSpec, NormAddSpec};
use quantbench::plan::{ActivationKind, BufferId, NormKind, Softcap, VectorId};
use quantbench::quant::FormatOptions;

use super::coverage::combinations;
use super::host::{CHIPS, Host};
use super::matvec::Bounded;
use super::memory::Memory;
use super::norms::shown;
use super::place::values;
use super::products::{Expected, expected};
use super::reference::{self, is_misread};
use super::session::{Session, architectures, golden};

/// Tokens that are generated behind a prompt.
const N_GEN: usize = 5;
/// Steps of a golden run.
const GOLDEN_STEPS: usize = 16;
/// Of a family's at nf4, and of a mixture's with quantized experts.
const FAMILY_NF4_STEPS: [usize; 2] = [3, 2];

/// A precision and the golden logits that it is compared with.
pub type Case = (&'static str, &'static str, &'static str);
pub const RUNS: [Case; 2] = [("fp16", "golden", ""), ("nf4", "quant_golden", "nf4_f32.")];
/// fp16 compute moves logits by up to 0.04 on these models (tests/golden/README.md).
pub const TOLERANCE: f32 = 0.1;

pub fn decode_steps_follow_the_reference() {
    let models = ["llama-tiny", "llama-odd", "phi-tiny", "phi-odd"];
    for (turn, (model, case)) in combinations(&models, &RUNS, 0).into_iter().enumerate() {
        decode(model, case, CHIPS[turn % CHIPS.len()], [16, 5][turn % 2]);
    }
}

/// Cross-attention, a relative bias and matrices in fp32.
pub fn decode_steps_of_every_kind_follow_the_reference() {
    decode("t5-tiny", RUNS[0], CHIPS[0], 16);
    decode("t5-odd", RUNS[0], CHIPS[1], 5);
    decode("t5-tied-relu", RUNS[0], CHIPS[2], 5);
}

/// The families of tests/golden/architectures, each at both precisions or in turn.
pub fn decode_steps_of_families_follow_the_reference() {
    for (turn, (model, case)) in combinations(&families(), &RUNS, 1).into_iter().enumerate() {
        decode(model, of_family(model, case), CHIPS[turn % CHIPS.len()], [16, 5][turn % 2]);
    }
}

/// The run of a mixture whose experts are quantized.
pub fn of_family(model: &str, case: Case) -> Case {
    let has_both = model.starts_with("mixtral") || model.starts_with("qwen3_moe");
    if has_both && case == RUNS[1] { (case.0, case.1, "nf4_experts_f32.") } else { case }
}

/// Those of the repository, or all of the folder that a variable names.
pub fn families() -> Vec<&'static str> {
    let folders = std::fs::read_dir(architectures().join("golden")).expect("golden families");
    let mut names: Vec<String> =
        folders.map(|folder| folder.expect("a folder").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(!names.is_empty());
    names.into_iter().map(|name| &*name.leak()).collect()
}

/// The prompt goes through steps too, token by token.
fn decode(model: &str, case: Case, chip: u32, multiprocessors: usize) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let mut session = Session::load(model, case.0, &host, multiprocessors);
    let what = format!("{model} {}, chip {chip}, {multiprocessors} multiprocessors", case.0);
    let mut ids: Vec<u32> = golden(model, "golden", "p1.input_ids").iter().map(|id| *id as u32).collect();
    if let Some(start) = session.model.decoder_start {
        session.encode(&ids, &[]);
        ids = vec![start];
    }
    for token in &ids {
        session.place(*token);
        session.step();
    }
    follow(&mut session, case, (model, "p1"), ids.len(), N_GEN, &what);
}

/// Steps behind a prompt of `n_prompt` tokens, as long as they find the reference's tokens. Every step hands token, position and
/// embedding to the next one on the device.
pub fn follow(
    session: &mut Session,
    (precision, file, prefix): Case,
    (model, prompt): (&str, &str),
    n_prompt: usize,
    n_gen: usize,
    what: &str,
) {
    let expected = match is_misread(precision, &session.model) {
        true => reference::logits(model, &session.model, &session.formats, prompt, n_gen),
        false => golden(model, file, &format!("{prefix}{prompt}.step_logits")),
    };
    let expected: Vec<&[f32]> = expected.chunks_exact(session.model.vocab).collect();
    assert!([GOLDEN_STEPS, n_gen].contains(&expected.len()) || FAMILY_NF4_STEPS.contains(&expected.len()));
    for (step, expected) in expected.iter().take(n_gen).enumerate() {
        if step > 0 {
            session.step();
        }
        for (at, (logit, expected)) in session.logits().iter().zip(*expected).enumerate() {
            let off = (logit - expected).abs();
            assert!(off <= TOLERANCE, "{what}: logit {at} of step {step} is {logit}, not {expected}");
        }
        let (token, position) = session.state();
        assert_eq!(position, n_prompt + step, "{what}: step {step}");
        // A close call may part the runs.
        if !leads(expected, token as usize) {
            break;
        }
    }
}

/// Whether `token` is the reference's.
fn leads(logits: &[f32], token: usize) -> bool {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!(logits[token] >= largest - 2.0 * TOLERANCE, "{} is no close call to {largest}", logits[token]);
    logits[token] == largest
}

/// LLM.int8, whose logits jump where an activation crosses a rounding boundary: every product of a step is compared with the
/// reference on the very activations that the kernels made, within the bound that follows from their roundings.
pub fn products_of_a_step_follow_their_reference() {
    for (turn, (model, precision)) in
        [("llama-tiny", "int8"), ("phi-odd", "int8"), ("phi-tiny", "nf4")].into_iter().enumerate()
    {
        products_of(model, precision, CHIPS[turn % CHIPS.len()], [5, 16][turn % 2]);
    }
}

/// Products in front of a norm, of a residual that is cast, and of capped logits; what norms add to a residual.
pub fn products_of_families_follow_their_reference() {
    for (turn, (model, precision)) in
        [("gemma2-odd", "int8"), ("olmo2-odd", "nf4"), ("gemma3-odd", "nf4")].into_iter().enumerate()
    {
        products_of(model, precision, CHIPS[turn % CHIPS.len()], [16, 5][turn % 2]);
    }
}

fn products_of(model: &str, precision: &str, chip: u32, multiprocessors: usize) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let mut session = Session::load(model, precision, &host, multiprocessors);
    let ids = golden(model, "golden", "p1.input_ids");
    for id in &ids[..2] {
        session.place(*id as u32);
        session.step();
    }
    let last = ids[2] as u32;
    // A launch takes its kernel from its matrices: the operations before the first product have none, and need no launch.
    let first = session.fused.iter().position(|op| matches!(op, FusedOp::Matvec(_))).expect("a product");
    for n in first..session.fused.len() {
        session.place(last);
        if n > first {
            session.run(n);
        }
        if let FusedOp::Matvec(spec) = session.fused[n].clone() {
            let before = Products::of(&session, &spec);
            session.place(last);
            session.run(n + 1);
            before.check(&session, &spec, &format!("{model} {precision}, operation {n}"));
        }
        if let FusedOp::NormAdd(spec) = session.fused[n].clone() {
            let (before, y) = (residual(&session, spec.x), residual(&session, spec.y));
            session.place(last);
            session.run(n + 1);
            check_norm_add(&session, &spec, (&before, &y), &format!("{model} {precision}, operation {n}"));
        }
    }
}

/// The reference's products over the activations of the moment.
struct Products {
    parts: Vec<(Expected, Vec<f32>)>,
    /// The residual before they are added.
    residual: Vec<f32>,
}

impl Products {
    fn of(session: &Session, spec: &MatvecSpec) -> Self {
        let MatvecSpec { inputs, parts, join } = spec;
        let part = |(at, part): (usize, &FusedPart)| {
            let FusedPart { weight, rows: None, bias, out: _, activation: _ } = *part else { panic!("cut rows") };
            let matrix = &session.model.matrices[weight.0];
            let of = inputs[at.min(inputs.len() - 1)];
            let scale = scales(&session.model)[of.x.0];
            let x: Vec<f32> =
                shown(session.host, input(session, of), matrix.k).iter().map(|x| x.to_f32() / scale).collect();
            let name = session.formats.of(matrix).id().name;
            let threshold = FormatOptions::default().int8_threshold;
            let expected = expected(name, &*session.stored[weight.0], &x, threshold);
            (
                expected,
                bias.map_or(vec![0.0; matrix.n], |bias| session.host.memory.read(session.vector(bias), matrix.n)),
            )
        };
        let residual = match *join {
            Join::Residual { x } => residual(session, x),
            _ => vec![],
        };
        Self { parts: parts.iter().enumerate().map(part).collect(), residual }
    }

    fn check(&self, session: &Session, spec: &MatvecSpec, what: &str) {
        let value = |part: usize, at: usize| Bounded::of(&self.parts[part].0, at, self.parts[part].1[at]);
        let halves = |id: BufferId, n: usize| -> Vec<f32> {
            let words: Vec<u32> = session.host.memory.read(session.buffers.at(id).expect("a buffer"), n);
            words.iter().map(|word| half::f16::from_bits(*word as u16).to_f32()).collect()
        };
        match spec.join {
            Join::Apart => {
                for (index, part) in spec.parts.iter().enumerate() {
                    for (at, y) in halves(part.out, self.parts[index].1.len()).into_iter().enumerate() {
                        let product = value(index, at).rounded();
                        let value = part.activation.map_or(product, |kind| product.activated(number(kind)).rounded());
                        value.check(y, &format!("{what}, part {index} [{at}]"));
                    }
                }
            }
            Join::Floats => {
                for (index, part) in spec.parts.iter().enumerate() {
                    for (at, y) in residual(session, part.out).into_iter().enumerate() {
                        value(index, at).check(y, &format!("{what}, part {index} [{at}]"));
                    }
                }
            }
            Join::Gated { kind, out } => {
                for (at, y) in halves(out, self.parts[0].1.len()).into_iter().enumerate() {
                    let [gate, up] = [0, 1].map(|part| value(part, at).rounded());
                    let Bounded { value, error } = gate.activated(number(kind)).rounded().times(up).rounded();
                    // Below fp16's normal numbers a scale leaves fewer places, twice.
                    let scale = scales(&session.model)[out.0];
                    let lost = 1.01 * 2f64.powi(-25) / f64::from(scale) * (1.0 + gate.value.abs() + gate.error);
                    let error = error + if scale == 1.0 { 0.0 } else { lost };
                    Bounded { value, error }.check(y / scale, &format!("{what} [{at}]"));
                }
            }
            Join::Residual { x } => {
                for (at, y) in residual(session, x).into_iter().enumerate() {
                    let before = Bounded { value: f64::from(self.residual[at]), error: 0.0 };
                    let sum = (0..self.parts.len()).fold(before, |sum, part| sum.plus(value(part, at)));
                    sum.check(y, &format!("{what} [{at}]"));
                }
            }
            Join::Argmax { softcap: None } => {
                for (at, y) in session.logits().into_iter().enumerate() {
                    value(0, at).check(y, &format!("{what}, logit {at}"));
                }
            }
            Join::Argmax { softcap: Some(Softcap(cap)) } => {
                let cap = f64::from(cap);
                for (at, y) in session.logits().into_iter().enumerate() {
                    let Bounded { value, error } = value(0, at);
                    // The slope of a tanh is 1 at most; it adds some units in the last place of the cap.
                    let capped = Bounded { value: cap * (value / cap).tanh(), error: error + 2f64.powi(-20) * cap };
                    capped.check(y, &format!("{what}, capped logit {at}"));
                }
            }
        }
    }
}

/// A sum of squares in any order is off by (n + 8) · 2⁻²⁴ of it, which moves the factor by half as much; some roundings more, and that of
/// the sum.
fn check_norm_add(session: &Session, spec: &NormAddSpec, (before, y): (&[f32], &[f32]), what: &str) {
    let weight: Vec<f32> = session.host.memory.read(session.vector(spec.norm.weight), y.len());
    let n = y.len() as f64;
    let squares: f64 = y.iter().map(|y| f64::from(*y).powi(2)).sum();
    let factor = 1.0 / (squares / n + f64::from(spec.norm.epsilon)).sqrt();
    for (at, made) in residual(session, spec.x).into_iter().enumerate() {
        let added = f64::from(y[at]) * factor * f64::from(weight[at]);
        let sum = f64::from(before[at]) + added;
        let error = added.abs() * ((n + 8.0) * 2f64.powi(-24) + 2f64.powi(-21)) + sum.abs() * 2f64.powi(-24);
        Bounded { value: sum, error }.check(made, &format!("{what} [{at}]"));
    }
}

fn residual(session: &Session, x: BufferId) -> Vec<f32> {
    let width = session.model.decoder.buffers[x.0].width;
    values(&session.host.memory.read(session.buffers.at(x).expect("a residual"), width))
}

/// The input as the lowering describes it to a kernel.
fn input(session: &Session, FusedInput { x, norm, scale }: FusedInput) -> InputDesc {
    let vector = |id: VectorId| session.vector(id);
    let is_residual = session.model.decoder.embedding().is_some_and(|spec| spec.out == x);
    let x = session.buffers.at(x).expect("a buffer");
    let plain = InputDesc { x, scale, is_tagged: 1, ..InputDesc::default() };
    let Some(norm) = norm else {
        return if is_residual { InputDesc { norm: NORM_CAST, ..plain } } else { plain };
    };
    let (kind, norm_bias) = match norm.kind {
        NormKind::Rms => (NORM_RMS, session.session().zeros),
        NormKind::Layer { bias } => (NORM_LAYER, vector(bias)),
    };
    InputDesc { norm_weight: vector(norm.weight), norm_bias, epsilon: norm.epsilon, norm: kind, ..plain }
}

/// `enum Activation` of instruction.cuh.
fn number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Silu => 1,
        ActivationKind::GeluTanh => 2,
        ActivationKind::Relu => 3,
    }
}
