//! What people type: values that begin with a dash, ids copied from a program, and names of precisions that other tools use.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};

use clap::CommandFactory;
use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};

use super::Cli;
use crate::error::{BadInput, nearest};
use crate::quant::{FormatId, STORED_FORMATS};

/// The words of a command line, the program first, with each value that begins with a dash joined to its option: `--prompt '- hello'`
/// becomes `--prompt=- hello`. A word that is itself an option stays apart, so that an option without its value is noticed.
pub fn joined(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let options = Options::of(&Cli::command());
    let mut joined: Vec<OsString> = Vec::new();
    let mut words = words.into_iter().peekable();
    while let Some(word) = words.next() {
        if word == "--" {
            joined.push(word);
            joined.extend(words);
            return joined;
        }
        let value = words.next_if(|next| options.takes_value(&word) && options.is_dashed_value(next));
        match value {
            Some(value) => {
                let mut both = word;
                both.push("=");
                both.push(value);
                joined.push(both);
            }
            None => joined.push(word),
        }
    }
    joined
}

/// The options of all commands.
#[derive(Default)]
struct Options {
    /// As they are typed: `--prompt`, `-q`.
    known: BTreeSet<String>,
    with_value: BTreeSet<String>,
}

impl Options {
    fn of(command: &clap::Command) -> Self {
        let mut options = Self::default();
        options.add(command);
        options
    }

    fn add(&mut self, command: &clap::Command) {
        for word in ["--help", "-h", "--version", "-V"] {
            self.known.insert(word.to_owned());
        }
        for arg in command.get_arguments() {
            let longs = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
            let longs = longs.map(|long| format!("--{long}"));
            let names: Vec<String> = longs.chain(arg.get_short().map(|short| format!("-{short}"))).collect();
            if arg.get_action().takes_values() {
                self.with_value.extend(names.iter().cloned());
            }
            self.known.extend(names);
        }
        command.get_subcommands().for_each(|command| self.add(command));
    }

    fn takes_value(&self, word: &OsStr) -> bool {
        word.to_str().is_some_and(|word| self.with_value.contains(word))
    }

    fn is_dashed_value(&self, word: &OsStr) -> bool {
        // `-` alone is taken as a value anyway.
        let Some(text) = word.to_str().filter(|text| text.len() > 1 && text.starts_with('-')) else { return false };
        let option = text.split('=').next().unwrap_or(text);
        text != "--" && !self.known.contains(option)
    }
}

/// What `--color` says, also where the rest of the words is no command.
pub fn color(words: &[OsString]) -> clap::ColorChoice {
    let words: Vec<&str> = words.iter().filter_map(|word| word.to_str()).collect();
    let at = words.iter().position(|word| word.starts_with("--color"));
    let value = at.and_then(|at| words[at].split_once('=').map(|(_, value)| value).or(words.get(at + 1).copied()));
    match value {
        Some("always") => clap::ColorChoice::Always,
        Some("never") => clap::ColorChoice::Never,
        _ => clap::ColorChoice::Auto,
    }
}

/// Takes any word, so that [`super::Request`] can say what was meant by one that is unknown, and gives completions these.
#[derive(Clone)]
pub struct Suggested(pub fn() -> Vec<&'static str>);

impl TypedValueParser for Suggested {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new((self.0)().into_iter().map(PossibleValue::new)))
    }
}

/// Token ids as a person writes them or a program prints them: `1,2,3`, `1 2 3`, `[1, 2, 3]`, `tensor([[1, 2, 3]])`. Fails with
/// what is wrong.
pub fn ids(text: &str) -> Result<Vec<u32>, String> {
    let mut inside = text.trim();
    while let Some(rest) = unwrapped(inside) {
        inside = rest;
    }
    let mut pieces: Vec<&str> = inside.split(',').map(str::trim).collect();
    // Behind a last comma there is nothing.
    pieces.pop_if(|last| last.is_empty());
    if pieces.is_empty() {
        return Err(format!("`{text}` holds no token id; give at least one, such as `1,2,3`"));
    }
    // A piece without anything in it is a word too, and no id.
    let words = pieces.into_iter().flat_map(|piece| match piece {
        "" => vec![""],
        piece => piece.split_whitespace().collect(),
    });
    let id = |word: &str| {
        let allowed = format!("ids are numbers from 0 to {}, such as `1,2,3` or `[1, 2, 3]`", u32::MAX);
        word.parse().map_err(|_| format!("`{word}` is no token id: {allowed}"))
    };
    words.map(id).collect()
}

/// What stands in the brackets around all of `text`, as Python, NumPy and PyTorch write them.
fn unwrapped(text: &str) -> Option<&str> {
    let pairs = [("tensor(", ")"), ("torch.tensor(", ")"), ("array(", ")"), ("np.array(", ")"), ("[", "]"), ("(", ")")];
    let inside = |(open, close): &(&str, &str)| Some(text.strip_prefix(*open)?.strip_suffix(*close)?.trim());
    let inside = pairs.iter().find_map(inside)?;
    // Where the numbers lie and what they are held in.
    let ends = [", device=", ", dtype="].iter().filter_map(|word| inside.find(word));
    Some(ends.min().map_or(inside, |end| inside[..end].trim()))
}

