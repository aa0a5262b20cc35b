//! The prompt as the exact ids that every precision gets.

use std::path::PathBuf;

use tokenizers::Tokenizer;

use super::case::{Case, PromptChoice, Variant};
use super::load::{DeviceAssignment, LoadRequest, OwnOptions};
use super::logits;
use super::measurement_protocol::{MeasurementProtocol, Method};
use super::random_ids::{seed_of, synthetic};
use super::task::{Task, Wait};
use crate::engine::Engine;
use crate::error::BadInput;
use crate::plan::{EncoderInputKind, Model};
use crate::protocol::Encode;
use crate::quant::FormatId;
use crate::record;
use crate::weights::Checkpoint;
use crate::weights::tokenizer::{ChatMessage, ChatTemplate};

/// The prompt where none is given and there is a tokenizer.
pub const DEFAULT_TEXT: &str = "Explain quantization in simple terms.";

/// The prompt of a vision-language model.
pub const DEFAULT_PICTURE_TEXT: &str = "caption en";

/// Length of the prompt where none is given and there is no tokenizer.
const DEFAULT_SYNTHETIC: usize = 8;

/// Stream of the random ids of the depth, other than the prompt's.
const DEPTH_STREAM: u64 = 0xde97;

/// The work of every repeat and its description in records.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizedWorkload {
    pub task: Task,
    /// Tokens of each sequence's prompt, wherever they go; image tokens are apart.
    pub n_prompt: usize,
    pub n_image: usize,
    /// Rows of the encoder, of each sequence.
    pub n_encoder: usize,
    /// Tokens of the longest prompt that was given, where it was cut to the shortest's length.
    pub longest_given: Option<usize>,
}

impl TokenizedWorkload {
    /// The request to load one variant of a case for this workload.
    pub fn load_request(
        &self,
        case: &Case,
        (engine, precision): (Engine, FormatId),
        assignment: DeviceAssignment,
    ) -> LoadRequest {
        let DeviceAssignment { device, threads } = assignment;
        let options = OwnOptions {
            // The parent has fetched whatever was missing.
            model: crate::weights::ModelRequest { offline: true, ..case.model.clone() },
            engine,
            format_options: case.format_options,
            encoder_capacity: self.n_encoder,
            encode: self.task.encode.clone(),
            kv_format: case.kv_format,
            cuda_graph: case.cuda_graph,
            selection: case.selection(),
        };
        LoadRequest {
            precision,
            device,
            threads,
            task: self.task.clone(),
            options,
            memory_limit_bytes: case.protocol.memory_limit_bytes,
        }
    }

    /// File for the logits of a variant, where they were asked for.
    pub fn logits_file(&self, case: &Case, variant: &Variant) -> Option<PathBuf> {
        let path = case.save_logits.as_ref()?;
        Some(logits::path_of(path, &variant.label(), case.variants().len()))
    }

    /// The workload for records.
    pub fn recorded(&self) -> record::Workload {
        let Self { task, n_prompt, n_image, .. } = self;
        record::Workload {
            n_prompt: *n_prompt as u64,
            n_gen: task.n_gen as u64,
            n_depth: task.n_depth() as u64,
            n_image: *n_image as u64,
            image: match &task.encode {
                Encode::Picture { image: None, .. } => Some(record::ImageSource::Generated),
                Encode::Picture { image: Some(_), .. } => Some(record::ImageSource::File),
                Encode::Nothing | Encode::Tokens(_) => None,
            },
            batch_size: task.sequences as u64,
        }
    }
}

/// The tokenizer and the chat template of a prompt.
#[derive(Clone, Copy, Default)]
pub struct Words<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    pub chat_template: Option<&'a ChatTemplate>,
    /// Why the template of the model cannot be read, where it cannot.
    pub problem: Option<&'a str>,
    /// Why the tokenizer of the model is not read, where it has one that is not.
    pub unread: Option<&'a str>,
}

impl<'a> Words<'a> {
    pub fn of(checkpoint: &'a Checkpoint) -> Self {
        let template = checkpoint.chat_template.as_ref();
        Self {
            tokenizer: checkpoint.tokenizer.as_ref(),
            chat_template: template.ok().and_then(Option::as_ref),
            problem: template.err().map(String::as_str),
            unread: checkpoint.unread_tokenizer.as_deref(),
        }
    }

