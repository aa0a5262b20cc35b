//! What each precision changes of the predictions, in words.

use super::list;
use crate::record::Record;

/// Of every precision that it was measured for; fp16 is what the others are held against, and has its own words where it is alone.
pub fn cost(ok: &[&Record]) -> String {
    let shown = ok.iter().filter(|record| !record.is_fp16() || ok.len() == 1);
    list(shown.filter_map(|record| one(record)))
}

fn one(record: &Record) -> Option<String> {
    let quality = record.quality.as_ref()?;
    let agreement = 100.0 * quality.top1_agreement;
    let perplexity = if record.is_fp16() { String::new() } else { perplexity(record) };
    Some(format!("{} agrees with the fp32 reference on {agreement:.1} % of next tokens{perplexity}", record.precision))
}

/// A perplexity whose interval includes fp16's is marked so.
fn perplexity(record: &Record) -> String {
    let Some(quality) = &record.quality else { return String::new() };
    let interval = quality.perplexity_ratio_ci95_low.zip(quality.perplexity_ratio_ci95_high);
    match (quality.perplexity_ratio, interval) {
        (Some(ratio), Some((low, high))) if low > 1.0 || high < 1.0 => {
            format!(" and has {ratio:.3}x fp16's perplexity [{low:.3}, {high:.3}]")
        }
        (Some(_), Some((low, high))) => {
            format!(", can't tell its perplexity from fp16's: {low:.3}x to {high:.3}x")
        }
        (Some(ratio), None) => format!(" and has {ratio:.3}x fp16's perplexity, without an interval"),
        (None, _) => String::new(),
    }
}
