//! Batches of sequences on tiny models of every family: each sequence gives the logits that it gives alone.

mod command;
#[path = "../coverage/mod.rs"]
mod coverage;
#[cfg(feature = "cuda")]
mod cuda;

use std::path::{Path, PathBuf};

use coverage::{in_turn, is_full};
use quantbench::call::Batch;
use quantbench::engine::{self, Device, EncoderInput, Session, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::plan::{EncoderInputKind, Model};
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::rng::SplitMix64;
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, Checkpoint, ModelRequest};

/// fp32 sums in another order: a relative change of 1e-6 in the embeddings moves logits of these models by up to 1.9e-4
/// (tests/golden/architectures/README.md).
const FP16_LOGIT_TOLERANCE: f32 = 5e-4;

/// NF4: 1e-6 of noise moves logits by up to 2.4e-4, and by 1.6e-4 with those of tests/golden/models; scales multiply sums of a block there.
const NF4_LOGIT_TOLERANCE: f32 = 2e-3;

const STEPS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Executor {
    Reference,
    Cpu(Isa),
    #[cfg(feature = "cuda")]
    Cuda,
}

impl Executor {
    fn device(self) -> Device {
        match self {
            Executor::Reference | Executor::Cpu(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Executor::Cuda => Device::Cuda(0),
        }
    }
}

/// Those of a machine without a GPU.
fn executors() -> Vec<Executor> {
    std::iter::once(Executor::Reference).chain(Isa::available().into_iter().map(Executor::Cpu)).collect()
}

/// Folders of models: those of every architecture, and those with encoders.
fn folders() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let of = |folder: &str| std::fs::read_dir(golden.join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = of("architectures/models").chain(of("models")).collect();
    folders.retain(|folder| folder.join("config.json").exists());
    folders.sort();
    assert!(folders.len() > 20);
    folders
}

struct Tiny {
    name: String,
    checkpoint: Checkpoint,
    plan: Model,
}

impl Tiny {
    fn open(folder: &Path) -> Self {
        let checkpoint = weights::open(&ModelRequest::of(folder.display().to_string()), &Silent).unwrap();
        let plan = quantbench::models::build(&checkpoint.config).unwrap();
        Self { name: folder.file_name().unwrap().to_string_lossy().into_owned(), checkpoint, plan }
    }

    fn load(&self, precision: &str, executor: Executor, sequences: usize) -> Box<dyn Session> {
        self.try_load(precision, executor, sequences).unwrap()
    }

    fn try_load(&self, precision: &str, executor: Executor, sequences: usize) -> anyhow::Result<Box<dyn Session>> {
        let source = self.checkpoint.source(&self.plan.matrices, &self.plan.vectors).unwrap();
        let setup = Setup {
            model: &self.plan,
            source: source.as_ref(),
            formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
            device: executor.device(),
            threads: 2,
            sequences,
            kv_format: executor.device().kv_format(),
            capacity: 300,
            encoder_capacity: 256,
            cuda_graph: true,
        };
        let loaded = match executor {
            Executor::Reference => engine::reference::load(&setup, &Silent),
            Executor::Cpu(isa) => engine::cpu::load(&setup, isa, &Silent),
            #[cfg(feature = "cuda")]
            Executor::Cuda => engine::load(&setup, &Silent),
        };
        Ok(loaded?.session)
    }

    /// Ids of a text of `n` tokens, other ones for each sequence.
    fn text(&self, sequence: usize, n: usize) -> Vec<u32> {
        let mut rng = SplitMix64::new(0x7e47 + sequence as u64);
        let image = match self.plan.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => Some(picture.token),
            _ => None,
        };
        let mut id = || (3 + rng.below(self.plan.vocab.min(250) - 3)) as u32;
        (0..n).map(|_| std::iter::repeat_with(&mut id).find(|id| Some(*id) != image).unwrap()).collect()
    }

    /// What the encoder and the decoder of a sequence read, `n` tokens of text among it.
    fn input(&self, sequence: usize, n: usize) -> Input {
        let text = self.text(sequence, n);
        match self.plan.encoder.as_ref().map(|encoder| encoder.input) {
            None => Input { tokens: Vec::new(), pixels: Vec::new(), prompt: text },
            Some(EncoderInputKind::Tokens) => {
                Input { tokens: text, pixels: Vec::new(), prompt: vec![self.plan.decoder_start.unwrap()] }
            }
            Some(EncoderInputKind::Picture(picture)) => {
                let mut rng = SplitMix64::new(0x91c7 + sequence as u64);
                let pixels = (0..3 * picture.size * picture.size).map(|_| rng.below(2001) as f32 / 1000.0 - 1.0);
                let image = std::iter::repeat_n(picture.token, picture.patches());
                Input { tokens: Vec::new(), pixels: pixels.collect(), prompt: image.chain(text).collect() }
            }
        }
    }
}

struct Input {
    tokens: Vec<u32>,
    pixels: Vec<f32>,
    prompt: Vec<u32>,
}

