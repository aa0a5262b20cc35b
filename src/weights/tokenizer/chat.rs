//! Chat templates: a message as a model was trained to see it, by the Jinja template beside its tokenizer.
//!
//! A template is a program of strangers. It reads no file and includes no other template, and its steps and its output are bounded.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::Value as Json;

use super::settings::TokenizerSettings;
use crate::error::BadInput;
use crate::weights::open::read_json;

/// File that transformers writes a template into; it counts before that of tokenizer_config.json.
const FILE: &str = "chat_template.jinja";

/// Bytes of a template that is read: the longest published ones have 30 kB.
const MOST_BYTES: u64 = 1 << 20;

/// Steps of the template's program: those of one message take hundreds.
const MOST_STEPS: u64 = 200_000;

/// Bytes that a template may write around the message, which it may repeat a few times.
const MOST_OUTPUT: usize = 1 << 20;

/// The date that a template gets, so that a prompt is the same every day. Templates of Llama 3 name this one by default.
const DATE: Date = Date { year: 2024, month: 7, day: 26, weekday: 5, day_of_year: 208 };

/// Keys of tokenizer_config.json that a template may name.
const TOKENS: &[&str] =
    &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "image_token"];

/// A template and the special tokens that it may name.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatTemplate {
    source: String,
    tokens: BTreeMap<String, String>,
}

/// A message of one side.
#[derive(Debug, Clone, Serialize)]
pub struct ChatMessage<'a> {
    /// `system`, `user` or `assistant`.
    pub role: &'a str,
    pub content: &'a str,
}

impl ChatTemplate {
    /// `special_tokens_map.json` names tokens where tokenizer_config.json does not.
    pub fn new(source: impl Into<String>, config: &serde_json::Map<String, Json>) -> Self {
        let name = |value: &Json| match value {
            Json::String(text) => Some(text.clone()),
            Json::Object(token) => token.get("content")?.as_str().map(str::to_owned),
            _ => None,
        };
        let token = |key: &&str| Some(((*key).to_owned(), name(config.get(*key)?)?));
        Self { source: source.into(), tokens: TOKENS.iter().filter_map(token).collect() }
    }

    /// The template of a folder, `None` where it has none. Fails with [`BadInput`] on one that cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let settings = TokenizerSettings::read(folder)?;
        let Some(source) = source(folder, settings.config.get("chat_template"))? else { return Ok(None) };
        let mut config = settings.config;
        if let Some(Json::Object(map)) = read_json(&folder.join("special_tokens_map.json"))? {
            for (key, value) in map {
                config.entry(key).or_insert(value);
            }
        }
        Ok(Some(Self::new(source, &config)))
    }

    /// The text of a conversation up to where the assistant answers. Its special tokens are spelled out, the first one included.
    ///
    /// Fails with [`BadInput`] on a template that is none, refuses the messages, or exceeds its bounds.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, BadInput> {
        let bad = |error: Error| {
            let why = error.detail().map_or_else(|| error.to_string(), |detail| format!("{}: {detail}", error.kind()));
            let line = error.line().map(|line| format!(" (line {line} of it)")).unwrap_or_default();
            BadInput::new(format!("the model's chat template cannot be applied: {why}{line}"))
                .hint("leave out `--chat`, and give the prompt as the model should see it")
        };
        let content_bytes: usize = messages.iter().map(|message| message.content.len()).sum();
        let most = content_bytes.saturating_mul(4).saturating_add(MOST_OUTPUT);
        let (source, environment) = (with_lines_joined(&without_generation_tags(&self.source)), environment());
        let template = environment.template_from_named_str("chat", &source).map_err(bad)?;
        let tokens = Value::from(Serde(&self.tokens));
        let variables = context! {
            messages => Value::from(Serde(messages)), add_generation_prompt => true, tools => (), documents => (), ..tokens
        };
        let mut output = Bounded { text: Vec::new(), most, is_exceeded: false };
        let rendered = template.render_captured_to(variables, &mut output).map(drop);
        if output.is_exceeded {
            return Err(bad(Error::new(ErrorKind::InvalidOperation, format!("it writes more than {most} bytes"))));
        }
        rendered.map_err(bad)?;
        String::from_utf8(output.text)
            .map_err(|_| BadInput::new("the model's chat template wrote text that is not UTF-8"))
    }
}

