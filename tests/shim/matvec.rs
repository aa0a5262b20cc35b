//! One row through matrices of every format, and what stands before and behind it in the same launch.

use half::f16;
use quantbench::kernels::cuda::matvec::{Epilogue, InputDesc, Mode, OutputType, Product};
use quantbench::kernels::cuda::program::{COUNTERS, PlannedLaunch, ProgramBuilder, tagged_float};
use quantbench::quant::{FormatId, FormatOptions, Stored, int8};

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::norms::{self, Norm};
use super::place::{formats, place, quantize, values, widened};
use super::products::{Expected, KINDS, Kind, Numbers, SHAPES, activations, check, expected, rounding, weight};

/// Fewer than a matrix has rows, as many as some, and more.
const MULTIPROCESSORS: [usize; 3] = [1, 7, 132];

fn threshold() -> f32 {
    FormatOptions::default().int8_threshold
}

/// Plans a launch of one matvec as for a device and runs it on `host`.
pub fn launch(
    host: &Host,
    multiprocessors: usize,
    mode: Mode,
    inputs: &[InputDesc],
    products: &[Product],
    epilogue: Epilogue,
) {
    run(host, plan(host, multiprocessors, mode, inputs, products, epilogue));
}

pub fn plan(
    host: &Host,
    multiprocessors: usize,
    mode: Mode,
    inputs: &[InputDesc],
    products: &[Product],
    epilogue: Epilogue,
) -> PlannedLaunch {
    ProgramBuilder::single(host.properties(multiprocessors), mode, inputs.to_vec(), products, epilogue).expect("a plan")
}

pub fn run(host: &Host, planned: PlannedLaunch) {
    // SAFETY: every address in it is of the host's memory.
    unsafe { planned.launch_on(host) }.unwrap_or_else(|error| panic!("chip {}: {error}", host.chip));
}

/// One row of fp16 times one matrix.
struct Single<'a> {
    name: &'static str,
    stored: &'a dyn Stored,
    row: &'a [f16],
    threshold: f32,
}

impl Single<'_> {
    /// Adds it to `program`; where the result will be, and the outlier columns that were found.
    fn add(&self, program: &mut ProgramBuilder, memory: &Memory) -> [u64; 2] {
        let matrix = place(memory, self.name, self.stored, self.threshold);
        // Every other row begins where no 16-byte load may.
        let before = usize::from(self.row.len().is_multiple_of(2));
        let x = memory.hold(&[&vec![f16::NAN; before], self.row].concat()) + 2 * before as u64;
        let out = if self.is_float() { memory.room::<f32>(matrix.n) } else { memory.room::<f16>(matrix.n) };
        let input = InputDesc { x, scale: 1.0, ..InputDesc::default() };
        let outlier_columns = memory.hold(&[0u64]);
        let output_type = if self.is_float() { OutputType::Floats } else { OutputType::Halves };
        let epilogue = Epilogue { output_type, outlier_columns, ..Epilogue::default() };
        let part = Product { matrix, first_row: 0, bias: 0, out, activation: 0 };
        program.multiply(Mode::Apart, vec![input], &[part], epilogue).expect("an instruction");
        [out, outlier_columns]
    }

    fn result(&self, memory: &Memory, [out, outlier_columns]: [u64; 2]) -> Vec<f32> {
        let Self { name, threshold, .. } = *self;
        let is_outlier = |value: &&f16| name == "int8" && threshold > 0.0 && value.to_f32().abs() >= threshold;
        let outliers = self.row.iter().filter(is_outlier).count();
        assert_eq!(memory.read::<u64>(outlier_columns, 1), [outliers as u64], "{name}: columns counted");
        let (n, _) = self.stored.shape();
        if self.is_float() { memory.read(out, n) } else { widened(&memory.read(out, n)) }
    }

    fn is_float(&self) -> bool {
        self.name == "fp32"
    }

    /// Without anything else.
    fn run(&self, chip: u32, multiprocessors: usize) -> Vec<f32> {
        let memory = Memory::default();
        let host = Host { chip, memory: &memory };
        let mut program = ProgramBuilder::new(host.properties(multiprocessors));
        let made = self.add(&mut program, &memory);
        run(&host, program.plan(0).expect("a plan"));
        self.result(&memory, made)
    }
}

