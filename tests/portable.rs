//! One CUDA build for every machine: it starts where no CUDA library exists and says what is missing, and finds the libraries in
//! a toolkit or among Python's packages without `LD_LIBRARY_PATH`. Needs no GPU.
#![cfg(feature = "cuda")]

mod shipped;
mod skips;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use shipped::binary;
use tempfile::TempDir;

const DRIVER: &str = "libcuda.so.1";
const OF_TOOLKIT: [&str; 3] = ["libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"];

/// Runs the binary with nothing in its environment but `variables`.
fn run(arguments: &[&str], variables: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(binary());
    command.args(arguments).env_clear().envs(variables.iter().copied());
    command.output().expect("the binary starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Where `doctor` finds the CUDA libraries, in the order of its page; `missing` where it does not.
fn found_in(variables: &[(&str, &Path)]) -> Vec<String> {
    let output = run(&["doctor", "--format", "json"], variables);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let libraries = page["gpu"]["libraries"].as_array().expect("a list of libraries").iter();
    libraries.map(|library| library["found_in"].as_str().unwrap_or("missing").to_owned()).collect()
}

/// The libraries of the toolkit that this was built with, and its stub of a driver.
struct Toolkit {
    libraries: PathBuf,
    driver: PathBuf,
}

impl Toolkit {
    /// `None` where it is not whole: the test is skipped.
    #[track_caller]
    fn of_build() -> Option<Self> {
        let home = std::env::var_os("CUDA_HOME").map(PathBuf::from).unwrap_or_else(|| "/usr/local/cuda".into());
        let folders = ["lib64", "lib"].map(|folder| home.join(folder));
        let found = folders.iter().find(|folder| OF_TOOLKIT.iter().all(|file| folder.join(file).exists()));
        let driver =
            folders.iter().flat_map(|folder| ["stubs/libcuda.so.1", "stubs/libcuda.so"].map(|file| folder.join(file)));
        match (found, driver.into_iter().find(|file| file.exists())) {
            (Some(libraries), Some(driver)) => Some(Self { libraries: libraries.clone(), driver }),
            _ => {
                skips::skip("CUDA_HOME names no toolkit with its libraries and a stub of the driver");
                None
            }
        }
    }

    fn link_driver(&self, folder: &Path) {
        std::fs::create_dir_all(folder).expect("a folder");
        symlink(&self.driver, folder.join(DRIVER)).expect("a link");
    }

    fn link_libraries(&self, folder: &Path) {
        std::fs::create_dir_all(folder).expect("a folder");
        OF_TOOLKIT.iter().for_each(|file| symlink(self.libraries.join(file), folder.join(file)).expect("a link"));
    }
}

/// Whether the system's loader finds any of the libraries by itself, so that no environment hides them.
#[track_caller]
fn is_hidden(folder: &TempDir) -> bool {
    let seen = found_in(&[("HOME", folder.path())]);
    let is_hidden = seen.iter().all(|place| place == "missing");
    if !is_hidden {
        skips::skip(format!("this machine finds CUDA libraries by itself: {seen:?}"));
    }
    is_hidden
}

#[test]
fn no_cuda_library_is_needed_to_start() {
    let needed = needed_libraries(&std::fs::read(binary()).expect("the binary"));
    assert!(needed.iter().any(|name| name.starts_with("libc.so")), "{needed:?}");
    let cuda: Vec<&String> =
        needed.iter().filter(|name| name.starts_with("libcu") || name.starts_with("libnv")).collect();
    let hint = "`nm -D --undefined-only` on the binary lists functions that src/kernels/cuda/functions.rs lacks";
    assert!(cuda.is_empty() || cfg!(not(target_arch = "x86_64")), "{cuda:?}: {hint}");
}

#[test]
fn without_any_cuda_library_the_cpu_works_and_what_is_missing_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    if !is_hidden(&folder) {
        return;
    }
    let environment = [("HOME", folder.path())];
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny");
    let short = ["--model-id", model, "--max-new-tokens", "2", "--repeats", "1", "--warmup", "0", "--quiet"];
    let of = |device| [&short[..], &["--device", device]].concat();
    let on_cpu = run(&of("cpu"), &environment);
    assert_eq!(on_cpu.status.code(), Some(0), "{}", stderr(&on_cpu));

    let page = run(&["doctor"], &environment);
    let on_cuda = run(&of("cuda"), &environment);
    assert_eq!((page.status.code(), on_cuda.status.code()), (Some(0), Some(2)), "{}", stderr(&on_cuda));
    for text in [String::from_utf8_lossy(&page.stdout).into_owned(), stderr(&on_cuda)] {
        for part in [DRIVER, OF_TOOLKIT[0], OF_TOOLKIT[2], "install an NVIDIA driver", "pip install", "--device cpu"] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }
}

#[test]
fn libraries_are_found_in_a_toolkit_and_among_pythons_packages() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let Some(toolkit) = Toolkit::of_build() else { return };
    if !is_hidden(&folder) {
        return;
    }
    let at = |path: &str| folder.path().join(path);
    toolkit.link_driver(&at("home/lib64"));
    toolkit.link_libraries(&at("home/lib64"));
    toolkit.link_driver(&at("driver/lib"));
    toolkit.link_libraries(&at("venv/lib/python3.11/site-packages/nvidia/cu13/lib"));
    let cases = [
        (vec![("CUDA_HOME", at("home"))], ["CUDA_HOME", "CUDA_HOME", "CUDA_HOME"]),
        (
            vec![("CUDA_HOME", at("driver")), ("VIRTUAL_ENV", at("venv"))],
            ["CUDA_HOME", "Python packages", "Python packages"],
        ),
        (vec![("VIRTUAL_ENV", at("venv"))], ["missing", "Python packages", "Python packages"]),
    ];
    for (variables, places) in cases {
        let variables: Vec<(&str, &Path)> = variables.iter().map(|(name, path)| (*name, path.as_path())).collect();
        assert_eq!(found_in(&variables), places, "{variables:?}");
        let output = run(&["--device", "cuda", "--quiet"], &variables);
        // What a call through a jump brings back: the stub answers every one with an error that says what it is.
        let said = if places[0] == "missing" { "`libcuda.so.1` is missing" } else { "a stub for building" };
        assert!(
            output.status.code() == Some(2) && stderr(&output).contains(said),
            "{variables:?}: {}",
            stderr(&output)
        );
    }
}

