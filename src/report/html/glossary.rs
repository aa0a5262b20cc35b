//! What the words of the page mean: a list at its end, and links to it from the heads of tables.

use super::line;

/// The head of a column, and what it means.
const TERMS: &[(&str, &str)] = &[
    (
        "precision",
        "how weights are stored and multiplied: fp16; int8 as LLM.int8 does; nf4, 4 bits a weight as bitsandbytes stores them",
    ),
    ("decode", "tokens after the first over the time from the first to the last, of all sequences"),
    ("per sequence", "decode speed over the sequences of the batch"),
    (
        "of matrix products",
        "operations a second of decoding over those of a large matrix product by the engine's own kernel, measured in the same run",
    ),
    ("speed-up", "decode speed over that of fp16: the median of repeats that ran in turn, where they did"),
    (
        "bytes ratio",
        "bytes that a decode step reads at fp16 over those that it reads at this precision: the speed-up if reading were all",
    ),
    ("of read bandwidth", "bytes a second that decoding reads over the read bandwidth measured in the same run"),
    (
        "bound by",
        "what holds decoding back, where it was measured: reading memory, arithmetic, both, the host, or nothing as all lies in the cache",
    ),
    ("peak", "highest memory of the run: weights, KV cache, scratch and what the process holds beside"),
    ("growth", "what the process grew by from just before it loaded to the most in the run"),
    ("weights", "weights in their stored formats"),
    ("TTFT", "time to first token: from the start of the prompt to the first token known on the host"),
    ("prefill", "tokens of the prompt over the time to the first token"),
    ("output", "generated tokens over the end-to-end time, the prompt included"),
    (
        "KL",
        "Kullback-Leibler divergence of the predictions from the reference's, mean over the tokens of a text; 0 is equal",
    ),
    ("throughput", "generated tokens over the end-to-end time of one cold run"),
    ("latency", "end-to-end time of one cold run"),
    ("per token", "end-to-end time of one cold run over its generated tokens"),
    ("top-1", "tokens at which the precision and the reference expect the same token most"),
    ("perplexity", "exp of the mean negative log likelihood of a text; over that of fp16 where the unit says so"),
    ("memory alone", "time to read what a decode step reads, without arithmetic, over the time of the step"),
    ("arithmetic alone", "time of a decode step whose matrices stay in the cache over the time of the step"),
    ("end to end", "end-to-end time over generated tokens"),
    ("energy", "joules above those of the idle machine over the tokens generated meanwhile"),
    ("start", "memory after loading and warm-up"),
    ("end", "memory after the run"),
    ("ITL p50", "inter-token latency: time of a decode step, the median"),
    ("ITL p95", "inter-token latency: time of a decode step, exceeded by 5 % of them"),
    ("ITL p99", "inter-token latency: time of a decode step, exceeded by 1 % of them"),
    ("load", "from the first byte read until the weights are usable"),
    ("prefill speed", "tokens of the prompt over the time to the first token"),
    ("output speed", "generated tokens over the end-to-end time, the prompt included"),
    ("outliers", "columns that LLM.int8 kept in fp16, per linear call"),
    ("cold run", "end-to-end time of the first run after loading"),
    ("KL p50", "the divergence of the median token"),
    ("KL p99", "the divergence that 1 % of the tokens exceed"),
    ("logit error", "the largest difference of a logit from the reference's"),
    ("host", "time between two decode steps that the host of another engine spends outside its model"),
    (
        "KL to quantbench",
        "divergence from what quantbench's row predicts behind the ids that it wrote, mean of the steps",
    ),
    ("top-1 of quantbench", "steps at which the row and quantbench's expect the same token most"),
    (
        "change",
        "of a later run against the first, with the 95 % interval widened by what two starts of one build differ",
    ),
    ("run", "what was measured together: one command at one time"),
];

/// Finds the term of a column's head.
pub fn meaning(name: &str) -> Option<&'static str> {
    TERMS.iter().find(|(term, _)| *term == name).map(|(_, meaning)| *meaning)
}

/// The name as a link to its meaning, which shows under a pointer too.
pub fn link(name: &str) -> String {
    match meaning(name) {
        Some(meaning) => {
            format!("<a class=\"term\" href=\"#{}\" title=\"{}\">{}</a>", id(name), line(meaning), words(name))
        }
        None => line(name),
    }
}

/// A head may break between its words, and not at a hyphen.
fn words(name: &str) -> String {
    let word = |word: &str| if word.contains('-') { format!("<span>{}</span>", line(word)) } else { line(word) };
    name.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

fn id(name: &str) -> String {
    format!("term-{}", name.replace(' ', "-"))
}

/// The terms that `body` links to.
pub fn glossary(body: &str) -> String {
    let is_used = |(name, _): &&(&str, &str)| body.contains(&format!("href=\"#{}\"", id(name)));
    let entry = |(name, meaning): &(&str, &str)| {
        format!("<dt id=\"{}\">{}</dt><dd>{}</dd>\n", id(name), line(name), line(meaning))
    };
    let entries: String = TERMS.iter().filter(is_used).map(entry).collect();
    match entries.is_empty() {
        true => entries,
        false => format!("<section id=\"terms\">\n<h2>Terms</h2>\n<dl>\n{entries}</dl>\n</section>\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::columns::COLUMNS;

    #[test]
    fn every_column_has_a_meaning() {
        for column in COLUMNS {
            assert!(meaning(column.name).is_some(), "{}", column.name);
        }
    }

    #[test]
    fn only_linked_terms_stand_in_the_list() {
        let listed = glossary(&link("ITL p95"));
        assert!(listed.contains("id=\"term-ITL-p95\"") && listed.matches("<dt").count() == 1, "{listed}");
        assert_eq!(glossary(&link("of nothing")), "");
    }
}