/// What an option that names precisions takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Several, or `all`.
    Many,
    /// One that can be exported.
    One,
}

/// The error for a precision that is none, with what was probably meant.
pub fn unknown_precision(word: &str, takes: Takes) -> BadInput {
    let formats: Vec<FormatId> =
        FormatId::asked().filter(|entry| takes == Takes::Many || entry.saved.is_some()).collect();
    let names = formats.iter().flat_map(|entry| [entry.name].into_iter().chain(entry.aliases.iter().copied()));
    let names: Vec<&str> = names.chain((takes == Takes::Many).then_some("all")).collect();
    let error = BadInput::new(format!("unknown precision `{word}`: known are {}", names.join(", ")));
    if takes == Takes::One && (word == "all" || word.contains(',')) {
        return error.hint("one precision is written at a time; run the command once for each");
    }
    let is_stored = STORED_FORMATS.iter().any(|format| format.name == word && !format.is_made);
    let stored = is_stored
        .then(|| format!("a model that was saved in `{word}` is measured with `--model-id FOLDER` (`FILE.gguf`), without `--precision`"));
    match (meaning(word), stored) {
        (Some(hint), Some(stored)) => error.hint(format!("{hint}; {stored}")),
        (Some(hint), None) | (None, Some(hint)) => error.hint(hint),
        (None, None) => match nearest(word, names.iter().copied()) {
            Some(nearest) => error.hint(format!("the nearest is `--precision {nearest}`")),
            None => error,
        },
    }
}

/// What other tools mean by this word, and what is nearest to it here. `None` for what means nothing.
fn meaning(word: &str) -> Option<String> {
    let plain: String = word.to_lowercase().chars().filter(|c| c.is_ascii_alphanumeric()).collect();
    let bits = bits(&plain)?;
    let (name, format) = match bits {
        0..=5 => ("4bit", "nf4, 4 bits a weight"),
        6..=12 => ("8bit", "int8, 8 bits a weight"),
        _ => ("fp16", "16 bits a weight"),
    };
    let asked = matches!(bits, 4 | 8) && is_integer_or_plain(&plain);
    Some(match (asked, plain.as_str()) {
        (true, _) => format!("`--precision {name}` is {format}"),
        (false, "float16" | "16bit" | "16" | "f16" | "half") => format!("`--precision {name}` is {format}"),
        (false, _) => format!("`{word}` is not supported; the nearest in width is `--precision {name}` ({format})"),
    })
}

/// Of a weight, in a format of this name.
fn bits(plain: &str) -> Option<u32> {
    let by_name = match plain {
        "gptq" | "awq" | "bnb4bit" | "qlora" => Some(4),
        "llmint8" | "bnb8bit" | "smoothquant" => Some(8),
        "bf16" | "bfloat16" | "bfloat" | "half" | "float16" => Some(16),
        "float" | "full" | "float32" | "tf32" => Some(32),
        _ => None,
    };
    if by_name.is_some() {
        return by_name;
    }
    // A kind, a width, and what a tool adds: `q4km`, `int4`, `fp8e4m3`, `w4a16`, `4bit`, `8`.
    let kinds = ["uint", "int", "mxfp", "nvfp", "float", "iq", "fp", "nf", "bf", "q", "i", "u", "f", "w", "e", ""];
    kinds.iter().find_map(|kind| {
        let rest = plain.strip_prefix(kind)?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let behind = &rest[digits.len()..];
        let is_width = matches!(digits.as_str(), "1" | "2" | "3" | "4" | "5" | "6" | "8" | "16" | "32" | "64")
            // llama.cpp's names go on with digits: `q4_0`, `q8_0`, `q4_1`.
            || (*kind == "q" && digits.len() == 2);
        let width: u32 = if *kind == "q" { digits.get(..1)?.parse().ok()? } else { digits.parse().ok()? };
        let known_end = behind.is_empty()
            || ["bit", "bits", "b"].contains(&behind)
            || ["km", "ks", "kl", "k", "xs", "xxs", "nl", "s", "m"].contains(&behind)
            || (*kind == "w" && behind.starts_with('a'))
            || behind.starts_with('e')
            || behind.starts_with("dq");
        // `e4m3` is one of fp8's layouts.
        let is_layout = *kind == "e" && matches!(plain, "e4m3" | "e5m2" | "e4m3fn");
        match (is_layout, *kind) {
            (true, _) => Some(8),
            (false, "e") => None,
            _ => (is_width && known_end).then_some(width),
        }
    })
}