    /// The end of a message about a tokenizer that is not there.
    fn why_none(&self) -> String {
        self.unread.map(|why| format!(": {why}")).unwrap_or_default()
    }

    /// `text` as a user's message, up to where the model answers.
    fn message(&self, case: &Case, text: &str) -> Result<String, BadInput> {
        let Some(template) = self.chat_template else {
            let why = self.problem.map(|problem| format!(": {problem}")).unwrap_or_default();
            let message = format!("`--chat`: `{}` has no chat template{why}", case.model.model_id);
            return Err(BadInput::new(message).hint("drop `--chat`, or name a model that was trained for chats"));
        };
        template.render(&[ChatMessage { role: "user", content: text }])
    }

    /// A notice about the model's chat template for a user who gave a text, where there is one.
    pub fn hint(&self, case: &Case) -> Option<&'static str> {
        let is_plain = matches!(case.prompt, PromptChoice::Text(_) | PromptChoice::Texts(_)) && !case.chat;
        (is_plain && self.chat_template.is_some())
            .then_some("the model has a chat template, and the prompt is plain text: `--chat` applies it")
    }
}

/// The workload of a case. Fails where the prompt is empty, needs a tokenizer that is not there, has ids beyond the
/// vocabulary, or does not fit the context together with depth and generated tokens.
pub fn workload(case: &Case, words: Words, model: &Model) -> anyhow::Result<TokenizedWorkload> {
    let tokenizer = words.tokenizer;
    let (seed, n_prompt) = (case.model.seed, n_synthetic(case, tokenizer));
    // A length is checked before its ids are made: what a user types may exceed the memory.
    check_lengths(case, n_prompt.unwrap_or(1), model)?;
    if case.stream && tokenizer.is_none() && !matches!(case.prompt, PromptChoice::Synthetic(_)) {
        return Err(nothing_to_stream(case, words).into());
    }
    let n_image = n_image(model);
    if let Some(image) = case.image.as_ref().filter(|_| n_image == 0) {
        let (image, architecture) = (image.display(), model.architecture);
        return Err(BadInput::new(format!("`--image {image}`: `{architecture}` models read text only"))
            .hint("drop `--image`, or name a vision-language model, such as `--model-id paligemma-3b-pt-224`")
            .into());
    }
    let texts: Vec<&str> = match &case.prompt {
        PromptChoice::Text(text) => vec![text],
        PromptChoice::Texts(texts) => texts.iter().take(case.sequences).map(String::as_str).collect(),
        PromptChoice::Default if n_image > 0 => vec![DEFAULT_PICTURE_TEXT],
        PromptChoice::Default => vec![DEFAULT_TEXT],
        PromptChoice::Synthetic(_) | PromptChoice::Ids(_) => Vec::new(),
    };
    let of_text = |text: &str| -> anyhow::Result<Vec<u32>> {
        let Some(tokenizer) = tokenizer else { return Err(no_tokenizer(case, words).into()) };
        match (n_image > 0, case.chat) {
            // PaliGemma's processor writes it so after the image tokens.
            (true, _) => encode(tokenizer, &format!("<bos>{text}\n"), false),
            // A template writes the token of the beginning itself.
            (false, true) => encode(tokenizer, &words.message(case, text)?, false),
            (false, false) => encode(tokenizer, text, true),
        }
    };
    let given: Vec<Vec<u32>> = match (&case.prompt, n_prompt) {
        (PromptChoice::Ids(ids), _) => vec![ids.clone()],
        (_, Some(n)) => vec![synthetic(n, model.vocab, seed)],
        (_, None) => texts.into_iter().map(of_text).collect::<anyhow::Result<_>>()?,
    };
    let given: Vec<Vec<u32>> =
        given.into_iter().map(|ids| without_image_tokens(ids, model)).collect::<Result<_, _>>()?;
    let (shortest, longest) = (given.iter().map(Vec::len).min(), given.iter().map(Vec::len).max());
    check_lengths(case, shortest.unwrap_or(0), model)?;
    let are_typed = matches!(case.prompt, PromptChoice::Ids(_));
    given.iter().try_for_each(|ids| check_vocabulary(ids, are_typed, model))?;
    let workload = place(case, of_all_sequences(given, shortest.unwrap_or(0), case, model), model);
    Ok(TokenizedWorkload { longest_given: longest.filter(|_| longest != shortest), ..workload })
}

