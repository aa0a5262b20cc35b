//! A suite file as it was written, checked key by key; [`super::plan`] makes cases of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{self, KeyPosition, LIMIT_KEYS, PlacedValue, SettingValue, SuiteKey};
use crate::error::BadInput;

/// By key.
pub type SuiteSettings = BTreeMap<String, PlacedValue>;

/// A file with all that it extends.
#[derive(Debug, Clone, PartialEq)]
pub struct SuiteFile {
    /// The file's name without its extension.
    pub name: String,
    pub path: PathBuf,
    /// For every case; limits among them.
    pub settings: SuiteSettings,
    /// By key, the values of each axis; never empty ones.
    pub matrix: BTreeMap<String, Vec<PlacedValue>>,
    /// In the order in which they apply.
    pub overrides: Vec<Override>,
}

/// Settings that differ for some cases.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// By key, the values of which one must be the case's.
    pub when: BTreeMap<String, Vec<PlacedValue>>,
    pub settings: SuiteSettings,
    pub skip: bool,
    pub place: KeyPosition,
    /// Written in a file that another one extends, which may have dropped the cases that it is for.
    pub inherited: bool,
}

/// Most files in a chain that extend one another; a circle is longer.
const MAX_CHAIN: usize = 16;

/// Reads a file and those that it extends. Fails on what is no TOML, on unknown keys and on values of the wrong kind.
pub fn read(path: &Path, keys: &[SuiteKey]) -> Result<SuiteFile, BadInput> {
    chain(path, keys, MAX_CHAIN)
}

fn chain(path: &Path, keys: &[SuiteKey], left: usize) -> Result<SuiteFile, BadInput> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| BadInput::new(format!("the suite file `{}`: {error}", path.display())))?;
    let (own, base) = parse(path, &text, keys)?;
    let Some((base, place)) = base else { return Ok(own) };
    if left == 0 {
        return Err(place.bad("extends", ": this file extends itself in the end"));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    Ok(own.over(chain(&folder.join(base), keys, left - 1)?))
}

impl SuiteFile {
    /// This file on top of `base`: its keys win, whole axes are replaced, overrides apply after the base's.
    fn over(self, base: SuiteFile) -> SuiteFile {
        let mut file = base;
        (file.name, file.path) = (self.name, self.path);
        file.matrix.retain(|key, _| !self.settings.contains_key(key));
        file.settings.extend(self.settings);
        file.matrix.extend(self.matrix);
        file.overrides.iter_mut().for_each(|change| change.inherited = true);
        file.overrides.extend(self.overrides);
        file
    }
}

/// A file alone, and what it extends.
fn parse(path: &Path, text: &str, keys: &[SuiteKey]) -> Result<(SuiteFile, Option<(PathBuf, KeyPosition)>), BadInput> {
    let reader = SuiteReader { path, text, keys };
    let table = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        let place = KeyPosition { file: path.to_owned(), line };
        BadInput::new(format!("{place}: {}", error.message())).hint("a suite is a TOML file")
    })?;
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let (settings, matrix, overrides) = Default::default();
    let mut file = SuiteFile { name, path: path.to_owned(), settings, matrix, overrides };
    let mut base = None;
    for (key, value) in table.get_ref().iter() {
        let place = reader.place(key);
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("extends", DeValue::String(other)) => base = Some((PathBuf::from(other.as_ref()), place)),
            ("extends", _) => return Err(place.bad("extends", ": the name of a file is needed")),
            ("matrix", DeValue::Table(table)) => file.matrix = reader.axes(table)?,
            ("matrix", _) => return Err(place.bad("matrix", ": a table is needed, `[matrix]`")),
            ("override", DeValue::Array(items)) => {
                file.overrides = items.iter().map(|item| reader.change(item, &place)).collect::<Result<_, _>>()?;
            }
            ("override", _) => return Err(place.bad("override", ": tables are needed, `[[override]]`")),
            (name, value) => {
                let placed = reader.setting(name, value, &place, &["extends", "matrix", "override"])?;
                file.settings.insert(name.to_owned(), placed);
            }
        }
    }
    match file.settings.iter().find(|(key, _)| file.matrix.contains_key(*key)) {
        Some((key, placed)) => Err(placed.place.bad(key, " stands in `[matrix]` as well")),
        None => Ok((file, base)),
    }
}

struct SuiteReader<'a> {
    path: &'a Path,
    text: &'a str,
    keys: &'a [SuiteKey],
}

impl SuiteReader<'_> {
    fn place<T>(&self, at: &Spanned<T>) -> KeyPosition {
        KeyPosition { file: self.path.to_owned(), line: line_of(self.text, at.span().start) }
    }

    fn key(&self, name: &str) -> Option<&SuiteKey> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// A key of a case. `also` are the words that are known beside those.
    fn setting(
        &self,
        name: &str,
        value: &DeValue,
        place: &KeyPosition,
        also: &[&str],
    ) -> Result<PlacedValue, BadInput> {
        let limit =
            || LIMIT_KEYS.contains(&name).then(|| SuiteKey { name: name.to_owned(), kind: keys::ValueKind::One });
        let Some(key) = self.key(name).cloned().or_else(limit) else {
            let known = self.keys.iter().map(|key| key.name.as_str()).chain(LIMIT_KEYS).chain(also.iter().copied());
            return Err(keys::unknown(place, name, &known.collect::<Vec<_>>()));
        };
        Ok(PlacedValue { value: key.value(value, place)?, place: place.clone() })
    }

    fn axes(&self, table: &DeTable) -> Result<BTreeMap<String, Vec<PlacedValue>>, BadInput> {
        let mut axes = BTreeMap::new();
        for (name, value) in table.iter() {
            let place = self.place(name);
            let Some(key) = self.key(name.get_ref()) else {
                let known: Vec<&str> = self.keys.iter().map(|key| key.name.as_str()).collect();
                return Err(keys::unknown(&place, name.get_ref(), &known));
            };
            let placed = |value| PlacedValue { value, place: place.clone() };
            axes.insert(key.name.clone(), key.axis(value, &place)?.into_iter().map(placed).collect());
        }
        Ok(axes)
    }

    fn change(&self, item: &Spanned<DeValue>, place: &KeyPosition) -> Result<Override, BadInput> {
        let DeValue::Table(table) = item.get_ref() else {
            return Err(place.bad("override", ": tables are needed, `[[override]]`"));
        };
        let (when, settings) = Default::default();
        let mut change = Override { when, settings, skip: false, place: self.place(item), inherited: false };
        for (key, value) in table.iter() {
            let place = self.place(key);
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("when", DeValue::Table(table)) => change.when = self.axes(table)?,
                ("when", _) => return Err(place.bad("when", ": a table is needed, `{ model_id = \"…\" }`")),
                ("skip", DeValue::Boolean(skip)) => change.skip = *skip,
                ("skip", _) => return Err(place.bad("skip", ": true or false is needed")),
                (name, value) => {
                    let placed = self.setting(name, value, &place, &["when", "skip"])?;
                    change.settings.insert(name.to_owned(), placed);
                }
            }
        }
        match change
            .when
            .iter()
            .find(|(_, values)| values.iter().any(|placed| matches!(placed.value, SettingValue::List(_))))
        {
            Some((key, values)) => {
                Err(values[0].place.bad(key, " cannot choose cases: its values belong to one case together"))
            }
            None => Ok(change),
        }
    }
}

/// From 1.
fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}