/// `DT_NEEDED` of a 64-bit little-endian ELF file: names in the string table that the dynamic segment points at.
fn needed_libraries(file: &[u8]) -> Vec<String> {
    const LOAD: u32 = 1;
    const DYNAMIC: u32 = 2;
    const NEEDED: u64 = 1;
    const STRINGS: u64 = 5;
    let u16_at = |at: usize| u16::from_le_bytes(file[at..at + 2].try_into().expect("2 bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!(&file[..6], b"\x7fELF\x02\x01", "not an ELF file of 64 bits");
    let (first, size, n) = (u64_at(32) as usize, usize::from(u16_at(54)), usize::from(u16_at(56)));
    // Kind, place in the file, address and size there.
    let segments: Vec<(u32, u64, u64, u64)> = (0..n)
        .map(|index| first + index * size)
        .map(|at| (u32_at(at), u64_at(at + 8), u64_at(at + 16), u64_at(at + 32)))
        .collect();
    let place_of = |address: u64| {
        let holds =
            |(kind, _, start, size): &&(u32, u64, u64, u64)| *kind == LOAD && (*start..start + size).contains(&address);
        let (_, place, start, _) = segments.iter().find(holds).expect("an address of a segment");
        (place + address - start) as usize
    };
    let (_, place, _, size) = segments.iter().find(|segment| segment.0 == DYNAMIC).expect("a dynamic segment");
    let entries = (*place as usize..(place + size) as usize).step_by(16).map(|at| (u64_at(at), u64_at(at + 8)));
    let (_, strings) = entries.clone().find(|entry| entry.0 == STRINGS).expect("a string table");
    let text = |at: u64| {
        let bytes = file[place_of(strings) + at as usize..].iter().take_while(|byte| **byte != 0);
        bytes.map(|byte| char::from(*byte)).collect()
    };
    entries.filter(|entry| entry.0 == NEEDED).map(|(_, at)| text(at)).collect()
}