/// Prompts of equal length, one a sequence: those that were `given`, up to the shortest's length, and random ids behind them.
fn of_all_sequences(given: Vec<Vec<u32>>, n: usize, case: &Case, model: &Model) -> Vec<Vec<u32>> {
    let first_random = given.len();
    let given = given.into_iter().map(|ids| ids[..n].to_vec());
    let random = (first_random..case.sequences).map(|at| synthetic(n, model.vocab, seed_of(case.model.seed, at)));
    given.chain(random).collect()
}

/// Length of a synthetic prompt; `None` where the prompt is something else.
fn n_synthetic(case: &Case, tokenizer: Option<&Tokenizer>) -> Option<usize> {
    match case.prompt {
        PromptChoice::Synthetic(n) => Some(n),
        PromptChoice::Default if tokenizer.is_none() => Some(DEFAULT_SYNTHETIC),
        _ => None,
    }
}

/// Gives the prompts of all sequences to the side of the model that reads them.
fn place(case: &Case, prompts: Vec<Vec<u32>>, model: &Model) -> TokenizedWorkload {
    let (seed, n_prompt, n_image) = (case.model.seed, prompts[0].len(), n_image(model));
    let (encode, prompt) = match model.encoder.as_ref().map(|encoder| encoder.input) {
        None => (Encode::Nothing, prompts.concat()),
        Some(EncoderInputKind::Tokens) => {
            (Encode::Tokens(prompts.concat()), vec![model.decoder_start.unwrap_or(0); prompts.len()])
        }
        Some(EncoderInputKind::Picture(picture)) => {
            let image = vec![picture.token; n_image];
            let all = prompts.into_iter().flat_map(|prompt| [image.clone(), prompt].concat());
            (Encode::Picture { image: case.image.clone(), pixels: None }, all.collect())
        }
    };
    let n_encoder = if let Encode::Tokens(_) = &encode { n_prompt } else { n_image };
    let depth = |sequence| synthetic(case.n_depth, model.vocab, seed_of(seed, sequence) ^ DEPTH_STREAM);
    let task = Task {
        sequences: case.sequences,
        depth: (0..case.sequences).flat_map(depth).collect(),
        encode,
        prompt,
        n_gen: case.n_gen,
        stop_at: if case.stop_at_eos { model.eos.clone() } else { Vec::new() },
        warmup: case.protocol.warmup,
        max_time_s: case.protocol.one_launch().max_time_s,
        wait: wait(&case.protocol),
        stream: case.stream,
    };
    TokenizedWorkload { task, n_prompt, n_image, n_encoder, longest_given: None }
}

fn wait(protocol: &MeasurementProtocol) -> Wait {
    match protocol.method {
        Method::SingleColdRun => Wait::EachToken,
        Method::Quantbench if protocol.sync_each_token => Wait::BothWays,
        Method::Quantbench => Wait::AtEnd,
    }
}

/// Image tokens of the prompt.
fn n_image(model: &Model) -> usize {
    match model.encoder.as_ref().map(|encoder| encoder.input) {
        Some(EncoderInputKind::Picture(picture)) => picture.patches(),
        _ => 0,
    }
}

/// Tokens of all sequences together: their ids are made before anything is known of the memory.
const MOST_TOKENS: usize = 1 << 26;

