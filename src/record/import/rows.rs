//! Rows in the text that a tool's output was saved to: JSON, JSON lines, CSV and Markdown tables, with what else was written to the same
//! file around them.

use std::ops::ControlFlow;

use serde_json::{Map, Value};

/// Rows as JSON objects.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FoundRow {
    pub values: Vec<Value>,
    /// Lines, from 1, that hold no row: what the tool wrote about itself.
    pub passed_over: Vec<usize>,
    /// Says what the end of the file lacks, where the tool was stopped.
    pub cut: Option<String>,
}

/// The text of a file in UTF-8, or in UTF-16 as PowerShell's `>` writes it, without a byte order mark.
pub fn decode(bytes: Vec<u8>) -> Result<String, String> {
    let pairs = |read: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes[2..].chunks_exact(2).map(|pair| read([pair[0], pair[1]])).collect();
        String::from_utf16(&units).map_err(|_| "it is not text in UTF-16, as its first two bytes say".to_owned())
    };
    match bytes.as_slice() {
        [0xff, 0xfe, ..] => pairs(u16::from_le_bytes),
        [0xfe, 0xff, ..] => pairs(u16::from_be_bytes),
        _ => {
            let text = String::from_utf8(bytes).map_err(|_| "it is not text in UTF-8".to_owned())?;
            Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
        }
    }
}

/// Every row of `text`. Fails where there is none, and where a line in the middle of a row is no JSON.
pub fn find(text: &str) -> Result<FoundRow, String> {
    let text = &with_nulls(text);
    let whole = match serde_json::from_str(text) {
        Ok(Value::Array(values)) => return Ok(FoundRow { values, ..FoundRow::default() }),
        Ok(value) => return Ok(FoundRow { values: vec![value], ..FoundRow::default() }),
        Err(error) => error,
    };
    if let Some(values) = lines(text) {
        return Ok(FoundRow { values, ..FoundRow::default() });
    }
    let found = Scan::new(text).run()?;
    if !found.values.is_empty() {
        return Ok(found);
    }
    for read in [csv, markdown] {
        let found = read(text);
        if !found.values.is_empty() {
            return Ok(found);
        }
    }
    if text.contains("INSERT INTO") {
        return Err("it is SQL: write the rows with `llama-bench -o jsonl` instead".into());
    }
    Err(found.cut.unwrap_or_else(|| {
        format!(
            "it is neither JSON ({whole}), JSON lines, nor llama-bench's CSV or Markdown: write the rows with \
             `llama-bench -o jsonl`, or as JSON with another tool"
        )
    }))
}

/// Non-finite numbers as C and Python print them, which JSON does not have.
const NO_NUMBERS: &[&str] = &["NaN", "-NaN", "nan", "-nan", "Infinity", "-Infinity", "inf", "-inf"];

/// `text` with `null` for each of [`NO_NUMBERS`] in the place of a value: after `:`, `,` or `[`, and before `,`, `}`, `]` or an end.
fn with_nulls(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut quoted, mut before, mut rest) = (false, '\n', text);
    while let Some(c) = rest.chars().next() {
        let is_place = !quoted && [':', ',', '['].contains(&before);
        let ends = |word: &&&str| {
            let behind = rest.strip_prefix(**word).map(|behind| behind.trim_start_matches([' ', '\t', '\r']));
            behind.is_some_and(|behind| behind.starts_with([',', '}', ']', '\n']) || behind.is_empty())
        };
        if let Some(word) = NO_NUMBERS.iter().filter(|_| is_place).find(ends) {
            out += "null";
            (before, rest) = ('l', &rest[word.len()..]);
            continue;
        }
        // A string of JSON ends on its line, and a quote in it follows a backslash.
        quoted = match c {
            '\n' => false,
            '"' => !quoted || before == '\\',
            _ => quoted,
        };
        before = match c {
            // Behind a backslash a backslash is a letter.
            '\\' if before == '\\' => 'l',
            c if c.is_whitespace() && c != '\n' && !quoted => before,
            c => c,
        };
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

/// Values, one on each line that is not blank; `None` where a line is none.
fn lines(text: &str) -> Option<Vec<Value>> {
    text.lines().filter(|line| !line.trim().is_empty()).map(|line| serde_json::from_str(line).ok()).collect()
}

/// Finds JSON objects between lines of other text, and in a list without an end.
struct Scan<'a> {
    text: &'a str,
    at: usize,
    found: FoundRow,
    /// A list began of which no end was seen.
    is_open: bool,
}

