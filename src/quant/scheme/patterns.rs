//! Lists of modules that a method leaves alone, or chooses, in the spellings of its users.

use anyhow::Result;
use fancy_regex::{Regex, RegexBuilder};

use super::not_read;

/// Steps of a match at most: a pattern is a stranger's.
const MOST_STEPS: usize = 100_000;
/// A longer pattern is none.
const MOST_CHARS: usize = 4096;

/// Names and patterns of modules.
#[derive(Debug, Default)]
pub struct Patterns {
    /// At a name's beginning.
    regexes: Vec<Regex>,
    /// Whole names.
    names: Vec<String>,
    /// Ends of names.
    ends: Vec<String>,
}

impl Patterns {
    /// transformers' `modules_to_not_convert`: a regular expression that a name begins with, or the name's end.
    pub fn of_transformers(key: &str, words: Vec<String>) -> Result<Self> {
        let regexes = words.iter().map(|word| regex(key, word)).collect::<Result<_>>()?;
        Ok(Self { regexes, names: Vec::new(), ends: words })
    }

    /// compressed-tensors' lists: whole names, and regular expressions behind `re:`.
    pub fn of_compressed_tensors(key: &str, words: Vec<String>) -> Result<Self> {
        let mut patterns = Self::default();
        for word in words {
            match word.strip_prefix("re:") {
                Some(pattern) => patterns.regexes.push(regex(key, pattern)?),
                None => patterns.names.push(word),
            }
        }
        Ok(patterns)
    }

    /// ModelOpt's lists: names in which `*` stands for any text.
    pub fn of_wildcards(key: &str, words: Vec<String>) -> Result<Self> {
        let whole = |word: &String| {
            let parts: Vec<String> = word.split('*').map(|part| fancy_regex::escape(part).into_owned()).collect();
            regex(key, &format!("{}$", parts.join(".*")))
        };
        Ok(Self { regexes: words.iter().map(whole).collect::<Result<_>>()?, ..Self::default() })
    }

    /// Whether the module `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        let Self { regexes, names, ends } = self;
        names.iter().any(|own| own == name)
            || ends.iter().any(|end| !end.is_empty() && name.ends_with(end.as_str()))
            || regexes.iter().any(|regex| regex.is_match(name).unwrap_or(false))
    }
}

/// A regular expression at the beginning, as Python's `re.match` takes it.
fn regex(key: &str, pattern: &str) -> Result<Regex> {
    let is_short = pattern.len() <= MOST_CHARS;
    let built = is_short.then(|| RegexBuilder::new(&format!("^(?:{pattern})")).backtrack_limit(MOST_STEPS).build());
    match built {
        Some(Ok(regex)) => Ok(regex),
        _ => {
            let shown: String = pattern.chars().take(60).collect();
            Err(not_read(key, format!("`{shown}`, which is no regular expression"), "names and patterns"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn lists_mean_what_their_users_read() {
        let name = "model.layers.11.self_attn.q_proj";
        let transformers = |word: &str| Patterns::of_transformers("k", words(&[word])).unwrap().matches(name);
        for word in ["q_proj", "self_attn.q_proj", "model.layers.*.self_attn", "model.layers.11", "model.layers.1"] {
            assert!(transformers(word), "{word}");
        }
        for word in ["k_proj", "layers.11.self_attn", "q_proj.weight", "model.layers.2"] {
            assert!(!transformers(word), "{word}");
        }
        let compressed = |word: &str| Patterns::of_compressed_tensors("k", words(&[word])).unwrap().matches(name);
        for word in [name, "re:.*q_proj", "re:.*self_attn.*", r"re:model\.layers\.\d+\.self_attn\.(q|k)_proj$"] {
            assert!(compressed(word), "{word}");
        }
        for word in ["q_proj", "re:q_proj", "re:.*mlp.*", r"re:.*(?<!self_attn)\.q_proj$"] {
            assert!(!compressed(word), "{word}");
        }
        let wild = |word: &str| Patterns::of_wildcards("k", words(&[word])).unwrap().matches(name);
        assert!(wild("model.layers.*.self_attn*") && wild("*q_proj") && wild(name));
        assert!(!wild("model.layers.*.mlp*") && !wild("lm_head") && !wild("model"));
    }

    #[test]
    fn a_hostile_pattern_is_an_error_or_ends() {
        assert!(Patterns::of_compressed_tensors("ignore", words(&["re:("])).is_err());
        assert!(Patterns::of_compressed_tensors("ignore", vec![format!("re:{}", "a".repeat(1 << 20))]).is_err());
        let slow = Patterns::of_compressed_tensors("ignore", words(&[r"re:(a+)+\1b$"])).unwrap();
        assert!(!slow.matches(&"a".repeat(200)));
    }
}