impl Input {
    fn encoder(&self) -> Option<EncoderInput<'_>> {
        match (self.tokens.is_empty(), self.pixels.is_empty()) {
            (false, _) => Some(EncoderInput::Tokens(&self.tokens)),
            (_, false) => Some(EncoderInput::Pixels(&self.pixels)),
            _ => None,
        }
    }

    /// All sequences' input as that of one call.
    fn together(inputs: &[Input]) -> Input {
        Input {
            tokens: inputs.iter().flat_map(|input| input.tokens.clone()).collect(),
            pixels: inputs.iter().flat_map(|input| input.pixels.clone()).collect(),
            prompt: inputs.iter().flat_map(|input| input.prompt.clone()).collect(),
        }
    }
}

/// The token that a sequence is given at a step, whatever it chose.
fn given(sequence: usize, step: usize) -> u32 {
    (5 + (7 * sequence + 3 * step) % 200) as u32
}

/// Logits behind the prompt and each given token, of one sequence alone.
fn alone(session: &mut dyn Session, sequence: usize, input: &Input) -> Vec<Vec<f32>> {
    session.rewind(0);
    input.encoder().map_or(Ok(()), |input| session.encode(input)).unwrap();
    session.prefill(&input.prompt).unwrap();
    let mut logits = vec![session.logits().unwrap()];
    for step in 0..STEPS {
        session.prefill(&[given(sequence, step)]).unwrap();
        logits.push(session.logits().unwrap());
    }
    logits
}

/// The same of all sequences at once, by sequence and step.
fn together(session: &mut dyn Session, inputs: &[Input]) -> Vec<Vec<Vec<f32>>> {
    let n = inputs.len();
    session.rewind(0);
    let all = Input::together(inputs);
    all.encoder().map_or(Ok(()), |input| session.encode(input)).unwrap();
    let each = all.prompt.len() / n;
    let mut next = vec![0; n];
    session.prefill_batch(Batch { sequences: n, positions: (0..each).into() }, &all.prompt, &mut next).unwrap();
    let mut logits = vec![Vec::new(); n];
    push(session, &next, &mut logits);
    steps(session, logits)
}

/// The given tokens behind the prompts.
fn steps(session: &mut dyn Session, mut logits: Vec<Vec<Vec<f32>>>) -> Vec<Vec<Vec<f32>>> {
    let n = logits.len();
    for step in 0..STEPS {
        let tokens: Vec<u32> = (0..n).map(|sequence| given(sequence, step)).collect();
        let (position, mut next) = (session.position(), vec![0; n]);
        let batch = Batch { sequences: n, positions: (position..position + 1).into() };
        session.prefill_batch(batch, &tokens, &mut next).unwrap();
        push(session, &next, &mut logits);
    }
    logits
}

fn push(session: &mut dyn Session, next: &[u32], logits: &mut [Vec<Vec<f32>>]) {
    let all = session.logits().unwrap();
    let rows = all.chunks_exact(all.len() / next.len());
    for ((row, next), logits) in rows.zip(next).zip(logits) {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(row.iter().position(|logit| *logit == largest), Some(*next as usize));
        logits.push(row.to_vec());
    }
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differs = |(a, b): (&f32, &f32)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b)).map(differs).fold(0.0, f32::max)
}

fn tolerance(precision: &str) -> f32 {
    if precision == "fp16" { FP16_LOGIT_TOLERANCE } else { NF4_LOGIT_TOLERANCE }
}

/// Precisions, executors and sizes of a model; in a full run all, else one of each in turn.
fn cases(turn: usize) -> Vec<(&'static str, Executor, usize)> {
    let sizes: &[usize] = if is_full() { &[2, 5, 8, 17] } else { &[2, 5, 8] };
    let precisions = in_turn(&["fp16", "nf4"], turn / 2);
    let of = |precision| {
        let executors = in_turn(&executors(), turn + 1).into_iter();
        executors.flat_map(move |executor| in_turn(sizes, turn).into_iter().map(move |n| (precision, executor, n)))
    };
    precisions.into_iter().flat_map(of).collect()
}

#[test]
fn each_sequence_of_a_batch_gives_the_logits_that_it_gives_alone() {
    for (turn, folder) in folders().iter().enumerate() {
        let tiny = Tiny::open(folder);
        for (precision, executor, n) in cases(turn) {
            let inputs: Vec<Input> = (0..n).map(|sequence| tiny.input(sequence, 14)).collect();
            let batched = together(tiny.load(precision, executor, n).as_mut(), &inputs);
            let mut one = tiny.load(precision, executor, 1);
            for (sequence, (input, batched)) in inputs.iter().zip(&batched).enumerate() {
                let difference = worst(&alone(one.as_mut(), sequence, input), batched);
                let case = format!("{} {precision} {executor:?} sequence {sequence} of {n}", tiny.name);
                assert!(difference <= tolerance(precision), "{case}: {difference}");
            }
        }
    }
}

