//! The keys of a JSON object as a model file asks for them: a mistyped value is named with its key, and what was asked for is the
//! list of keys that are computed.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::{Error, Result};
use serde_json::{Map, Value};

use super::rope::RopeSettings;
use super::rule::{Fate, Rule};
use crate::weights::json::shown;

/// Something that a reader of the result must know about the files of a model; `name` is what records call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    pub name: &'static str,
    pub message: String,
}

/// What became of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walked {
    pub file: &'static str,
    /// From the top: `text_config.hidden_size`.
    pub key: String,
    pub fate: Fate,
}

/// What reading the files of a model leaves beside its plan.
#[derive(Debug, Default)]
pub struct Report {
    pub walked: RefCell<Vec<Walked>>,
    pub notes: RefCell<Vec<Note>>,
    pub rope: RefCell<Option<RopeSettings>>,
    /// A key that would be refused is reported as an unknown one, so that all of them are found.
    pub is_probe: bool,
}

impl Report {
    pub fn note(&self, name: &'static str, message: String) {
        self.notes.borrow_mut().push(Note { name, message });
    }

    pub fn push(&self, file: &'static str, key: String, fate: Fate) {
        self.walked.borrow_mut().push(Walked { file, key, fate });
    }
}

/// One object of a file. Each method that takes a key counts it as computed; `null` is as good as absent, as transformers' own
/// defaults take its place.
pub struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// What messages call the file.
    file: &'static str,
    /// The object's own path with a dot behind it; empty at the top.
    prefix: String,
    asked: RefCell<BTreeSet<&'static str>>,
    pub report: &'a Report,
}

impl<'a> Keys<'a> {
    pub fn new(object: &'a Map<String, Value>, file: &'static str, report: &'a Report) -> Self {
        Self { object, file, prefix: String::new(), asked: RefCell::default(), report }
    }

    /// The value, `null` included; `None` where the key is absent.
    pub fn raw(&self, key: &'static str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key);
        self.object.get(key)
    }

