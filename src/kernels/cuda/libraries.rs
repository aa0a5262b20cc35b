//! Where the CUDA libraries are. They are opened when something of them is first asked for, so that a machine without them
//! runs everything else, and are found without `LD_LIBRARY_PATH`.

use std::ffi::{CStr, OsString, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_LAZY};

use crate::error::BadInput;

/// A library that this program calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    Driver,
    Blas,
    Random,
}

pub const LIBRARIES: [Library; 3] = [Library::Driver, Library::Blas, Library::Random];

impl Library {
    /// Whose `function` is, by the beginning of its name.
    pub fn of(function: &CStr) -> Self {
        let name = function.to_bytes();
        match () {
            () if name.starts_with(b"cublas") => Self::Blas,
            () if name.starts_with(b"curand") => Self::Random,
            () => Self::Driver,
        }
    }

    pub fn file(self) -> &'static str {
        match self {
            Self::Driver => "libcuda.so.1",
            Self::Blas => "libcublas.so.13",
            Self::Random => "libcurand.so.10",
        }
    }

    /// What it needs from its own folder, opened first, since the system's loader may not look there.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Blas => &["libcublasLt.so.13"],
            Self::Driver | Self::Random => &[],
        }
    }

    fn opened(self) -> Option<&'static Opened> {
        static OPENED: [OnceLock<Option<Opened>>; LIBRARIES.len()] = [const { OnceLock::new() }; LIBRARIES.len()];
        OPENED[self as usize].get_or_init(|| open(self, &folders(&|name| std::env::var_os(name)))).as_ref()
    }

    /// Where it was found; `None` where it is missing.
    pub fn place(self) -> Option<Place> {
        self.opened().map(|opened| opened.place)
    }
}

/// Which search found a library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// By the system's loader, or where drivers and toolkits install by default.
    System,
    /// Below `CUDA_HOME` or `CUDA_PATH`.
    Home,
    /// Among the packages of a Python, where PyTorch brings them.
    Python,
}

impl Place {
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Home => "CUDA_HOME",
            Self::Python => "Python packages",
        }
    }
}

struct Opened {
    handle: Handle,
    place: Place,
}

/// Folders beside those of the system's loader in which drivers, toolkits and containers put libraries.
const SYSTEM: [&str; 4] =
    ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib", "/run/opengl-driver/lib"];
/// Of a toolkit.
const OF_HOME: [&str; 3] = ["lib64", "lib", "targets/x86_64-linux/lib"];

/// The address of a function, for calls of its own signature. `None` where the library or the function is missing.
pub fn function(library: Library, name: &CStr) -> Option<*const c_void> {
    let opened = library.opened()?;
    // SAFETY: nothing is called here, and the library stays open for as long as the program runs.
    let symbol = unsafe { opened.handle.get::<*const c_void>(name.to_bytes_with_nul()) }.ok()?;
    Some(symbol.into_raw().cast_const())
}

/// Fails, naming all that is missing and where to get it. `go_on` ends the hint.
pub fn check(go_on: &str) -> Result<(), BadInput> {
    let missing: Vec<Library> = LIBRARIES.into_iter().filter(|library| library.place().is_none()).collect();
    complaint(&missing, go_on).map_or(Ok(()), Err)
}

fn complaint(missing: &[Library], go_on: &str) -> Option<BadInput> {
    let files: Vec<&str> = missing.iter().map(|library| library.file()).collect();
    let (last, others) = files.split_last()?;
    let message = match others {
        [] => format!("the CUDA library `{last}` is missing"),
        _ => format!("the CUDA libraries `{}` and `{last}` are missing", others.join("`, `")),
    };
    let of_driver = "install an NVIDIA driver for `libcuda.so.1`; ";
    let of_toolkit = "`pip install nvidia-cublas==13.* nvidia-curand==10.*` or set CUDA_HOME to a CUDA 13 toolkit; ";
    let driver = if missing.contains(&Library::Driver) { of_driver } else { "" };
    let toolkit = if missing.iter().any(|&library| library != Library::Driver) { of_toolkit } else { "" };
    Some(BadInput::new(message).hint(format!("{driver}{toolkit}{go_on}")))
}

/// The system's loader looks first.
fn open(library: Library, folders: &[(PathBuf, Place)]) -> Option<Opened> {
    if let Some(handle) = open_file(Path::new(library.file())) {
        return Some(Opened { handle, place: Place::System });
    }
    let holds = |(folder, _): &&(PathBuf, Place)| folder.join(library.file()).exists();
    folders.iter().filter(holds).find_map(|(folder, place)| {
        for needed in library.needs() {
            // What is missing shows below; what was opened stays so.
            std::mem::forget(open_file(&folder.join(needed)));
        }
        open_file(&folder.join(library.file())).map(|handle| Opened { handle, place: *place })
    })
}

