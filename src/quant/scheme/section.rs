//! The section of config.json that describes a quantization, key by key: what is asked for is computed, the rest is named.

use std::cell::RefCell;
use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::{Map, Value};

use super::not_read;

/// A section, or an object inside it.
pub struct Section<'a> {
    keys: &'a Map<String, Value>,
    /// The path of the object, with a dot behind it.
    prefix: String,
    asked: RefCell<BTreeSet<String>>,
    notes: RefCell<Vec<String>>,
}

impl<'a> Section<'a> {
    pub fn new(keys: &'a Map<String, Value>) -> Self {
        Self::at(keys, String::new())
    }

    fn at(keys: &'a Map<String, Value>, prefix: String) -> Self {
        Self { keys, prefix, asked: RefCell::default(), notes: RefCell::default() }
    }

    /// The value; `None` where it is absent or null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.keys.get(key).filter(|value| !value.is_null())
    }

    /// The error for a value that is not computed; `allowed` says what is.
    pub fn refused(&self, key: &str, allowed: &str) -> anyhow::Error {
        let seen = self.keys.get(key).map_or_else(|| "absent".to_owned(), |value| format!("`{}`", short(value)));
        not_read(&format!("{}{key}", self.prefix), seen, allowed)
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.value(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.refused(key, "true and false")),
        }
    }

    pub fn integer(&self, key: &str) -> Result<Option<i64>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| self.refused(key, "integers")),
        }
    }

    pub fn word(&self, key: &str) -> Result<Option<&'a str>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.refused(key, "text")),
        }
    }

    /// A word in lower case that must be one of `allowed`.
    pub fn one_of(&self, key: &str, allowed: &[&'static str], default: &'static str) -> Result<&'static str> {
        let Some(word) = self.word(key)? else { return Ok(default) };
        let found = allowed.iter().find(|allowed| allowed.eq_ignore_ascii_case(word));
        found.copied().ok_or_else(|| self.refused(key, &format!("`{}`", allowed.join("` and `"))))
    }

    /// A list of words; empty where it is absent.
    pub fn words(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let wrong = || self.refused(key, "lists of names");
        let items = value.as_array().ok_or_else(wrong)?;
        items.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
    }

    /// A positive integer; `None` for −1 and where it is absent or null.
    pub fn group(&self, key: &str) -> Result<Option<usize>> {
        match self.integer(key)? {
            None | Some(-1) => Ok(None),
            Some(size) => match usize::try_from(size) {
                Ok(size) if size > 0 => Ok(Some(size)),
                _ => Err(self.refused(key, "-1 and positive numbers")),
            },
        }
    }

    /// An object inside; `None` where it is absent or null.
    pub fn inner(&self, key: &str) -> Result<Option<Section<'a>>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => {
                let keys = value.as_object().ok_or_else(|| self.refused(key, "objects"))?;
                Ok(Some(Self::at(keys, format!("{}{key}.", self.prefix))))
            }
        }
    }

    /// The names of all keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a String> {
        self.keys.keys()
    }

    /// Keys that change no value of a weight and nothing that is computed.
    pub fn harmless(&self, keys: &[&str]) {
        self.asked.borrow_mut().extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// Fails where a key that changes what is computed sets anything.
    pub fn refuse(&self, keys: &[&str], allowed: &str) -> Result<()> {
        let set = |key: &&&str| self.value(key).is_some_and(|value| !sets_nothing(value));
        match keys.iter().find(set) {
            None => Ok(()),
            Some(key) => Err(self.refused(key, allowed)),
        }
    }

    /// Something that a reader of the result must know.
    pub fn note(&self, message: impl Into<String>) {
        self.notes.borrow_mut().push(message.into());
    }

    /// Takes the notes of an object inside.
    pub fn absorb(&self, inner: Section) {
        let notes = inner.into_notes();
        let mut own = self.notes.borrow_mut();
        for note in notes {
            if !own.contains(&note) {
                own.push(note);
            }
        }
    }

    /// All notes, and one of the keys that nobody asked for.
    pub fn into_notes(self) -> Vec<String> {
        let asked = self.asked.into_inner();
        let unknown: Vec<String> = self
            .keys
            .iter()
            .filter(|(key, value)| !asked.contains(*key) && !sets_nothing(value))
            .map(|(key, value)| format!("`{}{key}` ({})", self.prefix, short(value)))
            .collect();
        let mut notes = self.notes.into_inner();
        if !unknown.is_empty() {
            let message = "config.json's quantization_config has keys that are not known and not computed";
            notes.push(format!("{message}: {}", unknown.join(", ")));
        }
        notes
    }
}

/// Whether a setting of this value sets nothing.
fn sets_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(keys) => keys.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value as messages show it.
fn short(value: &Value) -> String {
    const SHOWN: usize = 60;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
