//! Batches of tiny models, by the calls that the engine queues on a GPU: each sequence gives the logits that it gives alone, by a step's program.

use std::ops::Range;

use half::f16;
use quantbench::call::Batch;
use quantbench::kernels::cuda::place::DevicePlace;
use quantbench::lower::cuda::{CallInput, CallKind, CallShape};
use quantbench::plan::EncoderInputKind;
use quantbench::rng::SplitMix64;

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::session::{CAPACITY, SLOTS, Session};
use super::step::{TOLERANCE, families};

/// Steps behind the prompts, whose tokens are those of the sequence alone.
const STEPS: usize = 3;

/// What a sequence reads: tokens of its encoder or pixels, and the decoder's.
struct Input {
    tokens: Vec<u32>,
    pixels: Vec<f32>,
    prompt: Vec<u32>,
}

impl Input {
    /// Other ones for each sequence, with `n` tokens of text.
    fn of(session: &Session, sequence: usize, n: usize) -> Self {
        let mut rng = SplitMix64::new(0xba7c4 + sequence as u64);
        let encoder = session.model.encoder.as_ref().map(|encoder| encoder.input);
        let image = match encoder {
            Some(EncoderInputKind::Picture(picture)) => Some(picture.token),
            _ => None,
        };
        let mut id = || (3 + rng.below(session.model.vocab.min(250) - 3)) as u32;
        let text: Vec<u32> =
            (0..n).map(|_| std::iter::repeat_with(&mut id).find(|id| Some(*id) != image).expect("an id")).collect();
        match encoder {
            None => Self { tokens: Vec::new(), pixels: Vec::new(), prompt: text },
            Some(EncoderInputKind::Tokens) => {
                Self { tokens: text, pixels: Vec::new(), prompt: vec![session.model.decoder_start.expect("a start")] }
            }
            Some(EncoderInputKind::Picture(picture)) => {
                let pixels = (0..3 * picture.size * picture.size).map(|_| rng.below(2001) as f32 / 1000.0 - 1.0);
                let image = std::iter::repeat_n(picture.token, picture.patches());
                Self { tokens: Vec::new(), pixels: pixels.collect(), prompt: image.chain(text).collect() }
            }
        }
    }
}

impl Session<'_> {
    fn upload_places(&self) {
        self.host.memory.write(self.session.places, &self.places);
    }

    fn encode_of(&mut self, which: Range<usize>, inputs: &[&Input]) {
        let n = which.len();
        let (rows, input) = match self.model.encoder.as_ref().map(|encoder| encoder.input) {
            None => return,
            Some(EncoderInputKind::Tokens) => {
                let tokens: Vec<u32> = inputs.iter().flat_map(|input| input.tokens.clone()).collect();
                (tokens.len() / n, CallInput::tokens(&self.model, &tokens, n, 0).expect("tokens"))
            }
            Some(EncoderInputKind::Picture(picture)) => {
                let rows = inputs.iter().flat_map(|input| picture.patch_rows(&input.pixels).expect("a picture"));
                (picture.patches(), CallInput::Patches(rows.map(f16::from_f32).collect()))
            }
        };
        let batch = Batch { sequences: n, positions: (0..rows).into() };
        self.call(CallShape { kind: CallKind::Encoder, first: which.start, batch, encoded: rows }, &input);
        for place in &mut self.places[which] {
            *place = DevicePlace::new(place.position, rows as i32, place.step);
        }
    }

    /// Prompts of the sequences `which`, all equally long.
    fn prompts(&mut self, which: Range<usize>, inputs: &[&Input]) {
        self.encode_of(which.clone(), inputs);
        let (n, each, place) = (which.len(), inputs[0].prompt.len(), self.places[which.start]);
        let tokens: Vec<u32> = inputs.iter().flat_map(|input| input.prompt.clone()).collect();
        assert_eq!(tokens.len(), n * each);
        let (position, encoded) = (place.position as usize, place.encoded as usize);
        let input = CallInput::tokens(&self.model, &tokens, n, encoded).expect("no more image tokens than features");
        self.set_length(position + each);
        self.upload_places();
        let batch = Batch { sequences: n, positions: (position..position + each).into() };
        self.call(CallShape { kind: CallKind::Prompt, first: which.start, batch, encoded }, &input);
        self.moved(which, each);
    }

    /// A step of all sequences, which are given `tokens`.
    fn steps_of(&mut self, tokens: &[i32]) {
        let longest = self.places.iter().map(|place| place.position).max().expect("a sequence") as usize;
        self.set_length(longest + 1);
        self.upload_places();
        self.host.memory.write(self.session.tokens, tokens);
        let encoded = self.places.iter().map(|place| place.encoded).max().expect("a sequence") as usize;
        self.call(CallShape::step(self.places.len(), CAPACITY, encoded), &CallInput::OnDevice);
        self.moved(0..self.places.len(), 1);
    }

    /// Takes over where the device says that sequences stand, and checks it.
    fn moved(&mut self, which: Range<usize>, each: usize) {
        let found: Vec<DevicePlace> = (0..self.places.len())
            .map(|sequence| {
                let at = self.session.places + (sequence * size_of::<DevicePlace>()) as u64;
                let values = self.host.memory.read::<i32>(at, 3);
                DevicePlace::new(values[0], values[1], values[2])
            })
            .collect();
        for sequence in which {
            let DevicePlace { position, encoded, step, .. } = self.places[sequence];
            self.places[sequence] = DevicePlace::new(position + each as i32, encoded, step + 1);
        }
        assert_eq!(found, self.places);
    }

    /// The logits of a sequence, and its token, which the host has too.
    fn of_sequence(&self, sequence: usize) -> (Vec<f32>, u32) {
        let (memory, vocab) = (self.host.memory, self.model.vocab);
        let logits = memory.read::<f32>(self.session.logits + (4 * sequence * vocab) as u64, vocab);
        let token = memory.read::<i32>(self.session.tokens, self.places.len())[sequence] as u32;
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(logits.iter().position(|logit| *logit == largest), Some(token as usize));
        let step = self.places[sequence].step as usize;
        let words = memory.read::<u64>(self.session.host, SLOTS * self.places.len());
        assert_eq!(words[step % SLOTS * self.places.len() + sequence], (step as u64) << 32 | u64::from(token));
        (logits, token)
    }
}

