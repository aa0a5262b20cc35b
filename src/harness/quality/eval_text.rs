//! The text that quality is measured on, as the ids that every precision is scored on.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::engine::Engine;
use crate::error::BadInput;
use crate::harness::case::{Case, QualityChoice, Variant};
use crate::harness::load::{DeviceAssignment, LoadRequest, OwnOptions};
use crate::harness::open_model::OpenModel;
use crate::harness::prompt::{self, TokenizedWorkload};
use crate::harness::room;
use crate::harness::schedule::WorkerHandle;
use crate::harness::task::Task;
use crate::harness::worker_process::ProcessWorker;
use crate::ipc::failure_of;
use crate::plan::{EncoderInputKind, Model};
use crate::protocol::{Encode, Failure, RunRequest, Score};
use crate::quality::windows::{self, TextWindow};
use crate::quality::{CallPath, rows, text};
use crate::quant::FormatId;
use crate::weights::policy::Selection;
use crate::weights::{Checkpoint, SourceKind};

/// Greedy decoding generates this many tokens after a quarter of them, where the text is long enough.
const GREEDY_TOKENS: usize = 64;

/// Fails with [`BadInput`] where the quality of a checkpoint cannot be measured. `tokenizer_comes`: one is still to be downloaded.
pub fn check(checkpoint: &Checkpoint, tokenizer_comes: bool) -> Result<(), BadInput> {
    let refused =
        |reason: String, hint: &str| Err(BadInput::new(format!("no quality can be measured: {reason}")).hint(hint));
    if checkpoint.source_kind() == SourceKind::Random {
        return refused(
            "it needs trained weights, and these are random".to_owned(),
            "name a folder or a hub id with `--model-id`",
        );
    }
    if let Some(quantized) = &checkpoint.quantized {
        let reason =
            format!("the weights were saved in `{}`, and what they were made from is not here", quantized.precision);
        return refused(reason, "name the model that they were made from with `--model-id`");
    }
    if checkpoint.tokenizer.is_none() && !tokenizer_comes {
        let reason = format!("`{}` has no tokenizer here, so a text cannot become tokens", checkpoint.id);
        return refused(reason, "put tokenizer.json beside the weights");
    }
    Ok(())
}

/// Lengths of greedy decoding behind the window's first tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greedy {
    pub n_prompt: usize,
    /// 0: none.
    pub n_gen: usize,
}

/// A tokenized text and its windows.
pub struct EvalText {
    pub name: String,
    encode: Encode,
    n_encoder: usize,
    prefix: Vec<u32>,
    tokens: Vec<u32>,
    pub windows: Vec<TextWindow>,
    pub greedy: Greedy,
}

impl EvalText {
    /// The ids of the text, cut to windows that the context and the bound of the reference's file allow. Fails where they
    /// hold no token to score, and as [`check`] does.
    pub fn new(choice: &QualityChoice, opened: &OpenModel, workload: &TokenizedWorkload) -> Result<Self> {
        let (model, checkpoint) = (&opened.model, &opened.checkpoint);
        check(checkpoint, false)?;
        let tokenizer = checkpoint.tokenizer.as_ref().context("a tokenizer, which was checked for")?;
        let sample = || (text::SAMPLE_NAME.to_owned(), text::SAMPLE.to_owned());
        let (name, text) = choice.text.clone().unwrap_or_else(sample);
        let input = model.encoder.as_ref().map(|encoder| encoder.input);
        // A caption goes on where the prompt ends.
        let adds_special = !matches!(input, Some(EncoderInputKind::Picture(_)));
        let mut tokens = prompt::encode(tokenizer, &text, adds_special)?;
        tokens.truncate(choice.n_tokens);
        prompt::check_vocabulary(&tokens, false, model)?;
        let prefix = match input {
            Some(EncoderInputKind::Picture(_)) => workload.task.of_first().1.to_vec(),
            Some(EncoderInputKind::Tokens) => {
                tokens.insert(0, model.decoder_start.unwrap_or(0));
                Vec::new()
            }
            None => Vec::new(),
        };
        let room = model.context.saturating_sub(prefix.len());
        let length = windows::MAX_LENGTH.min(rows::max_rows(model.vocab)).min(room);
        let windows = if length < 2 { Vec::new() } else { windows::windows(tokens.len(), length, !prefix.is_empty()) };
        if windows.is_empty() {
            let message = format!("the text `{name}` has {} tokens, and a context of {room} is left", tokens.len());
            return Err(BadInput::new(message).hint("at least 2 tokens are needed").into());
        }
        let longest = windows[0].end;
        let n_prompt = longest.min(GREEDY_TOKENS / 4);
        let greedy = Greedy { n_prompt, n_gen: (length - n_prompt).min(GREEDY_TOKENS) };
        let (encode, n_encoder) = (workload.task.of_first().0, workload.n_encoder);
        Ok(Self { name, encode, n_encoder, prefix, tokens, windows, greedy })
    }

    /// The request to score the window of index `at`.
    pub fn score(&self, at: usize, path: CallPath, file: PathBuf) -> Score {
        let TextWindow { start, first, end } = self.windows[at];
        Score {
            encode: self.encode.clone(),
            prefix: self.prefix.clone(),
            tokens: self.tokens[start..end].to_vec(),
            first: first - start,
            by_token: path == CallPath::Decode,
            file,
        }
    }

    /// Greedy decoding behind the first tokens of the first window, to find where it departs from the reference's; `None` behind the
    /// others, and where the text is too short.
    pub fn greedy_run(&self, at: usize) -> Option<RunRequest> {
        let Greedy { n_prompt, n_gen } = self.greedy;
        let start = self.windows[at].start;
        (at == 0 && n_gen > 0).then(|| RunRequest {
            depth: self.prefix.clone(),
            encode: self.encode.clone(),
            prompt: self.tokens[start..start + n_prompt].to_vec(),
            n_gen,
            ..RunRequest::default()
        })
    }

    /// Tokens of the longest window, or of greedy decoding.
    fn longest(&self) -> usize {
        self.windows[0].end.max(self.greedy.n_prompt + self.greedy.n_gen)
    }

    /// A task of the length that a cache must hold.
    pub fn task(&self) -> Task {
        let (encode, prompt) = (self.encode.clone(), vec![0; self.prefix.len() + self.longest()]);
        Task { encode, prompt, n_gen: 1, ..Task::default() }
    }

    /// A loaded worker of our own engines whose cache holds the longest window.
    pub fn worker(
        &self,
        (case, model): (&Case, &Model),
        (engine, precision): (Engine, FormatId),
        assignment: DeviceAssignment,
        selection: Selection,
    ) -> Result<ProcessWorker, Failure> {
        let (task, n_prompt, n_encoder) = (self.task(), self.longest(), self.n_encoder);
        let workload = TokenizedWorkload { task, n_prompt, n_image: 0, n_encoder, longest_given: None };
        let mut selected = model.clone();
        // Patterns were checked when the model was opened.
        let _ = selection.apply(&mut selected.matrices);
        let variant = Variant::Own { engine, precision };
        let needed_bytes = room::needs(case, &variant, (&selected, &workload), assignment.device)
            .map_err(|error| failure_of(&error))?
            .bytes();
        let plain = workload.load_request(case, (engine, precision), assignment);
        let request = LoadRequest { options: OwnOptions { selection, ..plain.options }, ..plain };
        let mut worker = ProcessWorker::new(request, needed_bytes, case.protocol.deadline)?;
        worker.load(&crate::events::Silent)?;
        Ok(worker)
    }
}