impl<'a> Scan<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0, found: FoundRow::default(), is_open: false }
    }

    fn run(mut self) -> Result<FoundRow, String> {
        while self.at < self.text.len() {
            let rest = &self.text[self.at..];
            let step = match rest.chars().next() {
                Some('{' | '[') => self.value(rest)?,
                Some(c) if c == ',' || c.is_whitespace() => self.skip(c.len_utf8()),
                Some(']') if self.is_open => {
                    self.is_open = false;
                    self.skip(1)
                }
                _ => self.skip_line(rest),
            };
            if step.is_break() {
                break;
            }
        }
        if self.is_open && self.found.cut.is_none() && !self.found.values.is_empty() {
            self.found.cut = Some("the list of rows has no end: the tool was stopped before its last one".into());
        }
        Ok(self.found)
    }

    /// A row, a list of rows, or a line that only begins like one.
    fn value(&mut self, rest: &str) -> Result<ControlFlow<()>, String> {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let is_list = rest.starts_with('[');
        Ok(match values.next() {
            Some(Ok(Value::Array(items))) if items.iter().all(Value::is_object) && !items.is_empty() => {
                self.found.values.extend(items);
                self.skip(values.byte_offset())
            }
            Some(Ok(value @ Value::Object(_))) => {
                self.found.values.push(value);
                self.skip(values.byte_offset())
            }
            Some(Err(_)) if is_list && rest[1..].trim_start().starts_with('{') => {
                self.is_open = true;
                self.skip(1)
            }
            Some(Err(error)) if !is_list && error.is_eof() => {
                let line = self.line();
                self.found.cut = Some(format!("the row that begins at line {line} has no end and is left out"));
                ControlFlow::Break(())
            }
            Some(Err(error)) if !is_list => {
                let line = self.line() + error.line() - 1;
                return Err(format!("line {line}, in the middle of a row, is no JSON: take it out ({error})"));
            }
            _ => self.skip_line(rest),
        })
    }

    /// Number of the next line, from 1.
    fn line(&self) -> usize {
        self.text[..self.at].matches('\n').count() + 1
    }

    fn skip(&mut self, bytes: usize) -> ControlFlow<()> {
        self.at += bytes.max(1);
        ControlFlow::Continue(())
    }

    fn skip_line(&mut self, rest: &str) -> ControlFlow<()> {
        self.found.passed_over.push(self.line());
        self.skip(rest.find('\n').map_or(rest.len(), |end| end + 1))
    }
}

/// The rows after each header that names llama-bench's columns, as `-o csv` writes them.
fn csv(text: &str) -> FoundRow {
    let mut found = FoundRow::default();
    let mut header: Option<(char, Vec<String>)> = None;
    let n_lines = text.lines().count();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let new_header = [',', ';', '\t'].into_iter().map(|separator| (separator, fields(line, separator)));
        let is_header =
            |names: &[String]| ["n_prompt", "n_gen", "avg_ts"].iter().all(|key| names.iter().any(|n| n == key));
        if let Some(new) = new_header.into_iter().find(|(_, names)| is_header(names)) {
            header = Some(new);
            continue;
        }
        let cells = header.as_ref().map(|(separator, names)| (names, fields(line, *separator)));
        match cells {
            Some((names, cells)) if names.len() == cells.len() => {
                let row = names.iter().zip(cells).map(|(name, cell)| (name.clone(), typed(name, cell)));
                found.values.push(Value::Object(row.collect()));
            }
            Some(_) if at + 1 == n_lines && line.starts_with('"') => {
                found.cut = Some(format!("the row at line {} has no end and is left out", at + 1));
            }
            _ => found.passed_over.push(at + 1),
        }
    }
    found
}

