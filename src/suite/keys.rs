//! The keys that a suite file may hold, and the values that they take.

use std::path::PathBuf;

use toml::Spanned;
use toml::de::DeValue;

use crate::error::{BadInput, nearest};

/// A setting of a run: the option of `quantbench run` with `_` for `-`.
#[derive(Debug, Clone, PartialEq)]
pub struct SuiteKey {
    pub name: String,
    pub kind: ValueKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
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
pub enum SettingValue {
    Switch(bool),
    /// An option's text.
    One(String),
    List(Vec<String>),
}

/// Position of a key in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyPosition {
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
}

/// A value with the place of its key.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedValue {
    pub value: SettingValue,
    pub place: KeyPosition,
}

impl KeyPosition {
    /// Error for a key at this place.
    pub fn bad(&self, key: &str, what: &str) -> BadInput {
        BadInput::new(format!("{self}: `{key}`{what}"))
    }
}

impl std::fmt::Display for KeyPosition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` line {}", self.file.display(), self.line)
    }
}

impl SuiteKey {
    /// A value of this key. Fails on one of another kind.
    pub fn value(&self, toml: &DeValue, place: &KeyPosition) -> Result<SettingValue, BadInput> {
        let found = || place.bad(&self.name, &format!(" is {}; {} is needed", kind_of(toml), self.kind.name()));
        match (self.kind, toml) {
            (ValueKind::Switch, DeValue::Boolean(on)) => Ok(SettingValue::Switch(*on)),
            (ValueKind::One, _) => scalar(toml).map(SettingValue::One).ok_or_else(found),
            (ValueKind::List, DeValue::Array(items)) if !items.is_empty() => {
                let items: Option<Vec<String>> = items.iter().map(|item| scalar(item.get_ref())).collect();
                items.map(SettingValue::List).ok_or_else(found)
            }
            (ValueKind::List, _) => scalar(toml).map(|one| SettingValue::List(vec![one])).ok_or_else(found),
            (ValueKind::Switch, _) => Err(found()),
        }
    }

    /// The values of an axis: each makes a case, but all of a list belong to one.
    pub fn axis(&self, toml: &Spanned<DeValue>, place: &KeyPosition) -> Result<Vec<SettingValue>, BadInput> {
        match toml.get_ref() {
            DeValue::Array(items) if items.is_empty() => Err(place.bad(&self.name, " is empty: no case is left")),
            DeValue::Array(items) if self.kind != ValueKind::List => {
                items.iter().map(|item| self.value(item.get_ref(), place)).collect()
            }
            value => Ok(vec![self.value(value, place)?]),
        }
    }
}

impl ValueKind {
    fn name(self) -> &'static str {
        match self {
            ValueKind::Switch => "true or false",
            ValueKind::One => "a text or a number",
            ValueKind::List => "a list of texts or numbers",
        }
    }
}

impl SettingValue {
    /// The option with this value, `None` for a switch that is off.
    pub fn word(&self, key: &str) -> Option<String> {
        let option = format!("--{}", key.replace('_', "-"));
        match self {
            SettingValue::Switch(false) => None,
            SettingValue::Switch(true) => Some(option),
            SettingValue::One(text) => Some(format!("{option}={text}")),
            SettingValue::List(items) => Some(format!("{option}={}", items.join(","))),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        match self {
            SettingValue::Switch(on) => on.to_string(),
            SettingValue::One(text) => text.clone(),
            SettingValue::List(items) => items.join(","),
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

/// Error for an unknown key.
pub fn unknown(place: &KeyPosition, key: &str, known: &[&str]) -> BadInput {
    let error = place.bad(key, " is unknown here");
    match nearest(key, known.iter().copied()) {
        Some(nearest) => error.hint(format!("the nearest key is `{nearest}`")),
        None => error,
    }
}
