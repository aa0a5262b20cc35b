//! The head: logits, the token among them, and what the next step starts from.

use half::f16;
use quantbench::kernels::cuda::matvec::{Epilogue, InputDesc, Mode, Product};
use quantbench::kernels::cuda::program::{COUNTERS, TokenOutput};
use quantbench::quant::FormatOptions;

use super::host::{CHIPS, Host};
use super::matvec::{plan, run};
use super::memory::Memory;
use super::place::{formats, place, quantize, values, widened};
use super::products::{Expected, Kind, Numbers, activations, expected, weight};

const VOCABULARY: usize = 1003;
const HIDDEN: usize = 200;
/// Halves from row to row of the embeddings.
const TABLE_STRIDE: usize = 256;
const TABLE_SCALE: f32 = 1.5;
const SLOTS: usize = 4;

/// What makes a case's logits special.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Logits {
    Plain,
    /// The largest one three times.
    Ties,
    /// All below zero.
    Negative,
    /// Some are NaN: never the token.
    SomeNan,
    /// All are NaN: the first one.
    Nan,
}

pub fn heads_find_the_token() {
    let mut numbers = Numbers(0x4ead);
    for (turn, entry) in formats().enumerate() {
        for (offset, logits) in [Logits::Plain, Logits::Ties, Logits::Negative, Logits::Nan].into_iter().enumerate() {
            let turn = turn + offset;
            let (chip, multiprocessors) = (CHIPS[turn % CHIPS.len()], [1, 7, 132, 40][turn % 4]);
            // Blocks of NF4 that cross rows, and rows of whole blocks.
            let k = [200, 192][offset % 2];
            find_token(entry.name, k, chip, multiprocessors, logits, &mut numbers);
        }
    }
    find_token("fp16", 200, CHIPS[1], 9, Logits::SomeNan, &mut numbers);
}

fn find_token(name: &str, k: usize, chip: u32, multiprocessors: usize, logits: Logits, numbers: &mut Numbers) {
    let what = format!("{name} {logits:?} of {k}, chip {chip}, {multiprocessors} multiprocessors");
    let entry = formats().find(|entry| entry.name == name).expect("a format of the table");
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let mut x = activations(1, k, Kind::Gaussian, numbers);
    let mut matrix = weight(VOCABULARY, k, Kind::Gaussian, numbers);
    shape(&mut x, &mut matrix.data, logits);
    let threshold = FormatOptions::default().int8_threshold;
    let stored = quantize(entry, matrix);
    let desc = place(&memory, name, &*stored, threshold);

    let table = activations(VOCABULARY, TABLE_STRIDE, Kind::Gaussian, numbers);
    let (logits_at, ended) = (memory.room::<f32>(VOCABULARY), memory.hold(&[0u32; COUNTERS]));
    let head = TokenOutput {
        best: memory.room::<u64>(multiprocessors),
        // Token, position, step and what the head leaves alone.
        state: memory.hold(&[-1, 17, 5, 99]),
        host: memory.hold(&[0u64; SLOTS]),
        table: memory.hold(&table),
        embedding: memory.room::<u64>(HIDDEN),
        table_scale: TABLE_SCALE,
        table_stride: TABLE_STRIDE as i32,
        hidden: HIDDEN as i32,
        host_slots: SLOTS as i32,
        advance: 1,
    };
    let input = InputDesc { x: memory.hold(&x), scale: 1.0, ..InputDesc::default() };
    let product = Product { matrix: desc, first_row: 0, bias: 0, out: 0, activation: 0 };
    // The second step finds the counters as the first one left them.
    for step in [6, 7] {
        let epilogue = Epilogue { logits: logits_at, ..Epilogue::default() };
        let mut planned = plan(&host, multiprocessors, Mode::Apart, &[input], &[product], epilogue);
        (planned.program.token_output, planned.program.counters) = (head, ended);
        run(&host, planned);
        let y: Vec<f32> = memory.read(logits_at, VOCABULARY);
        let token = first_largest(&y);
        assert_eq!(memory.read::<i32>(head.state, 4), [token as i32, 17 + step - 5, step, 99], "{what}");
        let mut ring = [0; SLOTS];
        (6..=step as u64).for_each(|step| ring[step as usize % SLOTS] = step << 32 | token as u64);
        assert_eq!(memory.read::<u64>(head.host, SLOTS), ring, "{what}");
        let row = &table[token * TABLE_STRIDE..][..HIDDEN];
        let embedding: Vec<f32> = row.iter().map(|value| value.to_f32() * TABLE_SCALE).collect();
        assert_eq!(values(&memory.read(head.embedding, HIDDEN)), embedding, "{what}");
        assert_eq!(memory.read::<u32>(ended, COUNTERS), [0, 0], "{what}");
        check_logits(&what, name, logits, &expected(name, &*stored, &widened(&x), threshold), &y);
    }
}

/// Makes the logits what the case wants.
fn shape(x: &mut [f16], rows: &mut [f16], logits: Logits) {
    let k = x.len();
    match logits {
        Logits::Plain => {}
        Logits::Ties | Logits::Negative => {
            // Rows point where x does, or away from it.
            let sign = if logits == Logits::Ties { 1.0 } else { -1.0 };
            x.iter_mut().for_each(|value| *value = f16::from_f32(value.to_f32().abs() + 0.01));
            rows.iter_mut().for_each(|value| *value = f16::from_f32(sign * (value.to_f32().abs() + 0.01)));
            if logits == Logits::Ties {
                for row in [13, 500, 1000] {
                    rows[row * k..][..k].fill(f16::from_f32(0.5));
                }
            }
        }
        Logits::SomeNan => [0, 77, VOCABULARY - 1].into_iter().for_each(|row| rows[row * k + 3] = f16::NAN),
        Logits::Nan => x[0] = f16::NAN,
    }
}

fn first_largest(logits: &[f32]) -> usize {
    let best = logits.iter().copied().filter(|value| !value.is_nan()).fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|value| *value == best).unwrap_or(0)
}

fn check_logits(what: &str, name: &str, logits: Logits, expected: &Expected, y: &[f32]) {
    for (at, ((y, value), error)) in y.iter().zip(&expected.values).zip(&expected.errors).enumerate() {
        let is_right = if value.is_nan() { y.is_nan() } else { (y - value).abs() <= *error };
        assert!(is_right, "{what}: logit {at} is {y}, not {value} within {error:e}");
    }
    // Double quantization rounds an absmax by those around it.
    if logits == Logits::Ties && name != "nf4" {
        assert_eq!((y[13], y[500], first_largest(y)), (y[500], y[1000], 13), "{what}");
    }
}
