//! What a gate is and how it is written: `decode_tps:-5%`, `kl_mean:+0.002`, `weights_bytes`.

use crate::error::{BadInput, nearest};
use crate::record::metrics::{self, Better, METRICS, Metric};

/// The gates of a comparison that names none. Those without a value on either side are left out.
pub const DEFAULT_GATES: &str = "decode_tps:-5%,peak_bytes:+3%";

/// Numbers that follow from `decode_tps` or from the machine and have no interval of their own.
const WITHOUT_INTERVAL: &[&str] =
    &["mbu", "achieved_gb_s", "read_gb_s", "copy_gb_s", "achieved_gflop_s", "matmul_gflop_s", "mfu"];

/// One thing that must not get worse.
#[derive(Clone)]
pub struct Gate {
    /// As it was typed.
    pub text: String,
    pub key: Key,
    pub limit: Limit,
}

#[derive(Clone, Copy)]
pub enum Key {
    Metric(&'static Metric),
    /// Hash of the weights.
    WeightsHash,
    /// Ids of the generated tokens: the same at the same instruction set and engine commit.
    TokenIds,
}

/// How far a number may go, in the direction that is worse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Not at all, in either direction.
    Exact,
    /// A share of the base; 0.95 of it is −0.05.
    Relative(f64),
    /// In the metric's unit.
    Absolute(f64),
}

/// What a gate's decision rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The same or not: nothing about it is measured.
    Exact,
    /// A number that hardly varies from run to run; it decides by itself.
    Tight,
    /// A ratio of repeats that ran in turn in one run; its interval decides.
    Ratio,
    /// A time or a speed; its interval decides.
    Time,
}

impl Gate {
    pub fn kind(&self) -> Kind {
        match self.key {
            _ if self.limit == Limit::Exact => Kind::Exact,
            Key::Metric(metric) if metric.key == "speedup_vs_fp16" => Kind::Ratio,
            Key::Metric(metric) if metric.values.is_some() => Kind::Time,
            _ => Kind::Tight,
        }
    }

    /// Its metric, if the gate is on a number.
    pub fn metric(&self) -> Option<&'static Metric> {
        match self.key {
            Key::Metric(metric) => Some(metric),
            Key::WeightsHash | Key::TokenIds => None,
        }
    }

    /// As records and tables spell it.
    pub fn name(&self) -> &'static str {
        match self.key {
            Key::Metric(metric) => metric.key,
            Key::WeightsHash => "weights.hash",
            Key::TokenIds => "token_ids",
        }
    }
}

/// Gates from a list with commas. Fails on a key that no gate has, and on a limit that is no number or points to where the
/// metric gets better.
pub fn gates(list: &str) -> Result<Vec<Gate>, BadInput> {
    list.split(',').map(|text| gate(text.trim())).collect()
}

fn gate(text: &str) -> Result<Gate, BadInput> {
    let (name, limit_text) = match text.split_once(':') {
        Some((name, limit)) => (name.trim(), Some(limit.trim())),
        None => (text, None),
    };
    let key = key(name)?;
    let limit = limit_text.map_or(Ok(Limit::Exact), |limit| self::limit(text, limit))?;
    check(text, key, limit)?;
    Ok(Gate { text: text.to_owned(), key, limit })
}

fn key(name: &str) -> Result<Key, BadInput> {
    match name {
        "weights.hash" | "weights_hash" => return Ok(Key::WeightsHash),
        "token_ids" => return Ok(Key::TokenIds),
        _ => {}
    }
    if let Some(metric) = metrics::find(name) {
        return match WITHOUT_INTERVAL.contains(&name) {
            true => Err(BadInput::new(format!("no gate on `{name}`: it has no interval of its own"))
                .hint("gate on `decode_tps`, which it follows from")),
            false => Ok(Key::Metric(metric)),
        };
    }
    let error = BadInput::new(format!("unknown metric `{name}` in a gate"));
    Err(match meant(name) {
        Some(meant) => error.hint(format!("the nearest is `{meant}`; docs/metrics.md lists all")),
        None => error.hint("docs/metrics.md lists all metrics"),
    })
}

/// Words of a metric's name as people and other tools have it, and the key here.
const MEANINGS: &[(&[&str], &str)] = &[
    (&["prefill", "prompt", "pp"], "prefill_tps"),
    (&["tps", "tok", "toks", "throughput", "speed", "decode", "tg", "eval", "bandwidth", "mbu"], "decode_tps"),
    (&["ttft", "first"], "ttft_ms"),
    (&["tpot"], "tpot_ms"),
    (&["itl", "inter"], "itl_ms"),
    (&["latency", "duration", "time", "seconds"], "latency_s"),
    (&["memory", "mem", "ram", "rss", "vram", "peak"], "peak_bytes"),
    (&["size", "weights"], "weights_bytes"),
    (&["ppl", "perplexity"], "perplexity_ratio"),
    (&["kl", "kld", "divergence", "quality"], "kl_mean"),
    (&["accuracy", "agreement", "top1"], "top1_agreement"),
    (&["energy", "joules", "power", "watts"], "joules_per_token"),
    (&["load", "loading", "startup"], "load_s"),
    (&["speedup", "ratio"], "speedup_vs_fp16"),
    (&["hash", "sha", "checksum"], "weights.hash"),
    (&["tokens", "output", "text", "ids"], "token_ids"),
];

