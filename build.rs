//! Names commit and target for `--version`; with feature `cuda`, compiles each `src/**/*.cu` to `$OUT_DIR/<name>.fatbin`.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::time::SystemTime;
use std::{env, fs};

/// Chips with machine code of their own.
/// Hopper's includes what no chip after it has.
const CHIPS: [&str; 5] = ["75", "80", "86", "89", "90a"];
/// Anything newer compiles this chip's PTX when it starts. Not the last one's: steps size their shared memory by the chip, and
/// what they ask for here every newer chip has, while some have less than 9.0.
const PTX: &str = "89";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=QUANTBENCH_COMMIT={}", commit().unwrap_or_else(|| "unknown".into()));
    println!("cargo::rustc-env=QUANTBENCH_TARGET={}", env::var("TARGET").expect("cargo sets TARGET"));
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        println!("cargo::rerun-if-changed=src\ncargo::rerun-if-env-changed=CUDA_HOME");
        compile_kernels(Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")));
    }
}

/// The short hash, where this folder is the top of a checkout; `logs/HEAD` changes with every commit.
fn commit() -> Option<String> {
    let said = |command: &mut Command| command.output().ok().filter(|output| output.status.success());
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    let git = |arguments: &[&str]| Some(text(said(Command::new("git").args(arguments))?.stdout));
    git(&["rev-parse", "--show-prefix"]).filter(String::is_empty)?;
    let files = [git(&["rev-parse", "--git-path", "HEAD"])?, git(&["rev-parse", "--git-path", "logs/HEAD"])?];
    files.iter().filter(|file| Path::new(file).exists()).for_each(|file| println!("cargo::rerun-if-changed={file}"));
    git(&["rev-parse", "--short=9", "HEAD"])
}

/// A fatbin newer than all kernel sources and this file is kept.
fn compile_kernels(out: &Path) {
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let sources = files_of(Path::new("src"), &["cu", "cuh"]);
    let newest = sources.iter().map(PathBuf::as_path).chain([Path::new("build.rs")]).filter_map(modified).max();
    for source in files_of(Path::new("src"), &["cu"]) {
        let fatbin = out.join(source.with_extension("fatbin").file_name().expect("a file"));
        compile(&source, &fatbin, &[], newest);
        // Step kernels once more with clock stamps, and with what few models need.
        if fs::read_to_string(&source).is_ok_and(|text| text.contains("quant/step.cuh")) {
            for (build, define) in [("traced", "-DSTEP_TRACED"), ("featured", "-DSTEP_FEATURED")] {
                let name = format!("{}_{build}.fatbin", source.file_stem().expect("a file").display());
                compile(&source, &out.join(name), &[define], newest);
            }
        }
    }
}

fn compile(source: &Path, fatbin: &Path, defines: &[&str], newest: Option<SystemTime>) {
    let built = fs::metadata(fatbin).and_then(|file| file.modified()).ok();
    let is_stale = built.is_none_or(|built| newest.is_none_or(|newest| built <= newest));
    let mut compiler = nvcc();
    compiler.args(defines).arg("-o").arg(fatbin).arg(source);
    if is_stale && !compiler.status().is_ok_and(|status| status.success()) {
        fail(&format!("nvcc could not compile {}", source.display()));
    }
}

fn files_of(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let is_wanted = |path: &PathBuf| path.extension().is_some_and(|found| extensions.iter().any(|&e| found == e));
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.flat_map(|p| if p.is_dir() { files_of(&p, extensions) } else { vec![p] }).filter(is_wanted).collect()
}

fn nvcc() -> Command {
    let said = Command::new("nvcc").arg("--version").output().ok();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if let Some(refusal) = nvcc_refusal(said.as_deref()) {
        fail(&refusal);
    }
    let mut nvcc = Command::new("nvcc");
    nvcc.args(["-fatbin", "-O3", "-std=c++17", "-Isrc", "-Werror", "all-warnings"]);
    nvcc.args(CHIPS.map(|chip| format!("-gencode=arch=compute_{chip},code=sm_{chip}")));
    nvcc.arg(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
    nvcc
}

/// The oldest CUDA whose nvcc is known to compile the kernels and whose libraries the binary is made for: major and minor version.
const OLDEST_CUDA: (u32, u32) = (13, 0);

/// Why an nvcc that says this of its version cannot be used; `said` is `None` where none can be started.
pub fn nvcc_refusal(said: Option<&str>) -> Option<String> {
    let (major, minor) = OLDEST_CUDA;
    let needs = format!("feature `cuda` needs nvcc of CUDA {major}.{minor} or newer on PATH");
    let Some(said) = said else { return Some(format!("{needs}; there is none")) };
    let numbers = |release: &str| {
        let end = release.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(release.len());
        let mut numbers = release[..end].split('.');
        Some((numbers.next()?.parse::<u32>().ok()?, numbers.next()?.parse::<u32>().ok()?))
    };
    match said.split_once("release ").and_then(|(_, release)| numbers(release)) {
        Some(found) if found >= OLDEST_CUDA => None,
        Some((major, minor)) => Some(format!("{needs}; the one there is of CUDA {major}.{minor}")),
        None => Some(format!("{needs}; the one there names no release")),
    }
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}; `eval \"$(scripts/cuda-toolkit.sh DIR)\"` sets it up without root");
    exit(1)
}
