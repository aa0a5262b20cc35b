//! The Python that adapters run with, and what it has.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::adapters::Adapter;

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
    let packages: Vec<&str> = adapter.packages.iter().map(|(_, package)| *package).collect();
    let output = Command::new(python).arg("-c").arg(ASK).args(&packages).stdin(Stdio::null()).output();
    let all = packages.iter().map(|package| (*package).to_owned()).collect();
    match output {
        Err(error) => {
            let problem = Some(format!("`{}` cannot be started: {error}", python.display()));
            Probe { found: Vec::new(), missing: all, problem }
        }
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr).trim().lines().last().unwrap_or_default().to_owned();
            Probe { found: Vec::new(), missing: all, problem: Some(format!("`{}`: {said}", python.display())) }
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let pairs = text.lines().filter_map(|line| line.split_once(' '));
            let (missing, found): (Vec<_>, Vec<_>) = pairs.partition(|(_, version)| *version == "-");
            let owned = |(package, version): (&str, &str)| (package.to_owned(), version.to_owned());
            Probe {
                found: found.into_iter().map(owned).collect(),
                missing: missing.into_iter().map(|(package, _)| package.to_owned()).collect(),
                problem: None,
            }
        }
    }
}
