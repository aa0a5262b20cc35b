//! An engine of the command line, and how its process is started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::adapters::{ADAPTERS, Adapter, Asked, ModelForm, WIDTHS, Width};
use super::python::find_python;
use crate::engine::Engine;
use crate::error::BadInput;
use crate::ipc::EngineCommand;

/// What all adapters share: the connection and its messages.
const SHARED: &str = include_str!("python/engine.py");

/// An engine of the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineChoice {
    /// In a worker of this program.
    Own(Engine),
    Other(EngineProgram),
}

/// A program that speaks the engine protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineProgram {
    /// In rows.
    pub name: String,
    /// What is started; `None`: the adapter of this name.
    command: Option<String>,
    /// The interpreter of adapters.
    python: Option<PathBuf>,
}

impl From<Engine> for EngineChoice {
    fn from(engine: Engine) -> Self {
        EngineChoice::Own(engine)
    }
}

/// Names of all engines.
pub fn names() -> Vec<&'static str> {
    let own = crate::engine::ENGINES.iter().map(|engine| engine.name());
    own.chain(ADAPTERS.iter().map(|adapter| adapter.name)).collect()
}

impl EngineChoice {
    /// An engine by name, `name=command`, or the path of a program.
    pub fn parse(word: &str, python: Option<&Path>) -> Result<Self, BadInput> {
        let word = word.trim();
        if let Some(own) = crate::engine::ENGINES.iter().find(|engine| engine.name() == word) {
            return Ok(EngineChoice::Own(*own));
        }
        let python = || python.map(Path::to_owned);
        if ADAPTERS.iter().any(|adapter| adapter.name == word) {
            return Ok(EngineChoice::Other(EngineProgram { name: word.to_owned(), command: None, python: python() }));
        }
        let (name, command) = match word.split_once('=') {
            Some((name, command)) => (name.trim().to_owned(), command.trim().to_owned()),
            None if word.contains('/') => {
                let stem = Path::new(word).file_stem().unwrap_or_default();
                (stem.to_string_lossy().into_owned(), quoted(word))
            }
            None => (String::new(), String::new()),
        };
        let is_known = names().contains(&name.as_str());
        if name.is_empty() || command.is_empty() || is_known {
            let why = if is_known { "that name is an engine of this program" } else { "no engine has this name" };
            let near =
                crate::error::nearest(word, names()).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(BadInput::new(format!("`--engine {word}`: {why}")).hint(format!(
                "known are {}; a program of your own is `./path` or `name=command`{near}",
                names().join(", ")
            )));
        }
        Ok(EngineChoice::Other(EngineProgram { name, command: Some(command), python: None }))
    }

    pub fn name(&self) -> &str {
        match self {
            EngineChoice::Own(engine) => engine.name(),
            EngineChoice::Other(program) => &program.name,
        }
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl EngineProgram {
    fn adapter(&self) -> Option<&'static Adapter> {
        ADAPTERS.iter().find(|adapter| self.command.is_none() && adapter.name == self.name)
    }

    /// The form that its adapter takes; a program without one is given the model as it is, or a folder.
    pub fn form(&self) -> Option<ModelForm> {
        self.adapter().map(|adapter| adapter.form)
    }

    /// The program's name for what is asked, with its width; `Err` is the nearest format that it has. A program without an adapter is
    /// asked for our own names, and knows best whether it has them.
    pub fn format(&self, asked: &Asked) -> Result<(String, Option<Width>), &'static str> {
        let Some(adapter) = self.adapter() else {
            return Ok(match asked {
                Asked::Width(width) => (width.own().to_string(), Some(*width)),
                Asked::Name(name) => (name.clone(), WIDTHS.into_iter().find(|width| width.own().name == name)),
            });
        };
        let found = adapter.formats.iter().find(|(width, name)| match asked {
            Asked::Width(asked) => *width == Some(*asked),
            Asked::Name(asked) => name == asked,
        });
        match found {
            Some((width, name)) => Ok(((*name).to_owned(), *width)),
            None => Err(adapter.nearest(asked)),
        }
    }

    /// How it is started; `threads` is the number of threads that it may use.
    pub fn command(&self, threads: usize, timeout: Duration) -> EngineCommand {
        let (program, arguments): (PathBuf, Vec<OsString>) = match (&self.command, self.adapter()) {
            (Some(command), _) => ("/bin/sh".into(), vec!["-c".into(), format!("exec {command}").into()]),
            (None, adapter) => {
                let source = adapter.map_or("", |adapter| adapter.source);
                let code = format!("{SHARED}\n\n{source}\n");
                let packages = adapter.map_or(&[][..], |adapter| adapter.packages).iter();
                let packages = packages.map(|package| format!("{}>={}", package.name, package.least).into());
                let plain = ["-c".into(), code.into(), self.name.clone().into()];
                (find_python(self.python.as_deref()), plain.into_iter().chain(packages).collect())
            }
        };
        let threads: OsString = threads.to_string().into();
        EngineCommand {
            role: "engine",
            program,
            arguments,
            environment: vec![
                ("OMP_NUM_THREADS", threads.clone()),
                ("MKL_NUM_THREADS", threads),
                ("PYTHONUNBUFFERED", "1".into()),
                // A model is where the parent says, and nothing is fetched.
                ("HF_HUB_OFFLINE", "1".into()),
                ("TOKENIZERS_PARALLELISM", "false".into()),
            ],
            timeout: Some(timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(word: &str) -> EngineProgram {
        match EngineChoice::parse(word, None).unwrap() {
            EngineChoice::Other(program) => program,
            EngineChoice::Own(engine) => panic!("{engine:?}"),
        }
    }

    #[test]
    fn a_width_is_each_engines_own_format() {
        let name = |engine: &str, width| program(engine).format(&Asked::Width(width)).unwrap().0;
        assert_eq!(WIDTHS.map(|width| name("llama.cpp", width)), ["f16", "q8_0", "q4_0"]);
        assert_eq!(WIDTHS.map(|width| name("transformers", width)), ["fp16", "int8", "nf4"]);
        assert_eq!(WIDTHS.map(|width| name("mine=./mine", width)), ["fp16", "int8", "nf4"]);
    }

    #[test]
    fn a_name_is_one_engines_alone_and_others_say_what_is_near() {
        let asked = |engine: &str, name: &str| program(engine).format(&Asked::Name(name.to_owned()));
        assert_eq!(asked("llama.cpp", "nf4"), Err("q4_0"));
        assert_eq!(asked("llama.cpp", "int8"), Err("q8_0"));
        assert_eq!(asked("transformers", "q4_0"), Err("nf4"));
        assert_eq!(asked("llama.cpp", "q4_0"), Ok(("q4_0".to_owned(), Some(Width::Bits4))));
        assert_eq!(asked("transformers", "bf16"), Ok(("bf16".to_owned(), None)));
    }

    #[test]
    fn programs_are_named_by_path_or_by_command() {
        for (word, name) in [("./my-engine", "my-engine"), ("/a/b.py", "b"), ("mine=python3 my engine.py", "mine")] {
            assert_eq!(program(word).name, name);
        }
        assert_eq!(EngineChoice::parse("candle", None).unwrap(), EngineChoice::Own(Engine::Candle));
        for word in ["lama.cpp", "", "=x", "x=", "candle=./x"] {
            assert!(EngineChoice::parse(word, None).is_err(), "{word}");
        }
        let hint = EngineChoice::parse("lama.cpp", None).unwrap_err();
        assert!(hint.hint_text().unwrap().ends_with("did you mean `llama.cpp`?"), "{hint:?}");
    }
}
