//! From a file to cases: the matrix multiplied out, overrides applied, each case with the words of its run and its hash.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use super::file::{self, Override, SuiteFile, SuiteSettings};
use super::keys::{KeyPosition, LIMIT_KEYS, PlacedValue, SettingValue, SuiteKey};
use crate::error::BadInput;

/// A case as it will run.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The suite's.
    pub suite: String,
    /// From 1, in the whole suite.
    pub index: usize,
    pub n_cases: usize,
    /// Hash of the words, whatever their order: 16 hexadecimal digits.
    pub hash: String,
    /// Options of `quantbench run`.
    pub words: Vec<String>,
    pub limits: Limits,
    /// Model, device and what else differs between cases.
    pub label: String,
    settings: SuiteSettings,
    path: std::path::PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// From the start of the case to the end of its last worker.
    pub timeout_s: Option<f64>,
    /// Most bytes that each worker of the case may allocate.
    pub memory_limit_bytes: Option<u64>,
}

/// More are a mistake in a matrix.
const MAX_CASES: usize = 10_000;

/// Axes that vary slowest, in this order; other axes follow in the order of the options.
const OUTER_AXES: [&str; 2] = ["model_id", "device"];

/// The cases of a suite file in their order. Fails with [`BadInput`] on a file that cannot be used and on one without cases.
pub fn read(path: &Path, keys: &[SuiteKey]) -> Result<Vec<Planned>, BadInput> {
    let file = file::read(path, keys)?;
    let mut cases = Vec::new();
    let mut used = vec![false; file.overrides.len()];
    for combination in combinations(&file, keys)? {
        if let Some(settings) = overridden(combination, &file.overrides, &mut used) {
            cases.push(planned(&file, settings)?);
        }
    }
    if let Some((unused, _)) = file.overrides.iter().zip(used).find(|(change, used)| !used && !change.inherited) {
        return Err(BadInput::new(format!("{}: this `override` is for no case", unused.place))
            .hint("`when` names values that stand in `[matrix]`"));
    }
    if cases.is_empty() {
        return Err(BadInput::new(format!("`{}` has no case: all are skipped", path.display())));
    }
    number(&mut cases)?;
    Ok(cases)
}

impl Planned {
    /// The command that runs this case alone.
    pub fn command(&self) -> Vec<String> {
        ["quantbench", "run"].into_iter().map(str::to_owned).chain(self.words.iter().cloned()).collect()
    }

    /// Says where in the file a complaint about this case's words comes from.
    pub fn complain(&self, message: &str) -> String {
        let named = |key: &str| {
            let option = format!("--{}", key.replace('_', "-"));
            let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
            message.match_indices(&option).any(|(at, found)| ends(&message[at + found.len()..]))
        };
        let quoted = |text: &str| message.contains(&format!("`{text}`"));
        let valued = |placed: &PlacedValue| match &placed.value {
            SettingValue::One(text) => quoted(text),
            SettingValue::List(items) => items.iter().any(|item| quoted(item)),
            SettingValue::Switch(_) => false,
        };
        let by_name = self.settings.iter().find(|(key, _)| named(key));
        match by_name.or_else(|| self.settings.iter().find(|(_, placed)| valued(placed))) {
            Some((key, placed)) => format!("{}: `{key}`: {message}", placed.place),
            None => format!("`{}`, case {} of {}: {message}", self.path.display(), self.index, self.n_cases),
        }
    }
}

/// Every combination of the axes over the settings of all cases, the last axis fastest.
fn combinations(file: &SuiteFile, keys: &[SuiteKey]) -> Result<Vec<SuiteSettings>, BadInput> {
    let rank = |name: &str| {
        let outer = OUTER_AXES.iter().position(|axis| *axis == name);
        outer.unwrap_or_else(|| OUTER_AXES.len() + keys.iter().position(|key| key.name == name).unwrap_or(keys.len()))
    };
    let mut axes: Vec<_> = file.matrix.iter().collect();
    axes.sort_by_key(|(name, _)| rank(name));
    let mut all = vec![file.settings.clone()];
    for (name, values) in axes {
        if all.len() * values.len() > MAX_CASES {
            return Err(values[0].place.bad(name, &format!(" makes more than {MAX_CASES} cases")));
        }
        let with = |base: &SuiteSettings, placed: &PlacedValue| {
            let mut settings = base.clone();
            settings.insert(name.clone(), placed.clone());
            settings
        };
        all = all.iter().flat_map(|base| values.iter().map(move |placed| with(base, placed))).collect();
    }
    Ok(all)
}

