//! The Python that adapters run with, and what it has.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::adapters::{Adapter, Package};

/// Overrides the interpreter where `--python` does not.
const VARIABLE: &str = "QUANTBENCH_PYTHON";

/// The interpreter: the one that was named, else `QUANTBENCH_PYTHON`, the active virtual environment's, `python3`.
pub fn find_python(named: Option<&Path>) -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let active = || variable("VIRTUAL_ENV").map(|folder| folder.join("bin/python"));
    named.map(Path::to_owned).or_else(|| variable(VARIABLE)).or_else(active).unwrap_or_else(|| "python3".into())
}

/// What an adapter needs, and what is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Packages with their versions.
    pub found: Vec<(String, String)>,
    pub missing: Vec<String>,
    /// Those of the found ones that are too old, as `package>=version`.
    pub too_old: Vec<String>,
    /// Why the interpreter could not be asked.
    pub problem: Option<String>,
}

/// Prints `package version`, or `package -`, of each argument.
const ASK: &str = "import sys, importlib.metadata as m
for p in sys.argv[1:]:
    try: print(p, m.version(p))
    except m.PackageNotFoundError: print(p, '-')";

/// Asks an interpreter which packages of an adapter it has. Nothing is imported.
pub fn probe(adapter: &Adapter, python: &Path) -> Probe {
    let packages: Vec<&str> = adapter.packages.iter().map(|package| package.name).collect();
    let output = Command::new(python).arg("-c").arg(ASK).args(&packages).stdin(Stdio::null()).output();
    let all = packages.iter().map(|package| (*package).to_owned()).collect();
    match output {
        Err(error) => {
            let problem = Some(format!("`{}` cannot be started: {error}", python.display()));
            Probe { found: Vec::new(), missing: all, too_old: Vec::new(), problem }
        }
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr).trim().lines().last().unwrap_or_default().to_owned();
            let problem = Some(format!("`{}`: {said}", python.display()));
            Probe { found: Vec::new(), missing: all, too_old: Vec::new(), problem }
        }
        Ok(output) => of_answer(adapter, &String::from_utf8_lossy(&output.stdout)),
    }
}

/// What the lines `package version` and `package -` say.
fn of_answer(adapter: &Adapter, text: &str) -> Probe {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    let (missing, found): (Vec<_>, Vec<_>) = pairs.partition(|(_, version)| *version == "-");
    let owned = |(package, version): (&str, &str)| (package.to_owned(), version.to_owned());
    let is_old = |package: &&Package| {
        let version = found.iter().find(|(name, _)| *name == package.name).map(|(_, version)| *version);
        version.is_some_and(|version| numbers(version) < numbers(package.least))
    };
    let too_old = adapter.packages.iter().filter(is_old);
    Probe {
        too_old: too_old.map(|package| format!("{}>={}", package.name, package.least)).collect(),
        found: found.into_iter().map(owned).collect(),
        missing: missing.into_iter().map(|(package, _)| package.to_owned()).collect(),
        problem: None,
    }
}

/// The leading numbers of a version: `0.3.36.dev0` is 0, 3, 36. The adapters' `check_versions` reads them alike.
fn numbers(version: &str) -> Vec<u64> {
    let digits = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>();
    version.split('.').map_while(|part| digits(part).parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::adapters::ADAPTERS;

    #[test]
    fn packages_are_there_missing_or_too_old() {
        let transformers = ADAPTERS.iter().find(|adapter| adapter.name == "transformers").unwrap();
        let probe = of_answer(transformers, "torch 2.15.0+cu132\ntransformers 4.9.1\nbitsandbytes -\n");
        assert_eq!(probe.too_old, ["transformers>=4.56"]);
        assert_eq!((probe.missing, probe.found.len()), (vec!["bitsandbytes".to_owned()], 2));
        for (older, newer) in
            [("4.9.1", "4.56"), ("0.3.9", "0.3.10"), ("2.4", "2.15.0+cu132"), ("0.46.0.dev1", "0.46.1")]
        {
            assert!(numbers(older) < numbers(newer), "{older} {newer}");
        }
        assert!(numbers("4.56.0rc1") >= numbers("4.56"));
    }
}