/// Prompts of `n` sequences, of lengths that differ.
fn unequal(tiny: &Tiny, n: usize) -> Vec<Input> {
    // LongRoPE's sequences all have the frequencies of the longest, as transformers' have.
    let longest = if tiny.plan.ropes.iter().any(|rope| rope.by_length.is_some()) { 8 } else { 19 };
    (0..n).map(|sequence| tiny.input(sequence, 2 + (5 * sequence + 3) % (longest - 1))).collect()
}

/// Logits behind prompts that are run one by one, and behind the given tokens of all.
fn one_by_one(session: &mut dyn Session, inputs: &[Input]) -> Vec<Vec<Vec<f32>>> {
    session.rewind(0);
    let mut logits = vec![Vec::new(); inputs.len()];
    for (sequence, input) in inputs.iter().enumerate() {
        let next = session.prefill_one(sequence, input.encoder(), &input.prompt).unwrap();
        push(session, &[next], &mut logits[sequence..sequence + 1]);
    }
    steps(session, logits)
}

/// Prompts one by one, of lengths that differ, and then steps of all.
#[test]
fn sequences_of_different_lengths_give_the_logits_that_they_give_alone() {
    for (turn, folder) in folders().iter().enumerate() {
        let tiny = Tiny::open(folder);
        for (precision, executor, n) in cases(turn + 1) {
            let inputs = unequal(&tiny, n);
            let mut session = tiny.load(precision, executor, n);
            let mut one = tiny.load(precision, executor, 1);
            let expected: Vec<_> =
                inputs.iter().enumerate().map(|(sequence, input)| alone(one.as_mut(), sequence, input)).collect();
            let case = format!("{} {precision} {executor:?}, {n} sequences", tiny.name);
            let batched = one_by_one(session.as_mut(), &inputs);
            for (sequence, (batched, expected)) in batched.iter().zip(&expected).enumerate() {
                let difference = worst(expected, batched);
                assert!(difference <= tolerance(precision), "{case}, sequence {sequence}: {difference}");
            }
        }
    }
}

/// Greedy decoding of a batch, and again after a rewind: the same tokens of each sequence.
#[test]
fn a_batch_decodes_and_rewinds_as_one_sequence_does() {
    for (turn, folder) in folders().iter().enumerate() {
        let tiny = Tiny::open(folder);
        let executor = in_turn(&executors(), turn)[0];
        let inputs: Vec<Input> = (0..3).map(|sequence| tiny.input(sequence, 9)).collect();
        let all = Input::together(&inputs);
        let each = all.prompt.len() / 3;
        let mut session = tiny.load("fp16", executor, 3);
        let mut run = || decoded(session.as_mut(), &all, (3, each));
        let first = run();
        assert_eq!((first.len(), run()), (18, first.clone()), "{} {executor:?}", tiny.name);
    }
}

/// Tokens of prompts of `each` tokens and of five steps.
fn decoded(session: &mut dyn Session, all: &Input, (n, each): (usize, usize)) -> Vec<u32> {
    let mut chosen = vec![0; n];
    session.rewind(0);
    all.encoder().map_or(Ok(()), |input| session.encode(input)).unwrap();
    let batch = Batch { sequences: n, positions: (0..each).into() };
    session.prefill_batch(batch, &all.prompt, &mut chosen).unwrap();
    session.decode_batch(5, &mut |tokens| chosen.extend_from_slice(tokens)).unwrap();
    assert_eq!(session.position(), each + 5);
    chosen
}

/// Equal sequences have one sequence's outlier columns, and so its products. Columns are those of all rows of a call, as bitsandbytes finds
/// them: tests/formats.rs holds the kernels to that.
#[test]
fn int8_takes_a_batch_as_one_call() {
    for (turn, folder) in folders().iter().enumerate() {
        let tiny = Tiny::open(folder);
        let executor = in_turn(&executors(), turn + 2)[0];
        let same: Vec<Input> = (0..3).map(|_| tiny.input(0, 7)).collect();
        let mut session = tiny.load("int8", executor, 3);
        let batched = together_of(session.as_mut(), &same);
        let expected = together_of(tiny.load("int8", executor, 1).as_mut(), &same[..1]);
        for (sequence, logits) in batched.iter().enumerate() {
            // Rows of a prompt are quantized one by one, and their sums run in the same order however many there are; the fp16 head alone sums
            // otherwise for one row.
            let difference = worst(std::slice::from_ref(logits), &expected[..1]);
            assert!(difference <= FP16_LOGIT_TOLERANCE, "{} {executor:?} sequence {sequence}: {difference}", tiny.name);
        }
    }
}

/// Logits behind the prompts.
fn together_of(session: &mut dyn Session, inputs: &[Input]) -> Vec<Vec<f32>> {
    let (n, all) = (inputs.len(), Input::together(inputs));
    all.encoder().map_or(Ok(()), |input| session.encode(input)).unwrap();
    let mut next = vec![0; n];
    let batch = Batch { sequences: n, positions: (0..all.prompt.len() / n).into() };
    session.prefill_batch(batch, &all.prompt, &mut next).unwrap();
    let logits = session.logits().unwrap();
    logits.chunks_exact(logits.len() / n).map(<[f32]>::to_vec).collect()
}