/// As if the program had been linked against it: its symbols are there for libraries that are opened later.
fn open_file(path: &Path) -> Option<Handle> {
    // SAFETY: NVIDIA's libraries run nothing but their own initialisers when they are opened.
    unsafe { Handle::open(Some(path), RTLD_LAZY | RTLD_GLOBAL) }.ok()
}

/// All that the system's loader does not know, in the order in which they are tried. `variable` is the environment.
fn folders(variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<(PathBuf, Place)> {
    let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path);
    let of_homes = homes.flat_map(|home| OF_HOME.map(|folder| home.join(folder)));
    let system = SYSTEM.into_iter().map(PathBuf::from);
    let on_path = variable("PATH").unwrap_or_default();
    let with_python = std::env::split_paths(&on_path).filter(|folder| folder.join("python3").exists());
    let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path);
    let prefixes = prefixes.chain(with_python.filter_map(|folder| folder.parent().map(Path::to_owned)));
    let prefixes = prefixes.chain(path("HOME").map(|home| home.join(".local")));
    let of_python = prefixes.flat_map(|prefix| of_python(&prefix));
    let placed = |place| move |folder| (folder, place);
    let own = of_homes.map(placed(Place::Home)).chain(system.map(placed(Place::System)));
    own.chain(of_python.map(placed(Place::Python))).collect()
}

/// `lib` itself, where conda puts libraries, and `lib/python3.N/site-packages/nvidia/NAME/lib`, where pip does.
fn of_python(prefix: &Path) -> Vec<PathBuf> {
    let lib = prefix.join("lib");
    let pythons = entries(&lib)
        .into_iter()
        .filter(|folder| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
    let packages =
        pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|name| python.join(name).join("nvidia")));
    let found = packages.flat_map(|nvidia| entries(&nvidia)).map(|package| package.join("lib"));
    std::iter::once(lib.clone()).chain(found).collect()
}

/// In rising order; none where there is no such folder.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_belong_to_the_library_of_their_name() {
        for (name, library) in
            [(c"cuInit", Library::Driver), (c"cublasCreate_v2", Library::Blas), (c"curandSetStream", Library::Random)]
        {
            assert_eq!(Library::of(name), library, "{name:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_where_to_get_it() {
        assert!(complaint(&[], "go on").is_none());
        for (missing, said, hinted, not_hinted) in [
            (&[Library::Driver][..], "`libcuda.so.1` is missing", "driver", "pip"),
            (&[Library::Random], "`libcurand.so.10` is missing", "pip install", "driver"),
            (&LIBRARIES, "`libcuda.so.1`, `libcublas.so.13` and `libcurand.so.10` are missing", "driver", "nothing"),
        ] {
            let error = complaint(missing, "go on").expect("something is missing");
            let hint = error.hint_text().expect("a hint").to_owned();
            assert!(error.to_string().contains(said), "{error}");
            assert!(hint.contains(hinted) && !hint.contains(not_hinted) && hint.ends_with("go on"), "{hint}");
        }
    }

    #[test]
    fn folders_are_those_of_the_toolkit_then_of_python() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let at = |path: &str| root.path().join(path);
        let packages = "lib/python3.11/site-packages/nvidia";
        for folder in [
            "venv/lib/python3.11/site-packages/nvidia/cu13/lib",
            "conda/bin",
            "home/.local/lib/python3/dist-packages/nvidia/curand",
        ] {
            std::fs::create_dir_all(at(folder)).expect("a folder");
        }
        std::fs::create_dir_all(at("conda").join(packages).join("cublas")).expect("a folder");
        std::fs::write(at("conda/bin/python3"), "").expect("a file");
        let variable = |name: &str| match name {
            "CUDA_HOME" => Some(at("cuda").into_os_string()),
            "CUDA_PATH" => Some(OsString::new()),
            "VIRTUAL_ENV" => Some(at("venv").into_os_string()),
            "PATH" => Some(std::env::join_paths([at("bin"), at("conda/bin")]).expect("a path")),
            "HOME" => Some(at("home").into_os_string()),
            _ => None,
        };
        let found = folders(&variable);
        let of = |place: Place| found.iter().filter(move |(_, of)| *of == place).map(|(folder, _)| folder.clone());
        let expected = |names: &[&str]| names.iter().map(|name| at(name)).collect::<Vec<_>>();
        assert_eq!(
            of(Place::Home).collect::<Vec<_>>(),
            expected(&["cuda/lib64", "cuda/lib", "cuda/targets/x86_64-linux/lib"])
        );
        let python = [
            "venv/lib",
            "venv/lib/python3.11/site-packages/nvidia/cu13/lib",
            "conda/lib",
            "conda/lib/python3.11/site-packages/nvidia/cublas/lib",
            "home/.local/lib",
            "home/.local/lib/python3/dist-packages/nvidia/curand/lib",
        ];
        assert_eq!(of(Place::Python).collect::<Vec<_>>(), expected(&python));
        assert!(folders(&|_| None).iter().all(|(_, place)| *place == Place::System));
    }
}
