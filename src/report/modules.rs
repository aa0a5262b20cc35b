//! The parts of a model by what quantizing them costs, below the table of a case.

use super::Terminal;
use super::case::{Case, plain};
use super::grid::{self, Line, wrap_lines};
use crate::record::{ModuleQuality, Record};

const MIB: f64 = (1u64 << 20) as f64;

/// A table for each precision that was measured by module, empty where none was.
pub fn tables(case: &Case, terminal: &Terminal) -> String {
    case.rows().filter_map(|(run, record)| table(&case.label(run, record), record, terminal)).collect()
}

fn table(label: &str, record: &Record, terminal: &Terminal) -> Option<String> {
    let quality = record.quality.as_ref().filter(|quality| !quality.modules.is_empty())?;
    let outliers = quality.modules.iter().any(|module| module.outlier_share.is_some());
    let head = |names: &[&str]| {
        Line::Cells(names[..names.len() - usize::from(!outliers)].iter().map(|n| n.to_string()).collect())
    };
    let mut lines = vec![
        head(&["only this quantized", "KL", "top-1", "saves", "outliers"]),
        head(&["", "nats/token", "%", "MiB", "% of columns"]),
    ];
    lines.extend(quality.modules.iter().map(|module| line(module, outliers)));
    let suggestion = match quality.suggested_keep_fp16.as_slice() {
        [] => "no layer stands out, so none is worth keeping in fp16".to_owned(),
        layers => format!("layers that stand out: --keep-fp16 {}", layers.join(",")),
    };
    let stays = |module: &ModuleQuality| ["head", "embeddings"].contains(&module.module.as_str());
    let note = match quality.modules.iter().any(stays) {
        true => "\nno precision quantizes the head or the embeddings: their rows say what that would cost",
        false => "",
    };
    let grid = grid::folded(&lines, terminal.columns, 1);
    let below = wrap_lines(&format!("{suggestion}{note}"), terminal.columns, 2);
    Some(plain_lines(&format!("\n{label} by module\n\n{grid}\n{below}")))
}

fn line(module: &ModuleQuality, outliers: bool) -> Line {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let kl = match (module.kl_mean, module.kl_mean_half_width) {
        (Some(kl), Some(half)) => Some(format!("{kl:.5} [{:.5}, {:.5}]", kl - half, kl + half)),
        (kl, _) => kl.map(|kl| format!("{kl:.5}")),
    };
    let percent =
        |share: Option<f64>, decimals: usize| or_dash(share.map(|share| format!("{:.decimals$}", 100.0 * share)));
    let mut cells = vec![
        plain(&module.module),
        or_dash(kl),
        percent(module.top1_agreement, 1),
        format!("{:.1}", module.saved_bytes as f64 / MIB),
    ];
    if outliers {
        cells.push(percent(module.outlier_share, 2));
    }
    Line::Cells(cells)
}

/// Each line on its own: what stands between them is ours.
fn plain_lines(text: &str) -> String {
    text.lines().map(|line| plain(line) + "\n").collect()
}