fn product(chip: u32, multiprocessors: usize, name: &'static str, stored: &dyn Stored, row: &[f16]) -> Vec<f32> {
    Single { name, stored, row, threshold: threshold() }.run(chip, multiprocessors)
}

pub fn products_of_one_row() {
    let mut numbers = Numbers(0x5eed);
    let cases = SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind)));
    for (turn, ((n, k), kind)) in cases.enumerate() {
        for (offset, entry) in formats().enumerate() {
            let stored = quantize(entry, weight(n, k, kind, &mut numbers));
            let x = activations(1, k, kind, &mut numbers);
            let chip = CHIPS[(turn + offset) % CHIPS.len()];
            let multiprocessors = MULTIPROCESSORS[(turn + offset / 2) % MULTIPROCESSORS.len()];
            let y = product(chip, multiprocessors, entry.name, &*stored, &x);
            let what = format!("{kind:?}, chip {chip}, {multiprocessors} multiprocessors");
            check(entry.name, &what, &*stored, &widened(&x), &y);
        }
    }
}

/// And those for blocks of NF4 that cross rows read all others.
pub fn every_kernel_reads_halves_and_floats() {
    let mut numbers = Numbers(0x4e1);
    let (n, k) = (41, 448);
    for entry in formats() {
        let names = [entry.name, "fp16", "fp32"];
        let formats = names.map(|name| formats().find(|format| format.name == name).expect("a format of the table"));
        let stored = formats.map(|format| quantize(format, weight(n, k, Kind::Gaussian, &mut numbers)));
        let rows = names.map(|_| activations(1, k, Kind::Outliers, &mut numbers));
        let family = place(&Memory::default(), entry.name, &*stored[0], threshold()).family;
        for (kernel, chip) in family.kernels.iter().flat_map(|kernel| CHIPS.map(|chip| (*kernel, chip))) {
            let memory = Memory::default();
            let host = Host { chip, memory: &memory };
            let mut program = ProgramBuilder::new(host.properties(3));
            let single =
                |at: usize| Single { name: names[at], stored: &*stored[at], row: &rows[at], threshold: threshold() };
            let made = [0, 1, 2].map(|at| single(at).add(&mut program, &memory));
            let mut planned = program.plan_on(kernel, memory.hold(program.list())).expect("a plan");
            planned.program.counters = memory.hold(&[0u32; COUNTERS]);
            run(&host, planned);
            for (at, made) in made.into_iter().enumerate() {
                let y = single(at).result(&memory, made);
                let what = format!("{}, chip {chip}", kernel.name);
                check(names[at], &what, &*stored[at], &widened(&rows[at]), &y);
            }
            assert_eq!(memory.read::<u32>(planned.program.counters, COUNTERS), [0, 1], "{}", kernel.name);
        }
    }
}

/// Another split adds in another order, and stays within the same bound.
pub fn work_split_over_multiprocessors() {
    let mut numbers = Numbers(0x5911);
    for entry in formats() {
        // Behind 16384 elements a product reads its input in turns.
        for (n, k) in [(41, 1000), (200, 256), (3, 16501)] {
            let stored = quantize(entry, weight(n, k, Kind::Gaussian, &mut numbers));
            let x = activations(1, k, Kind::Outliers, &mut numbers);
            for (chip, multiprocessors) in
                CHIPS.into_iter().flat_map(|chip| [1, 2, 5, 24, 132].map(|count| (chip, count)))
            {
                let y = product(chip, multiprocessors, entry.name, &*stored, &x);
                let what = format!("chip {chip}, {multiprocessors} multiprocessors");
                check(entry.name, &what, &*stored, &widened(&x), &y);
            }
        }
    }
}

