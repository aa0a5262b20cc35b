//! Names commit and target for `--version`; with feature `cuda`, compiles each `src/**/*.cu` to `$OUT_DIR/<name>.fatbin`.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

/// Chips with machine code of their own; anything newer compiles the PTX of the last one when it starts.
const CHIPS: [&str; 5] = ["75", "80", "86", "89", "90"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let (commit, target) = (commit().unwrap_or_else(|| "unknown".into()), env::var("TARGET").unwrap_or_default());
    println!("cargo::rustc-env=QUANTBENCH_COMMIT={commit}\ncargo::rustc-env=QUANTBENCH_TARGET={target}");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        println!("cargo::rerun-if-changed=src\ncargo::rerun-if-env-changed=PATH");
        compile_kernels(&PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")));
    }
}

/// The short hash, where this folder is the top of a checkout. `logs/HEAD` changes with every commit.
fn commit() -> Option<String> {
    let output = |arguments: &[&str]| Command::new("git").args(arguments).output().ok().filter(|o| o.status.success());
    let git = |arguments: &[&str]| Some(String::from_utf8_lossy(&output(arguments)?.stdout).trim().to_owned());
    git(&["rev-parse", "--show-prefix"]).filter(String::is_empty)?;
    let files = ["HEAD", "logs/HEAD"].map(|name| git(&["rev-parse", "--git-path", name]));
    let existing = files.iter().flatten().filter(|file| Path::new(file).exists());
    existing.for_each(|file| println!("cargo::rerun-if-changed={file}"));
    git(&["rev-parse", "--short=9", "HEAD"])
}

/// A fatbin newer than all kernel sources is kept.
fn compile_kernels(out: &Path) {
    let is = |path: &Path, extension: &str| path.extension().is_some_and(|found| found == extension);
    let sources: Vec<PathBuf> = files(Path::new("src")).into_iter().filter(|p| is(p, "cu") || is(p, "cuh")).collect();
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let newest = sources.iter().map(|path| modified(path)).max().flatten();
    let stale = |fatbin: &Path| modified(fatbin).is_none_or(|built| Some(built) <= newest);
    for source in sources.iter().filter(|path| is(path, "cu")) {
        let fatbin = out.join(source.with_extension("fatbin").file_name().expect("a file"));
        if stale(&fatbin) && !nvcc().arg("-o").arg(&fatbin).arg(source).status().is_ok_and(|status| status.success()) {
            fail(&format!("nvcc could not compile {}", source.display()));
        }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn nvcc() -> Command {
    let said = Command::new("nvcc").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let release =
        String::from_utf8_lossy(&said).split_once("release ").and_then(|(_, r)| r.split('.').next()?.parse().ok());
    if release.is_none_or(|major: u32| major < 12) {
        fail("feature `cuda` needs nvcc of CUDA 13.0 on PATH");
    }
    let mut nvcc = Command::new("nvcc");
    nvcc.args(["-fatbin", "-O3", "-std=c++17", "-Isrc", "-Werror", "all-warnings"]);
    nvcc.args(CHIPS.map(|chip| format!("-gencode=arch=compute_{chip},code=sm_{chip}")));
    nvcc.args(CHIPS.last().map(|chip| format!("-gencode=arch=compute_{chip},code=compute_{chip}")));
    nvcc
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}; `eval \"$(scripts/cuda-toolkit.sh DIR)\"` sets it up without root");
    exit(1)
}
