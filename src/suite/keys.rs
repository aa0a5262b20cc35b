//! The keys that a suite file may hold, and the values that they take.

use std::path::PathBuf;

use toml::Spanned;
use toml::de::DeValue;

use crate::error::{BadInput, nearest};

/// A setting of a run: the option of `quantbench run` with `_` for `-`.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    pub name: String,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`: an option without a value.
    Switch,
    /// One text or number.
    One,
    /// Several, which belong to one case.
    List,
}

/// Limits of a case: keys that are no option of a run.
pub const LIMIT_KEYS: [&str; 2] = ["timeout_s", "memory_limit"];

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Switch(bool),
    /// As an option takes it.
    One(String),
    List(Vec<String>),
}

/// Where a key stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
}

/// A value with the place of its key.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub value: Value,
    pub place: Place,
}

impl Place {
    /// What is wrong with a key here.
    pub fn bad(&self, key: &str, what: &str) -> BadInput {
        BadInput::new(format!("{self}: `{key}`{what}"))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` line {}", self.file.display(), self.line)
    }
}

impl Key {
    /// A value of this key. Fails on one of another kind.
    pub fn value(&self, toml: &DeValue, place: &Place) -> Result<Value, BadInput> {
        let found = || place.bad(&self.name, &format!(" is {}; {} is needed", kind_of(toml), self.kind.name()));
        match (self.kind, toml) {
            (Kind::Switch, DeValue::Boolean(on)) => Ok(Value::Switch(*on)),
            (Kind::One, _) => scalar(toml).map(Value::One).ok_or_else(found),
            (Kind::List, DeValue::Array(items)) if !items.is_empty() => {
                let items: Option<Vec<String>> = items.iter().map(|item| scalar(item.get_ref())).collect();
                items.map(Value::List).ok_or_else(found)
            }
            (Kind::List, _) => scalar(toml).map(|one| Value::List(vec![one])).ok_or_else(found),
            (Kind::Switch, _) => Err(found()),
        }
    }

    /// The values of an axis: each makes a case, but all of a list belong to one.
    pub fn axis(&self, toml: &Spanned<DeValue>, place: &Place) -> Result<Vec<Value>, BadInput> {
        match toml.get_ref() {
            DeValue::Array(items) if items.is_empty() => Err(place.bad(&self.name, " is empty: no case is left")),
            DeValue::Array(items) if self.kind != Kind::List => {
                items.iter().map(|item| self.value(item.get_ref(), place)).collect()
            }
            value => Ok(vec![self.value(value, place)?]),
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Switch => "true or false",
            Kind::One => "a text or a number",
            Kind::List => "a list of texts or numbers",
        }
    }
}

impl Value {
    /// The option with this value, `None` for a switch that is off.
    pub fn word(&self, key: &str) -> Option<String> {
        let option = format!("--{}", key.replace('_', "-"));
        match self {
            Value::Switch(false) => None,
            Value::Switch(true) => Some(option),
            Value::One(text) => Some(format!("{option}={text}")),
            Value::List(items) => Some(format!("{option}={}", items.join(","))),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        match self {
            Value::Switch(on) => on.to_string(),
            Value::One(text) => text.clone(),
            Value::List(items) => items.join(","),
        }
    }
}

fn scalar(toml: &DeValue) -> Option<String> {
    match toml {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(n) if n.radix() == 10 => Some(n.as_str().to_owned()),
        DeValue::Float(x) => Some(x.as_str().to_owned()),
        _ => None,
    }
}

fn kind_of(toml: &DeValue) -> &'static str {
    match toml {
        DeValue::String(_) => "a text",
        DeValue::Integer(n) if n.radix() != 10 => "not a decimal number",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(items) if items.is_empty() => "an empty list",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// What to say about a key that nobody knows.
pub fn unknown(place: &Place, key: &str, known: &[&str]) -> BadInput {
    let error = place.bad(key, " is unknown here");
    match nearest(key, known.iter().copied()) {
        Some(nearest) => error.hint(format!("the nearest key is `{nearest}`")),
        None => error,
    }
}