pub fn outliers_and_nan() {
    let mut numbers = Numbers(7);
    let (n, k) = (33, 300);
    for chip in CHIPS {
        let stored =
            (int8::ID.new)(FormatOptions { int8_threshold: 0.0 }).quantize(weight(n, k, Kind::Gaussian, &mut numbers));
        let stored = stored.expect("quantize");
        let x = activations(1, k, Kind::Outliers, &mut numbers);
        let y = Single { name: "int8", stored: &*stored, row: &x, threshold: 0.0 }.run(chip, 7);
        let Expected { values, errors } = expected("int8", &*stored, &widened(&x), 0.0);
        for ((y, expected), error) in y.iter().zip(&values).zip(&errors) {
            assert!((y - expected).abs() <= *error, "no threshold: {y} for {expected}");
        }
        for entry in formats() {
            let stored = quantize(entry, weight(n, k, Kind::Gaussian, &mut numbers));
            let mut x = activations(1, k, Kind::Gaussian, &mut numbers);
            x[5] = f16::NAN;
            let y = product(chip, 7, entry.name, &*stored, &x);
            assert!(y.iter().all(|value| value.is_nan()), "{}: NaN vanished", entry.name);
            // Nothing but outliers, in a format that has them: the codes of the others are all zero.
            let x = vec![f16::from_f32(8.0); k];
            let y = product(chip, 7, entry.name, &*stored, &x);
            check(entry.name, "outliers alone", &*stored, &widened(&x), &y);
        }
    }
}

/// A value in fp64 and how far a device's may be from it.
#[derive(Clone, Copy)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

impl Bounded {
    /// Of output `at`, with its bias; one fp32 sum more.
    pub fn of(product: &Expected, at: usize, bias: f32) -> Self {
        let value = f64::from(product.values[at]) + f64::from(bias);
        Self { value, error: f64::from(product.errors[at]) + 2f64.powi(-24) * value.abs() }
    }

    pub fn rounded(self) -> Self {
        Self { error: self.error + 1.01 * f64::from(rounding((self.value.abs() + self.error) as f32)), ..self }
    }

    /// No activation is steeper than 1.13, and none passes its argument. A logistic function of fp32 is within 2⁻¹⁸ for
    /// arguments of at most 32: its power has |x| · log₂e · 2⁻²⁴ from the product that it is taken of, and a few units more.
    pub fn activated(self, kind: i32) -> Self {
        let x = self.value;
        let value = match kind {
            1 => x / (1.0 + (-x).exp()),
            2 => 0.5 * x * (1.0 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh()),
            _ => x.max(0.0),
        };
        Self { value, error: 1.13 * self.error + 2f64.powi(-18) * x.abs() }
    }

    pub fn times(self, other: Self) -> Self {
        let error = self.error * other.value.abs() + other.error * self.value.abs() + self.error * other.error;
        Self { value: self.value * other.value, error }
    }

    pub fn plus(self, other: Self) -> Self {
        let value = self.value + other.value;
        Self { value, error: self.error + other.error + 2f64.powi(-23) * (self.value.abs() + other.value.abs()) }
    }

    #[track_caller]
    pub fn check(self, y: f32, what: &str) {
        let off = (f64::from(y) - self.value).abs();
        assert!(off <= self.error, "{what}: {y} for {}, off by {off:e}, allowed {:e}", self.value, self.error);
    }
}

/// A matrix of a launch with all that is known of it.
struct Part {
    product: Product,
    bias: Vec<f32>,
    expected: Expected,
}

/// A launch's memory and its parts' format.
struct Scene<'a> {
    memory: &'a Memory,
    entry: FormatId,
    numbers: &'a mut Numbers,
}

impl Scene<'_> {
    /// An `[n, k]` over `x`.
    fn part(&mut self, n: usize, x: &[f16], activation: i32, has_bias: bool) -> Part {
        let name = self.entry.name;
        let stored = quantize(self.entry, weight(n, x.len(), Kind::Gaussian, self.numbers));
        let matrix = place(self.memory, name, &*stored, threshold());
        let bias: Vec<f32> = (0..n).map(|_| if has_bias { self.numbers.normal() } else { 0.0 }).collect();
        let at = if has_bias { self.memory.hold(&bias) } else { 0 };
        let out = self.memory.room::<f16>(n);
        Part {
            product: Product { matrix, first_row: 0, bias: at, out, activation },
            bias,
            expected: expected(name, &*stored, &widened(x), threshold()),
        }
    }
}

impl Part {
    fn value(&self, at: usize) -> Bounded {
        Bounded::of(&self.expected, at, self.bias[at])
    }

    fn n(&self) -> usize {
        self.bias.len()
    }
}