/// The settings with every override that is for them; `None` for a case that is skipped.
fn overridden(settings: SuiteSettings, overrides: &[Override], used: &mut [bool]) -> Option<SuiteSettings> {
    let is_for = |change: &Override| {
        change.when.iter().all(|(key, values)| {
            settings.get(key).is_some_and(|own| values.iter().any(|placed| placed.value == own.value))
        })
    };
    let mut changed = settings.clone();
    let mut skip = false;
    for (change, used) in overrides.iter().zip(used).filter(|(change, _)| is_for(change)) {
        *used = true;
        skip |= change.skip;
        changed.extend(change.settings.clone());
    }
    (!skip).then_some(changed)
}

fn planned(file: &SuiteFile, settings: SuiteSettings) -> Result<Planned, BadInput> {
    let options = settings.iter().filter(|(key, _)| !LIMIT_KEYS.contains(&key.as_str()));
    let words: Vec<String> = options.filter_map(|(key, placed)| placed.value.word(key)).collect();
    Ok(Planned {
        suite: file.name.clone(),
        index: 0,
        n_cases: 0,
        // The map is sorted by key.
        hash: format!("{:016x}", xxh3_64(words.join("\0").as_bytes())),
        words,
        limits: limits(&settings)?,
        label: label(file, &settings),
        settings,
        path: file.path.clone(),
    })
}

/// Gives every case its index. Fails where two are the same.
fn number(cases: &mut [Planned]) -> Result<(), BadInput> {
    let n_cases = cases.len();
    for at in 0..n_cases {
        (cases[at].index, cases[at].n_cases) = (at + 1, n_cases);
        let (before, rest) = cases.split_at(at);
        if let Some(twin) = before.iter().find(|twin| twin.hash == rest[0].hash) {
            let message = format!("`{}`: the cases {} and {} are the same", rest[0].path.display(), twin.index, at + 1);
            let hint =
                format!("both are `{}`; look for a value that is listed twice, or an override that hides one", {
                    rest[0].words.join(" ")
                });
            return Err(BadInput::new(message).hint(hint));
        }
    }
    Ok(())
}

fn label(file: &SuiteFile, settings: &SuiteSettings) -> String {
    let text = |key: &str| settings.get(key).map(|placed| placed.value.text());
    let model = text("model_id").unwrap_or_else(|| "the default model".to_owned());
    let model = if Path::new(&model).is_dir() { last_component(&model) } else { model };
    let mut label = format!("{model} on {}", text("device").unwrap_or_else(|| "auto".to_owned()));
    let varies = |key: &str| file.matrix.get(key).is_some_and(|values| values.len() > 1);
    for (key, placed) in settings.iter().filter(|(key, _)| varies(key) && !OUTER_AXES.contains(&key.as_str())) {
        label += &format!(", {key} {}", placed.value.text());
    }
    label
}

fn last_component(path: &str) -> String {
    Path::new(path).file_name().map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

fn limits(settings: &SuiteSettings) -> Result<Limits, BadInput> {
    let of = |key: &str| settings.get(key).map(|placed| (placed.value.text(), &placed.place));
    Ok(Limits {
        timeout_s: of("timeout_s").map(|(text, place)| seconds(&text, place)).transpose()?,
        memory_limit_bytes: of("memory_limit").map(|(text, place)| bytes(&text, place)).transpose()?,
    })
}

fn seconds(text: &str, place: &KeyPosition) -> Result<f64, BadInput> {
    let seconds = text.parse().ok().filter(|seconds: &f64| seconds.is_finite() && *seconds > 0.0);
    seconds.ok_or_else(|| place.bad("timeout_s", &format!(" is `{text}`: a number of seconds above 0 is needed")))
}

/// `24 GiB`, `500 MiB`, or a number of bytes.
fn bytes(text: &str, place: &KeyPosition) -> Result<u64, BadInput> {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)];
    let number = |number: &str, unit: u64| Some(number.trim().parse::<f64>().ok()? * unit as f64);
    let bytes = units.into_iter().find_map(|(name, unit)| number(text.strip_suffix(name)?, unit));
    let bytes = bytes.filter(|bytes| bytes.is_finite() && *bytes >= 1.0).map(|bytes| bytes as u64);
    bytes.ok_or_else(|| {
        place
            .bad("memory_limit", &format!(" is `{text}`: a number of bytes is needed"))
            .hint("write `24 GiB`, `500 MiB` or a plain number")
    })
}