    /// The value, `None` where it is absent or `null`.
    pub fn value(&self, key: &'static str) -> Option<&'a Value> {
        self.raw(key).filter(|value| !value.is_null())
    }

    /// An error that names the key and its value.
    pub fn wrong(&self, key: &str, must: &str) -> Error {
        let value =
            self.object.get(key).map_or_else(|| "is missing".to_owned(), |value| format!("is {}", shown(value)));
        Error::Msg(format!("{}: `{}{key}` {value}; it must be {must}", self.file, self.prefix))
    }

    /// As [`Self::wrong`], of a setting that means something which is not computed here.
    pub fn refused(&self, key: &str, why: &str) -> Error {
        let value = self.object.get(key).unwrap_or(&Value::Null);
        Error::Msg(format!("{}: `{}{key}` {}: {why}", self.file, self.prefix, shown(value)))
    }

    fn read<T>(&self, key: &'static str, must: &str, of: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.value(key).map(|value| of(value).ok_or_else(|| self.wrong(key, must))).transpose()
    }

    pub fn optional_size(&self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, "a whole number", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    pub fn size(&self, key: &'static str, default: usize) -> Result<usize> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    /// A size that has two names, which must not differ.
    pub fn size_by(&self, key: &'static str, other: &'static str, default: usize) -> Result<usize> {
        match (self.optional_size(key)?, self.optional_size(other)?) {
            (Some(a), Some(b)) if a != b => {
                Err(self.wrong(key, &format!("the same as `{}{other}`, which is {b}", self.prefix)))
            }
            (a, b) => Ok(a.or(b).unwrap_or(default)),
        }
    }

    pub fn optional_number(&self, key: &'static str) -> Result<Option<f64>> {
        self.read(key, "a number", |value| value.as_f64().filter(|value| value.is_finite()))
    }

    pub fn number(&self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub fn optional_flag(&self, key: &'static str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool> {
        Ok(self.optional_flag(key)?.unwrap_or(default))
    }

    pub fn optional_word(&self, key: &'static str) -> Result<Option<&'a str>> {
        self.read(key, "a text", Value::as_str)
    }

    pub fn word(&self, key: &'static str, default: &'a str) -> Result<&'a str> {
        Ok(self.optional_word(key)?.unwrap_or(default))
    }

    pub fn numbers(&self, key: &'static str) -> Result<Option<Vec<f64>>> {
        self.read(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// A number above 0 that `null` takes away; `default` where the key is absent.
    pub fn number_or_null(&self, key: &'static str, default: Option<f64>) -> Result<Option<f64>> {
        let number = match self.raw(key) {
            None => default,
            Some(_) => self.optional_number(key)?,
        };
        match number {
            Some(number) if number <= 0.0 => Err(self.wrong(key, "a number above 0, or null")),
            number => Ok(number),
        }
    }

    /// A size that `null` takes away; `default` where the key is absent.
    pub fn size_or_null(&self, key: &'static str, default: Option<usize>) -> Result<Option<usize>> {
        match self.raw(key) {
            None => Ok(default),
            Some(_) => self.optional_size(key),
        }
    }

    pub fn words(&self, key: &'static str) -> Result<Option<Vec<&'a str>>> {
        self.read(key, "a list of texts", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    pub fn sizes(&self, key: &'static str) -> Result<Option<Vec<usize>>> {
        let size = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
        self.read(key, "a list of whole numbers", |value| value.as_array()?.iter().map(size).collect())
    }

    /// One token id or several. An id below 0 means "none" in some conversions, and matches no token.
    pub fn token_ids(&self, key: &'static str) -> Result<Option<Vec<u32>>> {
        let id = |value: &Value| -> Option<Option<u32>> {
            let id = value.as_i64()?;
            if id < 0 { Some(None) } else { u32::try_from(id).ok().map(Some) }
        };
        self.read(key, "a token id or a list of token ids", |value| match value {
            Value::Array(ids) => {
                ids.iter().map(id).collect::<Option<Vec<_>>>().map(|ids| ids.into_iter().flatten().collect())
            }
            one => id(one).map(|id| id.into_iter().collect()),
        })
    }

    /// The object under a key.
    pub fn section(&self, key: &'static str) -> Result<Option<Keys<'a>>> {
        let object = self.read(key, "an object", Value::as_object)?;
        Ok(object.map(|object| self.below(key, object)))
    }

    /// The object under a key, or another in its place.
    pub fn section_or(&self, key: &'static str, default: &'static Map<String, Value>) -> Result<Keys<'a>> {
        Ok(self.section(key)?.unwrap_or_else(|| self.below(key, default)))
    }

    fn below(&self, key: &str, object: &'a Map<String, Value>) -> Keys<'a> {
        let prefix = format!("{}{key}.", self.prefix);
        Keys { object, file: self.file, prefix, asked: RefCell::default(), report: self.report }
    }

    /// Whether the key is there and not `null`, without counting it as computed.
    pub fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|value| !value.is_null())
    }

    /// Judges every key that was not asked for. Fails on one that is known to change what is computed.
    pub fn finish(&self, rule: &Rule) -> Result<()> {
        let asked = self.asked.borrow();
        for (key, value) in self.object {
            let fate = match asked.contains(key.as_str()) {
                true => Fate::Computed,
                false => match rule.fate(key, value) {
                    Ok(fate) => fate,
                    Err(_) if self.report.is_probe => Fate::Unknown(shown(value)),
                    Err(must) => return Err(self.refused(key, &must)),
                },
            };
            self.report.push(self.file, format!("{}{key}", self.prefix), fate);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error<T: std::fmt::Debug>(value: Value, read: impl Fn(&Keys) -> Result<T>) -> String {
        let report = Report::default();
        let object = json!({ "key": value });
        read(&Keys::new(object.as_object().unwrap(), "config.json", &report)).unwrap_err().to_string()
    }

    #[test]
    fn a_mistyped_value_is_named_with_its_key() {
        for value in [json!(-1), json!(1.5), json!("2"), json!(true), json!([1]), json!(1e30)] {
            let said = error(value.clone(), |keys| keys.size("key", 1));
            assert!(said.starts_with(&format!("config.json: `key` is {value}; it must be a whole number")), "{said}");
        }
        for value in [json!("NaN"), json!([]), json!(false)] {
            assert!(error(value, |keys| keys.number("key", 1.0)).contains("`key`"));
        }
        for value in [json!(1), json!("true")] {
            assert!(error(value, |keys| keys.flag("key", true)).contains("true or false"));
        }
        for value in [json!(2.5), json!("2"), json!([1, "2"]), json!({"a": 1}), json!(true), json!(1u64 << 40)] {
            let said = error(value.clone(), |keys| keys.token_ids("key"));
            assert!(said.contains(&format!("`key` is {value}")), "{said}");
        }
        assert!(error(json!([]), |keys| keys.section("key").map(|_| ())).contains("an object"));
        let long = error(json!("x".repeat(500)), |keys| keys.size("key", 1));
        assert!(long.len() < 140 && long.contains('…'), "{long}");
    }

    #[test]
    fn token_ids_below_zero_match_nothing() {
        let report = Report::default();
        let object = json!({"none": -1, "one": 7, "some": [3, -1, 4], "null": null, "empty": []});
        let keys = Keys::new(object.as_object().unwrap(), "config.json", &report);
        let ids = |key| keys.token_ids(key).unwrap();
        assert_eq!(ids("none"), Some(vec![]));
        assert_eq!(ids("one"), Some(vec![7]));
        assert_eq!(ids("some"), Some(vec![3, 4]));
        assert_eq!((ids("null"), ids("absent"), ids("empty")), (None, None, Some(vec![])));
    }
}