/// Names under which this width is what is here: integers and bare widths, and fp4, which bitsandbytes has beside nf4.
fn is_integer_or_plain(plain: &str) -> bool {
    !(plain.starts_with("fp8") || plain.starts_with("float8") || plain.starts_with('e'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &str, expected: &str) {
        let words = words.split('|').map(OsString::from);
        let joined: Vec<String> = joined(words).iter().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(joined.join("|"), expected);
    }

    #[test]
    fn values_that_begin_with_a_dash_belong_to_their_option() {
        for (words, expected) in [
            ("q|--prompt|- hello|--quiet", "q|--prompt=- hello|--quiet"),
            ("q|--prompt|-hello", "q|--prompt=-hello"),
            ("q|--prompt|--- a list", "q|--prompt=--- a list"),
            ("q|--prompt|-5 + 3 = -2", "q|--prompt=-5 + 3 = -2"),
            ("q|--prompt|--precision matters", "q|--prompt=--precision matters"),
            ("q|--rel-ci|-1", "q|--rel-ci=-1"),
            ("q|-m|-x|-n|-1", "q|-m=-x|-n=-1"),
            ("q|--model|-x", "q|--model=-x"),
            ("q|export|--keep-fp16|-x", "q|export|--keep-fp16=-x"),
            // An option whose value was forgotten is noticed.
            ("q|--prompt|--precision|fp16", "q|--prompt|--precision|fp16"),
            ("q|--prompt|--precision=fp16", "q|--prompt|--precision=fp16"),
            ("q|--prompt|-q", "q|--prompt|-q"),
            // What takes no value keeps to itself, and nothing behind `--` is an option.
            ("q|--quiet|- hello", "q|--quiet|- hello"),
            ("q|--|--prompt|- hello", "q|--|--prompt|- hello"),
            ("q|--prompt|-", "q|--prompt|-"),
            ("q|--prompt", "q|--prompt"),
        ] {
            check(words, expected);
        }
    }

    #[test]
    fn ids_are_read_as_programs_print_them() {
        for text in [
            "1,2,3",
            "1, 2, 3",
            " 1 2  3 ",
            "[1, 2, 3]",
            "[1 2 3]",
            "(1, 2, 3)",
            "[1, 2, 3,]",
            "1,2,3,",
            "[[1, 2, 3]]",
            "tensor([[1, 2, 3]])",
            "tensor([1, 2, 3], device='cuda:0')",
            "array([1, 2, 3], dtype=int64)",
            "[\n  1,\n  2,\n  3\n]",
            "torch.tensor([1, 2, 3], dtype=torch.int32, device='cpu')",
        ] {
            assert_eq!(ids(text), Ok(vec![1, 2, 3]), "{text}");
        }
        for (text, word) in [
            ("1,x,3", "`x`"),
            ("1,,3", "``"),
            ("-1", "`-1`"),
            ("1.5", "`1.5`"),
            ("4294967296", "`4294967296`"),
            ("[1,2],[3]", "`2]`"),
            ("", "no token id"),
            ("[]", "no token id"),
        ] {
            let error = ids(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn other_names_of_a_precision_lead_to_what_they_mean() {
        let hint = |word: &str| unknown_precision(word, Takes::Many).hint_text().unwrap_or_default().to_owned();
        for (words, name) in [
            (&["int4", "fp4", "q4", "q4_0", "q4_k_m", "4-bit", "4", "i4", "w4a16", "gptq", "awq", "nvfp4"][..], "4bit"),
            (&["8-bit", "q8", "q8_0", "i8", "w8a8", "uint8", "8", "fp8", "e4m3", "fp8_e5m2", "float8"], "8bit"),
            (&["float16", "16", "16-bit", "bf16", "bfloat16", "fp32", "float32", "tf32"], "fp16"),
            (&["int2", "q2_k", "3bit", "q5_1", "iq3_xxs"], "4bit"),
            (&["q6_k"], "8bit"),
        ] {
            for word in words {
                assert!(hint(word).contains(&format!("`--precision {name}`")), "{word}: {}", hint(word));
            }
        }
        for word in ["bf16", "fp8", "fp32", "int2"] {
            assert!(hint(word).contains("not supported"), "{word}: {}", hint(word));
        }
        for format in STORED_FORMATS.iter().filter(|format| !format.is_made) {
            assert!(hint(format.name).contains("`--model-id FOLDER` (`FILE.gguf`)"), "{format}: {}", hint(format.name));
        }
        assert_eq!(hint("fp61"), "the nearest is `--precision fp16`");
        assert_eq!(hint("imt8"), "the nearest is `--precision int8`");
        for word in ["nosuch", "best", ""] {
            assert_eq!(hint(word), "", "{word}");
        }
    }

    #[test]
    fn an_option_for_one_precision_does_not_name_all() {
        let error = unknown_precision("all", Takes::One);
        let known = error.to_string();
        assert_eq!(known, "unknown precision `all`: known are int8, 8bit, llm.int8, nf4, 4bit, nf4-nodq");
        assert!(error.hint_text().unwrap().contains("one precision"));
        assert!(unknown_precision("4bit,8bit", Takes::One).hint_text().unwrap().contains("one precision"));
    }
}