fn check_lengths(case: &Case, n_prompt: usize, model: &Model) -> Result<(), BadInput> {
    let (n_depth, n_gen, context) = (case.n_depth, case.n_gen, model.context);
    if n_prompt == 0 {
        return Err(BadInput::new("the prompt is empty").hint("give at least one token, or drop the option"));
    }
    if n_gen == 0 {
        return Err(BadInput::new("`--max-new-tokens 0` generates nothing to measure").hint("ask for at least 1"));
    }
    if n_depth > 0 && model.encoder.is_some() {
        return Err(BadInput::new(format!(
            "`--depth {n_depth}` is not possible for `{}`: its prompt starts with the encoder's",
            model.architecture
        ))
        .hint("drop `--depth`, or lengthen the prompt with `--prompt-tokens`"));
    }
    let sum = |lengths: &[usize]| lengths.iter().fold(0usize, |sum, length| sum.saturating_add(*length));
    let hint = "shorten the prompt, `--depth` or `--max-new-tokens`";
    let (sequences, of_each) = (case.sequences, sum(&[n_depth, n_prompt, n_gen]));
    if sequences > 1 && sequences.saturating_mul(of_each) > MOST_TOKENS {
        let message =
            format!("`--batch-size {sequences}` of {of_each} tokens each is more than {MOST_TOKENS} tokens together");
        return Err(BadInput::new(message).hint("ask for fewer sequences, or `--batch-size max` for as many as fit"));
    }
    if model.decoder_start.is_some() {
        let n_longest = n_prompt.max(sum(&[n_gen, 1]));
        let message =
            format!("prompt {n_prompt} or generated {n_gen} exceeds the model's context of {context} on each side");
        return if n_longest > context { Err(BadInput::new(message).hint(hint)) } else { Ok(()) };
    }
    let n_image = n_image(model);
    let n_total = sum(&[n_depth, n_image, n_prompt, n_gen]);
    let image = if n_image > 0 { format!("image {n_image} + ") } else { String::new() };
    let message = format!(
        "depth {n_depth} + {image}prompt {n_prompt} + generated {n_gen} are {n_total} tokens; the model's context holds {context}"
    );
    if n_total > context { Err(BadInput::new(message).hint(hint)) } else { Ok(()) }
}

/// Exact ids may begin with the image tokens, which are put there otherwise.
fn without_image_tokens(ids: Vec<u32>, model: &Model) -> Result<Vec<u32>, BadInput> {
    let Some(EncoderInputKind::Picture(picture)) = model.encoder.as_ref().map(|encoder| encoder.input) else {
        return Ok(ids);
    };
    let n_image = picture.patches();
    let n_leading = ids.iter().take_while(|&&id| id == picture.token).count();
    let n_all = ids.iter().filter(|&&id| id == picture.token).count();
    match (n_leading, n_all) {
        (0, 0) => Ok(ids),
        _ if n_leading == n_image && n_all == n_image => Ok(ids[n_image..].to_vec()),
        _ => Err(BadInput::new(format!(
            "the prompt has {n_all} image tokens ({}), {n_leading} of them in front; a picture is {n_image}",
            picture.token
        ))
        .hint(format!("begin with {n_image} image tokens, or leave them out"))),
    }
}

/// Checks that the model has a row for every id. A tokenizer may have more tokens than the model beside it.
pub fn check_vocabulary(ids: &[u32], are_typed: bool, model: &Model) -> Result<(), BadInput> {
    let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab) else { return Ok(()) };
    let message = format!("prompt id {id} is outside the vocabulary of {} tokens", model.vocab);
    Err(match are_typed {
        true => BadInput::new(message).hint(format!("ids go from 0 to {}", model.vocab.saturating_sub(1))),
        false => BadInput::new(format!("{message}: the tokenizer has tokens that the model has not"))
            .hint("take tokenizer and weights from the same model, or leave that token out of the text"),
    })
}

pub fn encode(tokenizer: &Tokenizer, text: &str, adds_special: bool) -> anyhow::Result<Vec<u32>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let encoding = tokenizer.encode(text, adds_special).map_err(|error| {
        BadInput::new(format!("the model's tokenizer cannot encode the prompt: {error}"))
            .hint("give exact ids with `--prompt-ids`, or a length with `--prompt-tokens`")
    })?;
    Ok(encoding.get_ids().to_vec())
}

fn no_tokenizer(case: &Case, words: Words) -> BadInput {
    let (model_id, why) = (&case.model.model_id, words.why_none());
    BadInput::new(format!("`{model_id}` has no tokenizer here, so a text prompt cannot become tokens{why}"))
        .hint("give a length with `--prompt-tokens N` or exact ids with `--prompt-ids 1,2,3`")
}