/// Splits a line of CSV, where a quoted field may hold the separator, and a quote twice.
fn fields(line: &str, separator: char) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut chars = line.trim_end_matches('\r').chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
            '"' => quoted = !quoted,
            c if c == separator && !quoted => fields.push(std::mem::take(&mut field).trim().to_owned()),
            c => field.push(c),
        }
    }
    fields.push(field.trim().to_owned());
    fields
}

/// Columns whose text may look like a number.
const TEXTS: &[&str] =
    &["build_commit", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "test_time"];

fn typed(name: &str, cell: String) -> Value {
    let number = || serde_json::from_str::<serde_json::Number>(&cell).ok().map(Value::Number);
    match TEXTS.contains(&name) {
        true => Value::String(cell),
        false => number().unwrap_or(Value::String(cell)),
    }
}

/// The rows of tables with a column `test` and one `t/s`, under the keys of llama-bench's JSON.
fn markdown(text: &str) -> FoundRow {
    let mut found = FoundRow::default();
    let mut header: Option<Vec<String>> = None;
    let mut build = Map::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let cells = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|'));
        let cells: Option<Vec<String>> = cells.map(|line| line.split('|').map(|c| c.trim().to_owned()).collect());
        match (cells, &header) {
            (Some(cells), _) if cells.iter().any(|c| c == "test") && cells.iter().any(|c| c == "t/s") => {
                header = Some(cells);
            }
            (Some(cells), Some(_)) if cells.iter().all(|c| c.contains("--") && !c.contains(char::is_alphanumeric)) => {}
            (Some(cells), Some(names)) if names.len() == cells.len() => {
                let row = names.iter().cloned().zip(cells.into_iter().map(Value::String));
                found
                    .values
                    .push(Value::Object([("markdown".to_owned(), Value::Object(row.collect()))].into_iter().collect()));
            }
            _ => match build_line(line) {
                Some(facts) => build = facts,
                None => found.passed_over.push(at + 1),
            },
        }
    }
    for value in &mut found.values {
        value.as_object_mut().into_iter().for_each(|row| row.extend(build.clone()));
    }
    found
}