/// Logits behind the prompt and each step of one sequence alone, and the tokens that they choose.
fn alone(model: &str, precision: &str, chip: u32, input: &Input) -> (Vec<Vec<f32>>, Vec<u32>) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let mut session = Session::load(model, precision, &host, 16);
    if session.model.encoder.is_some() {
        session.encode(&input.tokens, &input.pixels);
    }
    session.prefill(&input.prompt);
    let (mut logits, mut tokens) = (vec![session.logits()], vec![session.state().0]);
    for step in 0..STEPS {
        session.set_length(input.prompt.len() + step + 1);
        session.step();
        logits.push(session.logits());
        tokens.push(session.state().0);
    }
    (logits, tokens)
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differs = |(a, b): (&f32, &f32)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(differs).fold(0.0, f32::max)
}

/// Every family but mixtures, with prompts of one length or of several, in turn.
pub fn sequences_of_a_batch_follow_the_sequence_alone() {
    let models = ["llama-odd", "phi-tiny", "t5-tiny", "t5-odd", "paligemma-odd"].into_iter().chain(families());
    for (turn, model) in models.enumerate() {
        let (precision, chip, n) = (["fp16", "nf4"][turn % 2], CHIPS[turn / 2 % CHIPS.len()], [2, 5, 3][turn % 3]);
        let is_equal = turn % 4 < 2;
        let memory = Memory::default();
        let host = Host { chip, memory: &memory };
        let mut session = Session::load_batch(model, precision, &host, n);
        if session.model.experts().is_some() {
            continue;
        }
        let lengths = |sequence: usize| if is_equal { 6 } else { 2 + (5 * sequence + 3) % 7 };
        let inputs: Vec<Input> = (0..n).map(|sequence| Input::of(&session, sequence, lengths(sequence))).collect();
        let expected: Vec<_> = inputs.iter().map(|input| alone(model, precision, chip, input)).collect();
        if is_equal {
            session.prompts(0..n, &inputs.iter().collect::<Vec<_>>());
        } else {
            for (sequence, input) in inputs.iter().enumerate() {
                session.prompts(sequence..sequence + 1, &[input]);
            }
        }
        for step in 0..=STEPS {
            for (sequence, (logits, _)) in expected.iter().enumerate() {
                let difference = worst(&session.of_sequence(sequence).0, &logits[step]);
                let case = format!("{model} {precision}, chip {chip}, step {step} of sequence {sequence} of {n}");
                assert!(difference <= TOLERANCE, "{case}: {difference}");
                // It would be seen if a sequence were given another one's.
                let other = &expected[(sequence + 1) % n].0[step];
                assert!(worst(&logits[step], other) > 5.0 * TOLERANCE, "{case}: two sequences hardly differ");
            }
            let tokens: Vec<i32> = expected.iter().map(|(_, tokens)| tokens[step] as i32).collect();
            if step < STEPS {
                session.steps_of(&tokens);
            }
        }
    }
}

/// Outlier columns are found over all rows of a call: equal sequences have those of one, and its logits.
pub fn int8_takes_a_batch_as_one_call() {
    for (turn, model) in ["llama-tiny", "phi-odd"].into_iter().enumerate() {
        let memory = Memory::default();
        let host = Host { chip: CHIPS[turn], memory: &memory };
        let mut session = Session::load_batch(model, "int8", &host, 3);
        let input = Input::of(&session, turn, 6);
        let (expected, tokens) = alone(model, "int8", CHIPS[turn], &input);
        session.prompts(0..3, &[&input; 3]);
        let found = session.outlier_columns();
        for sequence in 0..3 {
            let difference = worst(&session.of_sequence(sequence).0, &expected[0]);
            assert!(difference <= TOLERANCE, "{model} sequence {sequence}: {difference}");
        }
        let of_prompt = {
            let memory = Memory::default();
            let host = Host { chip: CHIPS[turn], memory: &memory };
            let mut session = Session::load(model, "int8", &host, 16);
            session.prefill(&input.prompt);
            session.outlier_columns()
        };
        assert_eq!(found, of_prompt, "{model}");
        session.steps_of(&[tokens[0] as i32; 3]);
        for sequence in 0..3 {
            let difference = worst(&session.of_sequence(sequence).0, &expected[1]);
            assert!(difference <= TOLERANCE, "{model} sequence {sequence}, a step: {difference}");
        }
    }
}
