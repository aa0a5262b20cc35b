//! JSON as Python's `json` module writes it: with `NaN`, `Infinity` and `-Infinity` for numbers; and how a value is shown and judged empty.

use serde_json::{Error, Value};

/// What only Python writes, longest first where one begins another.
const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Characters of a value that a message shows.
const SHOWN_CHARS: usize = 60;

/// Reads JSON; a number that is none becomes its text, which no key takes for a number. Fails with what is wrong with the rest.
pub fn parse(bytes: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(bytes).or_else(|error| match std::str::from_utf8(bytes).ok().and_then(quoted) {
        Some(text) => serde_json::from_str(&text),
        None => Err(error),
    })
}

/// A value as messages show it.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// True if a setting of this value sets nothing: null, false, or of length 0.
pub fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(keys) => keys.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// `text` with Python's numbers as strings; `None` where it has none outside of strings.
fn quoted(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut found) = (text, false);
    while let Some(c) = rest.chars().next() {
        let length = if c == '"' {
            string_length(rest)
        } else if let Some(number) = NUMBERS.into_iter().find(|number| rest.starts_with(number)) {
            found = true;
            out.push_str(&format!("\"{number}\""));
            rest = &rest[number.len()..];
            continue;
        } else {
            c.len_utf8()
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    found.then_some(out)
}

/// Bytes of the string that `text` begins with, both quotes included; all of `text` where it does not end.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_of_python_are_read_as_their_text() {
        for (text, value) in [
            (
                r#"{"a": NaN, "b": [Infinity, -Infinity, 1.5]}"#,
                json!({"a": "NaN", "b": ["Infinity", "-Infinity", 1.5]}),
            ),
            (r#"{"NaN": "a \" NaN é", "b": NaN}"#, json!({"NaN": "a \" NaN é", "b": "NaN"})),
            (r#"{"a": -1, "b": "x\\", "c": -Infinity}"#, json!({"a": -1, "b": "x\\", "c": "-Infinity"})),
            (r#"{"a": 1}"#, json!({"a": 1})),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap(), value, "{text}");
        }
    }

    #[test]
    fn what_is_no_json_stays_wrong() {
        for text in
            ["", "{", r#"{"a": NaNa}"#, r#"{"a": nan}"#, r#"{"a": --Infinity}"#, r#"{"a": "NaN}"#, "{\"a\": NaN"]
        {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(parse(b"{\"a\": NaN, \"b\": \"\xff\"}").is_err());
    }
}
