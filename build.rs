//! Names commit and target for `--version`; with feature `cuda`, compiles each `src/**/*.cu` to `$OUT_DIR/<name>.fatbin`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
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
        println!(
            "cargo::rerun-if-changed=src\ncargo::rerun-if-env-changed=CUDA_HOME\ncargo::rerun-if-env-changed={SHARED}"
        );
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

/// Where builds share what nvcc has made; by default each keeps its own. A name is a hash of all that its code depends on.
const SHARED: &str = "QUANTBENCH_FATBINS";

fn compile_kernels(out: &Path) {
    let kept = env::var_os(SHARED).map_or_else(|| out.join("kept"), PathBuf::from);
    fs::create_dir_all(&kept).unwrap_or_else(|error| fail(&format!("{}: {error}", kept.display())));
    let said = nvcc_version();
    let headers: Vec<Vec<u8>> = files_of(Path::new("src"), &["cuh"]).iter().map(|path| read(path)).collect();
    for source in files_of(Path::new("src"), &["cu"]) {
        let (text, stem) = (read(&source), source.file_stem().expect("a file").display());
        // Step kernels once more with clock stamps, and with what few models need, experts last.
        let is_step = String::from_utf8_lossy(&text).contains("quant/step.cuh");
        let builds = [
            ("", None),
            ("_traced", Some("-DSTEP_TRACED")),
            ("_featured", Some("-DSTEP_FEATURED")),
            ("_experts", Some("-DSTEP_EXPERTS")),
        ];
        for (suffix, define) in &builds[..if is_step { builds.len() } else { 1 }] {
            let arguments: Vec<String> = arguments().chain(define.map(str::to_owned)).collect();
            let key = hash(&(&said, &arguments, &source, &text, &headers));
            let (made, fatbin) =
                (kept.join(format!("{stem}{suffix}-{key:016x}.fatbin")), out.join(format!("{stem}{suffix}.fatbin")));
            if !made.exists() {
                compile(&source, &arguments, &made);
            }
            fs::copy(&made, &fatbin).unwrap_or_else(|error| fail(&format!("{}: {error}", made.display())));
        }
    }
}

/// Under another name until it is whole: another build may look for it.
fn compile(source: &Path, arguments: &[String], made: &Path) {
    let part = made.with_extension(format!("{}.part", std::process::id()));
    let status = Command::new("nvcc").args(arguments).arg("-o").arg(&part).arg(source).status();
    if !status.is_ok_and(|status| status.success()) || fs::rename(&part, made).is_err() {
        fail(&format!("nvcc could not compile {}", source.display()));
    }
}

fn arguments() -> impl Iterator<Item = String> {
    let for_all =
        ["-fatbin", "-O3", "-std=c++17", "-Isrc", "-Werror", "all-warnings", "--threads=0"].map(str::to_owned);
    let ptx = format!("-gencode=arch=compute_{PTX},code=compute_{PTX}");
    let codes = CHIPS.map(|chip| format!("-gencode=arch=compute_{chip},code=sm_{chip}"));
    for_all.into_iter().chain(codes).chain([ptx])
}

fn hash(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())))
}

/// In the order of their names, which a folder does not have.
fn files_of(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let is_wanted = |path: &PathBuf| path.extension().is_some_and(|found| extensions.iter().any(|&e| found == e));
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = paths.flat_map(|p| if p.is_dir() { files_of(&p, extensions) } else { vec![p] }).filter(is_wanted);
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    files
}

/// What nvcc says of itself.
fn nvcc_version() -> String {
    let said = Command::new("nvcc").arg("--version").output().ok();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if let Some(refusal) = nvcc_refusal(said.as_deref()) {
        fail(&refusal);
    }
    said.unwrap_or_default()
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