/// The key that is spelled nearly so, else the one that a word of the name means.
fn meant(name: &str) -> Option<&'static str> {
    let known = METRICS.iter().map(|metric| metric.key).chain(["weights.hash", "token_ids"]);
    let name = name.to_lowercase();
    let words: Vec<&str> = name.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let by_word = || MEANINGS.iter().find(|(meanings, _)| words.iter().any(|word| meanings.contains(word)));
    nearest(&name, known).or_else(|| by_word().map(|(_, key)| *key))
}

fn limit(gate: &str, text: &str) -> Result<Limit, BadInput> {
    let (number, is_share) = match text.strip_suffix('%') {
        Some(number) => (number.trim(), true),
        None => (text, false),
    };
    match number.parse::<f64>() {
        Ok(x) if x.is_finite() => Ok(if is_share { Limit::Relative(x / 100.0) } else { Limit::Absolute(x) }),
        _ => Err(BadInput::new(format!("gate `{gate}`: `{text}` is no limit"))
            .hint("a limit is a share such as `-5%`, or a number in the metric's unit such as `+0.002`")),
    }
}

fn check(text: &str, key: Key, limit: Limit) -> Result<(), BadInput> {
    let metric = match (key, limit) {
        (Key::Metric(metric), _) => metric,
        (_, Limit::Exact) => return Ok(()),
        _ => return Err(BadInput::new(format!("gate `{text}`: this is the same or not and takes no limit"))),
    };
    let wrong = |why: &str, hint: String| Err(BadInput::new(format!("gate `{text}`: {why}")).hint(hint));
    match (limit, metric.better) {
        (Limit::Exact, _) if metric.values.is_some() || metric.key == "speedup_vs_fp16" => {
            let sign = if metric.better == Better::Higher { '-' } else { '+' };
            wrong("what is timed is never twice the same", format!("give a limit, such as `{}:{sign}5%`", metric.key))
        }
        (Limit::Relative(x) | Limit::Absolute(x), Better::Higher) if x > 0.0 => {
            wrong("higher is better, so the limit is negative", format!("`{}:-5%` allows 5 % less", metric.key))
        }
        (Limit::Relative(x) | Limit::Absolute(x), Better::Lower) if x < 0.0 => {
            wrong("lower is better, so the limit is positive", format!("`{}:+3%` allows 3 % more", metric.key))
        }
        (Limit::Relative(x), _) if x <= -1.0 => wrong("it allows everything", "a share lies above -100%".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_what_people_call_it() {
        assert!(MEANINGS.iter().all(|(_, key)| super::key(key).is_ok() || metrics::find(key).is_some()));
        for (name, meant) in [
            ("decode_tsp", Some("decode_tps")),
            ("throughput", Some("decode_tps")),
            ("tok/s", Some("decode_tps")),
            ("prefill_speed", Some("prefill_tps")),
            ("memory", Some("peak_bytes")),
            ("vram_gb", Some("peak_bytes")),
            ("ppl", Some("perplexity_ratio")),
            ("TTFT", Some("ttft_ms")),
            ("foo", None),
        ] {
            assert_eq!(super::meant(name), meant, "{name}");
        }
    }

    #[test]
    fn gates_are_read() {
        let read =
            gates("decode_tps:-5%, peak_bytes:+3% ,kl_mean:+0.002,weights_bytes,weights.hash,token_ids").unwrap();
        let seen: Vec<_> = read.iter().map(|gate| (gate.name(), gate.kind(), gate.limit)).collect();
        let expected = [
            ("decode_tps", Kind::Time, Limit::Relative(-0.05)),
            ("peak_bytes", Kind::Tight, Limit::Relative(0.03)),
            ("kl_mean", Kind::Tight, Limit::Absolute(0.002)),
            ("weights_bytes", Kind::Exact, Limit::Exact),
            ("weights.hash", Kind::Exact, Limit::Exact),
            ("token_ids", Kind::Exact, Limit::Exact),
        ];
        assert_eq!(seen, expected);
        assert_eq!(gates("speedup_vs_fp16:-5%").unwrap()[0].kind(), Kind::Ratio);
        assert_eq!(gates(DEFAULT_GATES).unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_gate_is_refused() {
        for (text, word) in [
            ("", "unknown metric"),
            ("decode_tps:-5%,", "unknown metric"),
            ("decode_tp:-5%", "`decode_tps`"),
            ("decode_tps", "never twice the same"),
            ("decode_tps:", "no limit"),
            ("decode_tps:five", "no limit"),
            ("decode_tps:NaN%", "no limit"),
            ("decode_tps:5%", "negative"),
            ("decode_tps:-100%", "everything"),
            ("peak_bytes:-3%", "positive"),
            ("token_ids:+1", "no limit"),
            ("mbu:-5%", "no interval"),
        ] {
            let error = gates(text).err().expect(text);
            let said = format!("{error} {}", error.hint_text().unwrap_or_default());
            assert!(said.contains(word), "{text}: {said}");
        }
    }
}
