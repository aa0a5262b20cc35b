//! What a measured bandwidth allows for models that were not run.

use super::Terminal;
use super::case::{GIB, plain};
use super::grid::{self, Line, wrap};

/// A model by name, and the bytes of each precision.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelBytes {
    pub name: String,
    pub precisions: Vec<PrecisionBytes>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PrecisionBytes {
    pub precision: String,
    /// Weight bytes that one decode step must read.
    pub bytes_per_token: u64,
    pub weights_bytes: u64,
}

/// A block that says, for each model and precision, how many tokens/s `read_gb_s` (1e9 bytes/s, measured) allows at most
/// and how many GiB the weights take; it ends with the command to type next. Never part of a record.
pub fn limits(read_gb_s: f64, models: &[ModelBytes], next_command: &str, terminal: &Terminal) -> String {
    let precisions = precisions(models);
    let pair = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
    let names = precisions.iter().flat_map(|p| pair(&plain(p), ""));
    let units = precisions.iter().flat_map(|_| pair("tokens/s", "GiB"));
    let header = |first: &str, cells: &mut dyn Iterator<Item = String>| {
        Line::Cells(std::iter::once(first.to_owned()).chain(cells).collect())
    };
    let mut lines = vec![header("limit", &mut names.into_iter()), header("not measured", &mut units.into_iter())];
    lines.extend(models.iter().map(|model| {
        let cells = precisions.iter().flat_map(|precision| cells(model, precision, read_gb_s));
        Line::Cells(std::iter::once(plain(&model.name)).chain(cells).collect())
    }));
    let head = format!(
        "What {read_gb_s:.1} GB/s of read bandwidth allows at batch 1 (limit, not measured; weights alone, no KV cache):"
    );
    let (head, grid) = (wrap(&head, terminal.columns, 2), grid::folded(&lines, terminal.columns, 1));
    format!("{head}\n\n{grid}\nMeasure one of them with:\n  {next_command}\n")
}

/// In order of first mention.
fn precisions(models: &[ModelBytes]) -> Vec<&str> {
    let mut precisions: Vec<&str> = Vec::new();
    for bytes in models.iter().flat_map(|model| &model.precisions) {
        if !precisions.contains(&bytes.precision.as_str()) {
            precisions.push(&bytes.precision);
        }
    }
    precisions
}

fn cells(model: &ModelBytes, precision: &str, read_gb_s: f64) -> [String; 2] {
    match model.precisions.iter().find(|bytes| bytes.precision == precision) {
        Some(bytes) if bytes.bytes_per_token > 0 && read_gb_s.is_finite() => {
            let tokens_per_s = read_gb_s * 1e9 / bytes.bytes_per_token as f64;
            [format!("{tokens_per_s:.1}"), format!("{:.2}", bytes.weights_bytes as f64 / GIB)]
        }
        _ => ["-".into(), "-".into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, precisions: &[(&str, u64, u64)]) -> ModelBytes {
        let bytes = |&(precision, bytes_per_token, weights_bytes): &(&str, u64, u64)| PrecisionBytes {
            precision: precision.into(),
            bytes_per_token,
            weights_bytes,
        };
        ModelBytes { name: name.into(), precisions: precisions.iter().map(bytes).collect() }
    }

    #[test]
    fn a_block_of_limits() {
        let models = [
            model("small", &[("fp16", 1_000_000_000, 1 << 30), ("nf4", 400_000_000, 1 << 29)]),
            model("large", &[("fp16", 10_000_000_000, 10 << 30)]),
        ];
        let expected = "\
What 20.0 GB/s of read bandwidth allows at batch 1 (limit, not measured; weights alone, no KV cache):

limit             fp16              nf4
not measured  tokens/s    GiB  tokens/s   GiB
small             20.0   1.00      50.0  0.50
large              2.0  10.00         -     -

Measure one of them with:
  quantbench --model-id large
";
        assert_eq!(limits(20.0, &models, "quantbench --model-id large", &Terminal::default()), expected);
    }
}
