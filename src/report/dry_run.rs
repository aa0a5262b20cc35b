//! What a run would do: for people, or as JSON. Nothing was measured.

use serde::Serialize;

use super::Terminal;
use super::case::{self, GIB, plain};
use super::grid::{self, Line};
use crate::record::Workload;

#[derive(Debug, Clone, Serialize)]
pub struct DryRun {
    /// Hub id, built-in name, or the last component of a folder.
    pub model: String,
    /// Commit on the hub.
    pub revision: Option<String>,
    pub architecture: String,
    pub parameters: u64,
    /// `hub`, `local` or `random`.
    pub weights: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    pub threads: usize,
    pub workload: Workload,
    /// True where the tokenizer is still to be downloaded: a prompt has no more tokens than bytes.
    pub n_prompt_is_a_bound: bool,
    /// `interleaved` or `in_turn`.
    pub order: String,
    /// When the repeats of one precision end.
    pub repeats: String,
    /// The run may take half or twice as long, without downloads and quality.
    pub seconds: Option<f64>,
    /// The same in words.
    pub takes: String,
    /// Files of the hub; empty for what needs none.
    pub files: Vec<File>,
    /// Bytes of the files that the cache lacks, as far as the hub reports them.
    pub download_bytes: u64,
    pub rows: Vec<WorkerRow>,
    /// What quality will be measured on, where it was asked for.
    pub quality: Option<String>,
    /// Memory of the card that the user named.
    pub card_bytes: Option<u64>,
    /// All memory of the machine or the GPU, used or not; `None` where unknown.
    pub free_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct File {
    pub name: String,
    pub bytes: Option<u64>,
    pub is_cached: bool,
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkerRow {
    pub engine: String,
    pub precision: String,
    pub weights_bytes: u64,
    pub kv_cache_bytes: u64,
    /// Activations of the longest call.
    pub scratch_bytes: u64,
    /// What a process takes of a GPU beside that; 0 on the CPU.
    pub context_bytes: u64,
    /// Here; `None` where the free memory is unknown.
    pub fits: Option<bool>,
    /// The card that the user named; `None` where none was.
    pub fits_card: Option<bool>,
}

impl WorkerRow {
    pub fn bytes(&self) -> u64 {
        let parts = [self.weights_bytes, self.kv_cache_bytes, self.scratch_bytes, self.context_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

impl DryRun {
    /// Says of each row whether it fits a card of so many bytes.
    pub fn hold_to(&mut self, card_bytes: Option<u64>) {
        self.card_bytes = card_bytes;
        self.rows.iter_mut().for_each(|row| row.fits_card = card_bytes.map(|card_bytes| row.bytes() <= card_bytes));
    }

    pub fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    pub fn text(&self, terminal: &Terminal) -> String {
        let million = self.parameters as f64 / 1e6;
        let random = if self.weights == "random" { ", random weights" } else { "" };
        let threads = if self.device == "cpu" { format!(", {} threads", self.threads) } else { String::new() };
        let bound = if self.n_prompt_is_a_bound { " (at most: the tokenizer is not here yet)" } else { "" };
        let order = if self.order == "interleaved" { "in turn, repeat by repeat" } else { "one after the other" };
        let title = format!(
            "would run {} ({}, {million:.1} M parameters{random}) on {}{threads}",
            self.model, self.architecture, self.device
        );
        let lengths = format!("{}{bound}; workers {order}: {}", case::workload(&self.workload), self.repeats);
        let takes = format!("{lengths}\nit takes {}", self.takes);
        let quality =
            self.quality.as_ref().map(|text| plain(&format!("then the quality of each precision over {text}")) + "\n");
        let head = format!(
            "{}\n{}\n{}",
            plain(&title),
            takes.lines().map(plain).collect::<Vec<_>>().join("\n"),
            quality.unwrap_or_default()
        );
        let head = grid::wrap_lines(&head, terminal.columns, 2);
        format!("{head}\n{}\n{}", self.downloads(terminal), self.fit(terminal))
    }

    fn downloads(&self, terminal: &Terminal) -> String {
        let missing: Vec<_> = self.files.iter().filter(|file| !file.is_cached).collect();
        match (self.weights.as_str(), missing.as_slice()) {
            (_, []) if !self.files.is_empty() => "no download: the cache has every file\n".to_owned(),
            ("random", []) => "no download: random weights\n".to_owned(),
            (_, []) => "no download: local files\n".to_owned(),
            (_, missing) => {
                let line =
                    |file: &&File| Line::Cells(vec![format!("  {}", plain(&file.name)), mib(file.bytes), "MiB".into()]);
                let lines: Vec<_> = missing.iter().map(line).collect();
                format!(
                    "download {} MiB:\n{}",
                    mib(Some(self.download_bytes)),
                    grid::folded(&lines, terminal.columns, 1)
                )
            }
        }
    }

    fn fit(&self, terminal: &Terminal) -> String {
        let on_gpu = self.rows.iter().any(|row| row.context_bytes > 0);
        let card = self.card_bytes.map(|bytes| format!("{:.2} GiB", bytes as f64 / GIB));
        let columns = |texts: [&str; 7], card: Option<&str>| {
            let shown = texts.into_iter().enumerate().filter(|(at, _)| on_gpu || *at != CONTEXT_COLUMN);
            Line::Cells(shown.map(|(_, text)| text).chain(card).map(str::to_owned).collect())
        };
        let mut lines = vec![
            columns(
                ["precision", "weights", "cache", "activations", "context", "together", "fits"],
                card.as_deref().map(|_| "fits a card"),
            ),
            columns(["", "GiB", "GiB", "GiB", "GiB", "GiB", "here"], card.as_deref()),
        ];
        let gib = |bytes: u64| format!("{:.3}", bytes as f64 / GIB);
        lines.extend(self.rows.iter().map(|row| {
            let engine = if row.engine == case::OWN { String::new() } else { format!(" by {}", row.engine) };
            let word = |fits: bool| if fits { "yes" } else { "no" };
            let fits = row.fits.map_or("unknown", word);
            let name = plain(&format!("{}{engine}", row.precision));
            let parts = [row.weights_bytes, row.kv_cache_bytes, row.scratch_bytes, row.context_bytes, row.bytes()];
            let [weights, cache, scratch, context, together] = parts.map(gib);
            columns([&name, &weights, &cache, &scratch, &context, &together, fits], row.fits_card.map(word))
        }));
        let (place, of) = if self.device == "cpu" { ("memory", "") } else { ("the device's memory", " the") };
        let free = match (self.free_bytes, self.total_bytes) {
            (None, _) => "the free memory is unknown".to_owned(),
            (Some(free), Some(total)) => format!("{} of{of} {} GiB of {place} are free", gib(free), gib(total)),
            (Some(free), None) => format!("{} GiB of {place} are free", gib(free)),
        };
        let free = grid::wrap_lines(&free, terminal.columns, 2);
        grid::folded(&lines, terminal.columns, 1) + &free
    }
}

/// Of the table, on a GPU alone.
const CONTEXT_COLUMN: usize = 4;

fn mib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / (1 << 20) as f64))
}