fn nothing_to_stream(case: &Case, words: Words) -> BadInput {
    let (model_id, why) = (&case.model.model_id, words.why_none());
    BadInput::new(format!("`--stream`: `{model_id}` has no tokenizer here, so its tokens have no text{why}"))
        .hint("drop `--stream`, or name a model with a tokenizer: a folder that has tokenizer.json, or a hub id")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Encoder, Picture, Plan};

    fn model() -> Model {
        Model {
            architecture: "llama",
            matrices: Vec::new(),
            vectors: Vec::new(),
            caches: Vec::new(),
            ropes: Vec::new(),
            biases: Vec::new(),
            encoder: None,
            decoder: empty_plan(),
            context: 64,
            vocab: 320,
            eos: vec![2],
            decoder_start: None,
        }
    }

    fn empty_plan() -> Plan {
        Plan { buffers: Vec::new(), ops: Vec::new() }
    }

    fn with_encoder(input: EncoderInputKind, decoder_start: Option<u32>) -> Model {
        Model { encoder: Some(Encoder { input, plan: empty_plan() }), decoder_start, ..model() }
    }

    fn case(prompt: PromptChoice, n_gen: usize, n_depth: usize) -> Case {
        Case { prompt, n_gen, n_depth, ..super::super::case::tests::case() }
    }

    #[test]
    fn without_a_tokenizer_there_are_eight_ids() {
        let found = workload(&case(PromptChoice::Default, 4, 3), Words::default(), &model()).unwrap();
        assert_eq!((found.n_prompt, found.task.prompt.len(), found.task.depth.len()), (8, 8, 3));
        assert_ne!(found.task.prompt[..3], found.task.depth[..]);
    }

    #[test]
    fn the_prompt_goes_to_the_side_that_reads_it() {
        let case = || case(PromptChoice::Ids(vec![7, 8]), 4, 0);
        let text = workload(&case(), Words::default(), &with_encoder(EncoderInputKind::Tokens, Some(3))).unwrap();
        assert_eq!((&text.task.encode, &text.task.prompt), (&Encode::Tokens(vec![7, 8]), &vec![3]));
        assert_eq!((text.n_prompt, text.n_image, text.n_encoder), (2, 0, 2));
        let picture = Picture { size: 4, patch: 2, token: 9 };
        let seen =
            workload(&case(), Words::default(), &with_encoder(EncoderInputKind::Picture(picture), None)).unwrap();
        assert_eq!(seen.task.prompt, [9, 9, 9, 9, 7, 8]);
        assert_eq!(seen.task.encode, Encode::Picture { image: None, pixels: None });
        assert_eq!((seen.n_prompt, seen.n_image, seen.n_encoder), (2, 4, 4));
        let whole = Case { prompt: PromptChoice::Ids(vec![9, 9, 9, 9, 7, 8]), ..case() };
        assert_eq!(
            workload(&whole, Words::default(), &with_encoder(EncoderInputKind::Picture(picture), None)).unwrap(),
            seen
        );
    }

    #[test]
    fn more_sequences_than_any_machine_holds_are_refused_before_their_ids_are_made() {
        for sequences in [1 << 24, usize::MAX] {
            let case = Case { sequences, ..case(PromptChoice::Default, 4, 0) };
            let error = workload(&case, Words::default(), &model()).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("`--batch-size {sequences}` of 12 tokens each is more than")),
                "{error}"
            );
        }
    }

    #[test]
    fn each_sequence_of_a_batch_has_ids_of_its_own() {
        let of = |prompt: PromptChoice, sequences, model: &Model| {
            workload(&Case { sequences, ..case(prompt, 4, 3) }, Words::default(), model).unwrap().task
        };
        let (one, three) = (of(PromptChoice::Default, 1, &model()), of(PromptChoice::Default, 3, &model()));
        assert_eq!((three.sequences, three.n_depth(), three.n_before(), three.capacity()), (3, 3, 11, 15));
        assert_eq!((&three.prompt[..8], &three.depth[..3]), (&one.prompt[..], &one.depth[..]), "the first is the same");
        let parts: Vec<&[u32]> = three.prompt.chunks(8).collect();
        assert!(parts[0] != parts[1] && parts[1] != parts[2] && parts[0] != parts[2]);
        assert!(three.depth[..3] != three.depth[3..6]);
        let typed = of(PromptChoice::Ids(vec![7, 8]), 2, &model());
        assert_eq!((typed.prompt.len(), &typed.prompt[..2]), (4, &[7, 8][..]));
        let no_depth = |prompt, model: &Model| {
            workload(&Case { sequences: 2, ..case(prompt, 4, 0) }, Words::default(), model).unwrap()
        };
        let text = no_depth(PromptChoice::Synthetic(5), &with_encoder(EncoderInputKind::Tokens, Some(3)));
        let Encode::Tokens(tokens) = &text.task.encode else { panic!("an encoder reads the prompt") };
        assert_eq!((tokens.len(), text.n_encoder, &text.task.prompt), (10, 5, &vec![3, 3]));
        assert_eq!(text.task.of_first(), (Encode::Tokens(tokens[..5].to_vec()), &[3][..]));
        let picture = Picture { size: 4, patch: 2, token: 9 };
        let seen = no_depth(PromptChoice::Ids(vec![7, 8]), &with_encoder(EncoderInputKind::Picture(picture), None));
        assert_eq!((seen.task.prompt.len(), &seen.task.prompt[6..10]), (12, &[9, 9, 9, 9][..]));
        assert_eq!((seen.n_prompt, seen.n_image, seen.n_encoder), (2, 4, 4));
    }

    #[test]
    fn bad_workloads_name_their_numbers() {
        let text = || PromptChoice::Text("hello".to_owned());
        for (prompt, n_gen, n_depth, expected) in [
            (PromptChoice::Ids(vec![]), 4, 0, "the prompt is empty"),
            (PromptChoice::Synthetic(0), 4, 0, "the prompt is empty"),
            (PromptChoice::Ids(vec![1]), 0, 0, "`--max-new-tokens 0`"),
            (PromptChoice::Ids(vec![1, 320]), 4, 0, "id 320 is outside the vocabulary of 320"),
            (
                PromptChoice::Synthetic(50),
                10,
                5,
                "depth 5 + prompt 50 + generated 10 are 65 tokens; the model's context holds 64",
            ),
            (PromptChoice::Synthetic(usize::MAX), 10, 5, "the model's context holds 64"),
            (text(), 4, 0, "has no tokenizer here"),
        ] {
            let error = workload(&case(prompt, n_gen, n_depth), Words::default(), &model()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.is::<BadInput>());
            assert!(crate::error::hint(&error).is_some());
        }
        let picture = EncoderInputKind::Picture(Picture { size: 4, patch: 2, token: 9 });
        let blind = Case { image: Some("cat.png".into()), ..case(PromptChoice::Default, 4, 0) };
        for (case, model, expected) in [
            (blind, model(), "`--image cat.png`: `llama` models read text only"),
            (
                case(PromptChoice::Ids(vec![9, 9, 7]), 4, 0),
                with_encoder(picture, None),
                "2 image tokens (9), 2 of them",
            ),
            (case(PromptChoice::Ids(vec![7, 9]), 4, 0), with_encoder(picture, None), "1 image tokens (9), 0 of them"),
            (case(PromptChoice::Synthetic(58), 4, 0), with_encoder(picture, None), "image 4 + prompt 58 + generated 4"),
        ] {
            let error = workload(&case, Words::default(), &model).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(crate::error::hint(&error).is_some());
        }
        assert!(workload(&case(PromptChoice::Synthetic(50), 9, 5), Words::default(), &model()).is_ok());
        let sides = with_encoder(EncoderInputKind::Tokens, Some(3));
        assert!(workload(&case(PromptChoice::Synthetic(64), 63, 0), Words::default(), &sides).is_ok());
        for (n_prompt, n_gen, n_depth) in [(65, 1, 0), (1, 64, 0), (1, 1, 1)] {
            assert!(
                workload(&case(PromptChoice::Synthetic(n_prompt), n_gen, n_depth), Words::default(), &sides).is_err()
            );
        }
    }
}