/// From the file of its own, else the setting: a text, or several with names of which `default` counts.
fn source(folder: &Path, setting: Option<&Json>) -> Result<Option<String>> {
    let path = folder.join(FILE);
    if path.is_file() {
        let bad = |why: String| BadInput::new(format!("`{FILE}` cannot be read: {why}"));
        let bytes = std::fs::metadata(&path).map_err(|error| bad(error.to_string()))?.len();
        if bytes > MOST_BYTES {
            return Err(bad(format!("{bytes} bytes, at most {MOST_BYTES} are read")).into());
        }
        return Ok(Some(std::fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?));
    }
    let default = |items: &[Json]| {
        let item = items.iter().find(|item| item["name"] == "default")?;
        item["template"].as_str().map(str::to_owned)
    };
    Ok(match setting {
        Some(Json::String(text)) => Some(text.clone()),
        Some(Json::Array(items)) => default(items),
        _ => None,
    })
}

/// As transformers sets Jinja up, with what Python's texts and lists can do.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    // Building fails on delimiters that clash; these are the default ones.
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(MOST_STEPS));
    environment.set_formatter(|output, _, value| {
        // As Python writes them.
        match value.kind() {
            ValueKind::None => output.write_str("None")?,
            ValueKind::Bool => output.write_str(if value.is_true() { "True" } else { "False" })?,
            ValueKind::Undefined => {}
            _ => output.write_str(&value.to_string())?,
        }
        Ok(())
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| DATE.format(&format));
    environment.add_filter("tojson", to_json);
    environment
}

/// As Python's `json.dumps` writes it.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    for known in ["ensure_ascii", "separators", "sort_keys"] {
        // The defaults of transformers are those of here.
        options.get::<Option<Value>>(known)?;
    }
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(out).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// One line with a space behind commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// `{% generation %}` marks for trainers what the assistant says; for a prompt it is a block that is always there.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}").map(|end| end + 2) else { break };
        let tag = &rest[at..at + length];
        out += &rest[..at];
        out += &match tag[2..length - 2].trim_matches(['-', '+']).trim() {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_owned(),
        };
        rest = &rest[at + length..];
    }
    out + rest
}

/// Jinja reads a string literal as Python does, where a backslash at the end of a line joins it with the next one; minijinja keeps both.
fn with_lines_joined(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let (mut rest, mut closes, mut quote) = (source, None, None);
    while let Some(c) = rest.chars().next() {
        let mut length = c.len_utf8();
        match (closes, quote) {
            (None, _) => {
                let opened =
                    [("{%", "%}"), ("{{", "}}"), ("{#", "#}")].into_iter().find(|(open, _)| rest.starts_with(open));
                closes = opened.map(|(_, close)| close);
                length = opened.map_or(length, |(open, _)| open.len());
            }
            (Some(_), Some(_)) if c == '\\' => {
                let behind = &rest[length..];
                if let Some(line) = behind.strip_prefix("\r\n").or_else(|| behind.strip_prefix('\n')) {
                    rest = line;
                    continue;
                }
                length += behind.chars().next().map_or(0, char::len_utf8);
            }
            (Some(_), Some(open)) => quote = Some(open).filter(|_| c != open),
            (Some(close), None) if rest.starts_with(close) => (closes, length) = (None, close.len()),
            (Some("#}"), None) => {}
            (Some(_), None) => quote = Some(c).filter(|c| ['"', '\''].contains(c)),
        }
        out += &rest[..length];
        rest = &rest[length..];
    }
    out
}