pub fn products_between_norm_and_residual() {
    let mut numbers = Numbers(0xf00d);
    for (turn, entry) in formats().cycle().take(15).enumerate() {
        let (chip, multiprocessors) = (CHIPS[turn / 5], MULTIPROCESSORS[turn % 3]);
        let norm = Norm::ALL[turn % Norm::ALL.len()];
        // Rows of whole blocks of NF4, and blocks that cross them.
        let [k, gated_k] = [[200, 320], [192, 264]][turn % 2];
        apart(entry, chip, multiprocessors, (norm, k), &mut numbers);
        gated(entry, chip, multiprocessors, (norm, gated_k), 1 + turn as i32 % 3, &mut numbers);
        joined(entry, chip, multiprocessors, &mut numbers);
    }
}

/// Query, key and value, or a layer's four inner products: matrices of their own over one input.
fn apart(entry: FormatId, chip: u32, multiprocessors: usize, (norm, k): (Norm, usize), numbers: &mut Numbers) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let (input, x) = norms::input(&host, norm, k, 1.0, numbers);
    let mut scene = Scene { memory: &memory, entry, numbers };
    let parts = [(72, 0, true), (9, 0, false), (33, 2, true), (8, 3, false)];
    let parts = parts.map(|(n, activation, has_bias)| scene.part(n, &x, activation, has_bias));
    let products = parts.each_ref().map(|part| part.product);
    launch(&host, multiprocessors, Mode::Apart, &[input], &products, Epilogue::default());
    for (index, part) in parts.iter().enumerate() {
        let y = widened(&memory.read(part.product.out, part.n()));
        for (at, y) in y.iter().enumerate() {
            let value = part.value(at).rounded();
            let value =
                if part.product.activation == 0 { value } else { value.activated(part.product.activation).rounded() };
            value.check(*y, &format!("{} {norm:?} part {index} [{at}]", entry.name));
        }
    }
}

fn gated(
    entry: FormatId,
    chip: u32,
    multiprocessors: usize,
    (norm, k): (Norm, usize),
    kind: i32,
    numbers: &mut Numbers,
) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let (input, x) = norms::input(&host, norm, k, 0.7, numbers);
    let mut scene = Scene { memory: &memory, entry, numbers };
    let parts = [true, false].map(|has_bias| scene.part(75, &x, kind, has_bias));
    let products = parts.each_ref().map(|part| part.product);
    launch(&host, multiprocessors, Mode::Gated, &[input], &products, Epilogue::default());
    for (at, y) in widened(&memory.read(products[0].out, 75)).iter().enumerate() {
        let [gate, up] = parts.each_ref().map(|part| part.value(at).rounded());
        let value = gate.activated(kind).rounded().times(up).rounded();
        value.check(*y, &format!("{} {norm:?} gate {kind} [{at}]", entry.name));
    }
}

/// One or two products that are added to the residual stream, each over an input of its own.
fn joined(entry: FormatId, chip: u32, multiprocessors: usize, numbers: &mut Numbers) {
    for widths in [&[200][..], &[128, 320], &[330, 70]] {
        let memory = Memory::default();
        let host = Host { chip, memory: &memory };
        let n = 57;
        let inputs: Vec<_> = widths.iter().map(|k| norms::input(&host, Norm::None, *k, 1.0, numbers)).collect();
        let mut scene = Scene { memory: &memory, entry, numbers };
        let parts: Vec<_> = inputs.iter().map(|(_, x)| scene.part(n, x, 0, true)).collect();
        let before: Vec<f32> = (0..n).map(|_| scene.numbers.normal()).collect();
        let residual = memory.hold(&before.iter().copied().map(tagged_float).collect::<Vec<_>>());
        let inputs: Vec<_> = inputs.into_iter().map(|(input, _)| input).collect();
        let products: Vec<_> = parts.iter().map(|part| part.product).collect();
        launch(&host, multiprocessors, Mode::Joined, &inputs, &products, Epilogue { residual, ..Epilogue::default() });
        for (at, y) in values(&memory.read(residual, n)).iter().enumerate() {
            let start = Bounded { value: f64::from(before[at]), error: 0.0 };
            let value = parts.iter().fold(start, |sum, part| sum.plus(part.value(at)));
            value.check(*y, &format!("{} joined {widths:?} [{at}]", entry.name));
        }
    }
}