/// `build: 8cf427ff (5163)`, below a table.
fn build_line(line: &str) -> Option<Map<String, Value>> {
    let (commit, number) = line.trim().strip_prefix("build:")?.trim().split_once(' ')?;
    let number: u64 = number.trim().strip_prefix('(')?.strip_suffix(')')?.parse().ok()?;
    Some([("build_commit".to_owned(), commit.into()), ("build_number".to_owned(), number.into())].into_iter().collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(text: &str) -> FoundRow {
        find(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn rows_are_found_between_other_lines() {
        let rows = vec![json!({"a": 1}), json!({"a": [2, {"b": 3}]})];
        for (text, passed_over) in [
            ("[{\"a\": 1}, {\"a\": [2, {\"b\": 3}]}]", vec![]),
            ("{\"a\": 1}\n\n{\"a\": [2, {\"b\": 3}]}\n", vec![]),
            ("loading\n[INFO] 0 = GPU\n[3] x\n[\n{\"a\":\n1},\n{\"a\": [2, {\"b\": 3}]}\n]\ndone\n", vec![1, 2, 3, 9]),
            ("[{\"a\": 1},\nnoise\n{\"a\": [2, {\"b\": 3}]}]", vec![2]),
            ("noise\r\n{\"a\": 1}\r\nnoise\r\n{\"a\": [2, {\"b\": 3}]}\r\n", vec![1, 3]),
        ] {
            assert_eq!(found(text), FoundRow { values: rows.clone(), passed_over, cut: None }, "{text}");
        }
    }

    #[test]
    fn a_stopped_tool_leaves_whole_rows() {
        for (text, n, word) in [
            ("[\n{\"a\": 1},\n", 1, "no end"),
            ("[\n{\"a\": 1},\n{\"a\": 2", 1, "line 3"),
            ("[{\"a\": 1}, {\"a\": {\"b\"", 1, "line 1"),
            ("{\"a\": 1}\n{\"a\": 2}\n{\"a\":", 2, "line 3"),
        ] {
            let found = found(text);
            assert_eq!(found.values.len(), n, "{text}");
            assert!(found.cut.as_ref().is_some_and(|cut| cut.contains(word)), "{text}: {found:?}");
        }
        for (text, word) in [
            ("{\"a\": \nnoise\n1}", "line 2, in the middle of a row"),
            ("[\n{\"a\":", "line 2 has no end"),
            ("CREATE TABLE test (\n);\nINSERT INTO test (a) VALUES ('1');", "`llama-bench -o jsonl`"),
            ("x", "neither JSON"),
        ] {
            let error = find(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn numbers_that_are_none_are_null() {
        for (text, expected) in [
            (
                "{\"a\": NaN, \"b\": [-nan, inf,Infinity], \"c\":-Infinity}",
                json!({"a": null, "b": [null, null, null], "c": null}),
            ),
            ("{\"a\": nan\n}", json!({"a": null})),
            (r#"{"a": ", nan,", "b\"": "x\\", "c": nan}"#, json!({"a": ", nan,", "b\"": "x\\", "c": null})),
        ] {
            assert_eq!(found(text).values, [expected], "{text}");
        }
        let noise = "it's \"half quoted\n{\"a\": nan}";
        assert_eq!(found(noise).values, [json!({"a": null})]);
    }

    #[test]
    fn csv_is_typed_and_quoted() {
        let text = "noise, more\nbuild_commit,n_prompt,n_gen,avg_ts,cpu_info\n\"123\",\"512\",\"0\",\"1.5\",\"a, \"\"b\"\"\"\n\"12";
        let row = json!({"build_commit": "123", "n_prompt": 512, "n_gen": 0, "avg_ts": 1.5, "cpu_info": "a, \"b\""});
        let found = found(text);
        assert_eq!((found.values, found.passed_over), (vec![row], vec![1]));
        assert!(found.cut.is_some_and(|cut| cut.contains("line 4")));
    }

    #[test]
    fn markdown_tables_come_with_their_build() {
        let text = "noise\n| model | test | t/s |\n| --- | --- | ---: |\n| a | pp8 | 1.00 ± 0.10 |\n\nbuild: 8cf427ff (5163)\n";
        let cells = json!({"model": "a", "test": "pp8", "t/s": "1.00 ± 0.10"});
        let row = json!({"markdown": cells, "build_commit": "8cf427ff", "build_number": 5163});
        assert_eq!(found(text), FoundRow { values: vec![row], passed_over: vec![1], cut: None });
    }

    #[test]
    fn marks_and_wide_characters_are_decoded() {
        let wide = |mark: [u8; 2], bytes: fn(u16) -> [u8; 2]| {
            mark.into_iter().chain("é{}".encode_utf16().flat_map(bytes)).collect::<Vec<u8>>()
        };
        let cases = [
            "é{}".as_bytes().to_vec(),
            [b"\xef\xbb\xbf".as_slice(), "é{}".as_bytes()].concat(),
            wide([0xff, 0xfe], u16::to_le_bytes),
            wide([0xfe, 0xff], u16::to_be_bytes),
        ];
        for bytes in cases {
            assert_eq!(decode(bytes.clone()).as_deref(), Ok("é{}"), "{bytes:?}");
        }
        assert!(decode(vec![0xff, 0x00]).is_err() && decode(vec![0xff, 0xfe, 0x00, 0xd8]).is_err());
    }
}