/// Takes so many bytes and refuses more.
struct Bounded {
    text: Vec<u8>,
    most: usize,
    is_exceeded: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.most {
            self.is_exceeded = true;
            return Err(io::Error::other("too much"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Date {
    year: u32,
    month: usize,
    day: u32,
    /// From Sunday, 0.
    weekday: usize,
    day_of_year: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// By the letters of `strftime`, in English, at noon.
    fn format(&self, format: &str) -> Result<String, Error> {
        let (month, weekday) = (MONTHS[self.month - 1], WEEKDAYS[self.weekday]);
        let mut out = String::new();
        let mut letters = format.chars();
        while let Some(c) = letters.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let letter = letters.next().unwrap_or('%');
            out += &match letter {
                '-' => match letters.next() {
                    Some('d') => self.day.to_string(),
                    Some('m') => self.month.to_string(),
                    other => return Err(unknown_letter(other)),
                },
                'd' => format!("{:02}", self.day),
                'e' => format!("{:2}", self.day),
                'm' => format!("{:02}", self.month),
                'y' => format!("{:02}", self.year % 100),
                'Y' => self.year.to_string(),
                'b' | 'h' => month[..3].to_owned(),
                'B' => month.to_owned(),
                'a' => weekday[..3].to_owned(),
                'A' => weekday.to_owned(),
                'j' => format!("{:03}", self.day_of_year),
                'F' => format!("{}-{:02}-{:02}", self.year, self.month, self.day),
                'H' | 'I' => "12".to_owned(),
                'M' | 'S' => "00".to_owned(),
                'p' => "PM".to_owned(),
                'T' => "12:00:00".to_owned(),
                'Z' => "UTC".to_owned(),
                'z' => "+0000".to_owned(),
                '%' => "%".to_owned(),
                other => return Err(unknown_letter(Some(other))),
            };
        }
        Ok(out)
    }
}

fn unknown_letter(letter: Option<char>) -> Error {
    let letter = letter.map(String::from).unwrap_or_default();
    Error::new(ErrorKind::InvalidOperation, format!("strftime_now: `%{letter}` is not known"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, BadInput> {
        let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let Json::Object(config) = config else { unreachable!("written so above") };
        ChatTemplate::new(source, &config).render(&[ChatMessage { role: "user", content: " hello <b> " }])
    }

    #[test]
    fn a_backslash_joins_lines_of_a_literal_alone() {
        for (source, expected) in [
            ("{% set a = \"x\\\ny\" %}", "{% set a = \"xy\" %}"),
            ("{{ 'x\\\r\ny' }}\\\n", "{{ 'xy' }}\\\n"),
            ("{{ \"\\\\\n\" }}", "{{ \"\\\\\n\" }}"),
            ("{# it's \\\n #}{{ 'a\\\nb' }}", "{# it's \\\n #}{{ 'ab' }}"),
            ("{{ '%}' ~ \"it's\\\n\" }} ü", "{{ '%}' ~ \"it's\" }} ü"),
        ] {
            assert_eq!(with_lines_joined(source), expected, "{source}");
        }
    }

    #[test]
    fn python_is_spoken() {
        for (source, expected) in [
            ("{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}", "<s>hello <b></s>"),
            ("{{ messages[0].content.strip().upper().split(' ')[0] }}", "HELLO"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            ("{% for m in messages %}\n  {%- if loop.first %}first{% endif %}\n{% endfor %}\nend\n", "firstend"),
            ("{{ tools is none }} {{ nothing is defined }}{{ nothing }} {{ none }}", "True False None"),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": " hello <b> "}]"#),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            ("{%- generation -%}\n a {%- endgeneration %}{% if add_generation_prompt %}b{% endif %}", "ab"),
            ("{% for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "01"),
            ("{{ strftime_now('%d %b %Y|%B %-d|%A %F') }}", "26 Jul 2024|July 26|Friday 2024-07-26"),
            ("{{ 'a' if messages[0]['role'] == 'user' else 'b' }}{{ 'x' ~ 1 }}{{ '%' }}", "ax1%"),
        ] {
            assert_eq!(render(source).as_deref().map_err(ToString::to_string), Ok(expected), "{source}");
        }
    }

    #[test]
    fn a_template_has_bounds_and_no_files() {
        for (source, why) in [
            ("{% include '/etc/hostname' %}", "cannot be applied"),
            ("{% extends 'x' %}", "cannot be applied"),
            ("{% import 'x' as y %}", "cannot be applied"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "fuel"),
            ("{% set x = 'x' * 2000000 %}{{ x }}", "more than 1048620 bytes"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ strftime_now('%Q') }}", "`%Q` is not known"),
            ("a\n{% if %}", "line 2"),
        ] {
            let error = render(source).expect_err(source);
            assert!(error.to_string().contains(why), "{source}: {error}");
            assert!(error.hint_text().is_some(), "{source}");
        }
    }
}
