//! The kernels' sources compiled for this machine, and a launcher that runs them.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::{env, fs, thread};

use candle_core::{Error, Result};
use half::f16;
use libloading::Library;
use quantbench::kernels::cuda::gemm::{Gemm, Operand, Type};
use quantbench::kernels::cuda::launch::{Fatbin, Grid, Launcher};
use quantbench::kernels::cuda::step_kernel::DeviceProperties;

use super::memory::{Memory, Plain};

/// The chips whose paths through device.cuh and the formats' kernels differ: without asynchronous copies, with those of single
/// threads, and with those of a unit of their own.
pub const CHIPS: [u32; 3] = [750, 890, 900];

/// A `.cu` on the host.
struct Unit {
    /// File name without extension.
    name: String,
    chip: u32,
    kernels: Vec<String>,
    library: Library,
}

/// All sources for all chips; `Err` says why there are none.
static UNITS: LazyLock<std::result::Result<Vec<Unit>, String>> = LazyLock::new(compile);
/// Kernels that have run.
static LAUNCHED: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

/// Returns whether kernels can run here; where not, the test is skipped.
#[track_caller]
pub fn is_there() -> bool {
    UNITS.as_ref().inspect_err(|reason| crate::skips::skip(reason)).is_ok()
}

/// Kernels of the sources that nothing has launched.
pub fn never_launched() -> Vec<&'static str> {
    let launched = LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner);
    let ours = units().iter().filter(|unit| unit.name != "checks").flat_map(|unit| &unit.kernels);
    ours.map(String::as_str).filter(|kernel| !launched.contains(kernel)).collect()
}

fn units() -> &'static [Unit] {
    UNITS.as_ref().expect("`is_there` was asked")
}

/// Runs kernels as `chip` has them on `memory`.
pub struct Host<'a> {
    pub chip: u32,
    pub memory: &'a Memory,
}

impl Host<'_> {
    /// As of a device of this chip.
    pub fn properties(&self, multiprocessors: usize) -> DeviceProperties {
        let [major, minor] = [self.chip / 100, self.chip / 10 % 10].map(|digit| digit as i32);
        // So little that attention never takes longer than what could go beside it.
        DeviceProperties { multiprocessors, bytes_per_us: 0, compute_capability: (major, minor) }
    }

    /// All products of `gemm`, summed in fp64 and rounded once.
    fn products<T: Plain, U: Plain>(&self, gemm: &Gemm, widen: impl Fn(T) -> f64, round: impl Fn(f64) -> U) {
        let Gemm { m, n, k, batch, a, b, b_is_transposed, out, alpha, from: _, to: _ } = *gemm;
        let read = |operand: Operand, rows: usize, columns: usize, at: usize| -> Vec<f64> {
            let start = operand.address + (at * operand.batch_stride * size_of::<T>()) as u64;
            let values = self.memory.read::<T>(start, (rows - 1) * operand.stride + columns);
            let row = |row: usize| &values[row * operand.stride..][..columns];
            (0..rows).flat_map(row).map(|value| widen(*value)).collect()
        };
        for at in 0..batch {
            let a = read(a, m, k, at);
            let b = if b_is_transposed { read(b, n, k, at) } else { read(b, k, n, at) };
            let weight =
                |row: usize, column: usize| if b_is_transposed { b[column * k + row] } else { b[row * n + column] };
            for (row, a) in a.chunks_exact(k).enumerate() {
                let sum = |column| {
                    a.iter().enumerate().map(|(row, a)| a * weight(row, column)).sum::<f64>() * f64::from(alpha)
                };
                let sums: Vec<U> = (0..n).map(|column| round(sum(column))).collect();
                let start = at * out.batch_stride + row * out.stride;
                self.memory.write(out.address + (start * size_of::<U>()) as u64, &sums);
            }
        }
    }
}

impl Launcher for Host<'_> {
    /// Runs twice, with threads in rising and in falling order, which must leave the same bits.
    unsafe fn launch(
        &self,
        fatbin: &'static Fatbin,
        kernel: &'static str,
        grid: Grid,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let wanted = |unit: &&Unit| unit.name == fatbin.name;
        // Sources that no chip differs in are compiled once.
        let mut units = units().iter().filter(wanted);
        let unit = units.clone().find(|unit| unit.chip == self.chip).or_else(|| units.next());
        let unit = unit.ok_or_else(|| Error::msg(format!("no source {}.cu", fatbin.name)))?;
        let before = self.memory.snapshot();
        unit.run(kernel, grid, parameters, Order::Rising)?;
        let after = self.memory.snapshot();
        self.memory.restore(&before);
        unit.run(kernel, grid, parameters, Order::Falling)?;
        if self.memory.snapshot() != after {
            candle_core::bail!("{kernel}: threads in another order leave other bits");
        }
        if !self.memory.is_kept() {
            candle_core::bail!("{kernel}: writes behind a buffer");
        }
        LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner).insert(kernel);
        Ok(())
    }

    /// In place of cuBLAS.
    unsafe fn multiply(&self, gemm: &Gemm) -> Result<()> {
        match (gemm.from, gemm.to) {
            (Type::Half, Type::Half) => self.products(gemm, f16::to_f64, f16::from_f64),
            (Type::Half, Type::Float) => self.products(gemm, f16::to_f64, |sum| sum as f32),
            (Type::Float, Type::Float) => self.products(gemm, |value: f32| f64::from(value), |sum| sum as f32),
            // Sums of bytes are exact in fp64.
            (Type::Byte, Type::Int) => self.products(gemm, |byte: u8| f64::from(byte.cast_signed()), |sum| sum as i32),
            (from, to) => candle_core::bail!("cuBLAS has no product of {from:?} as {to:?}"),
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Rising = 0,
    Falling = 1,
}

/// `shim::Launch` of block.hpp.
#[repr(C)]
struct Launch {
    kernel: *const c_char,
    parameters: *mut *mut c_void,
    blocks_x: u32,
    blocks_y: u32,
    threads: u32,
    is_falling: u32,
    is_concurrent: u32,
    shared_bytes: usize,
    message: *mut c_char,
    message_bytes: usize,
}

impl Unit {
    fn run(&self, kernel: &str, grid: Grid, parameters: &mut [*mut c_void], order: Order) -> Result<()> {
        let name = CString::new(kernel).map_err(Error::wrap)?;
        let mut message = [0u8; 1024];
        let launch = Launch {
            kernel: name.as_ptr(),
            parameters: parameters.as_mut_ptr(),
            blocks_x: u32::try_from(grid.blocks.0).map_err(Error::wrap)?,
            blocks_y: u32::try_from(grid.blocks.1).map_err(Error::wrap)?,
            threads: grid.threads,
            is_falling: order as u32,
            is_concurrent: u32::from(grid.cooperative),
            shared_bytes: grid.shared_bytes,
            message: message.as_mut_ptr().cast(),
            message_bytes: message.len(),
        };
        // SAFETY: unit.cpp defines it so, and `Launch` mirrors its argument. Parameters are as the kernel declares them, by
        // the promise of whoever launches; what the kernel touches outside of its buffers is caught.
        let has_run = unsafe {
            let run =
                self.library.get::<unsafe extern "C" fn(*const Launch) -> c_int>(b"shim_run").map_err(Error::wrap)?;
            run(&launch)
        };
        match (has_run, CStr::from_bytes_until_nul(&message)) {
            (1, _) => Ok(()),
            (_, Ok(message)) => Err(Error::msg(message.to_string_lossy().into_owned())),
            (_, Err(error)) => Err(Error::wrap(error)),
        }
    }
}

fn compile() -> std::result::Result<Vec<Unit>, String> {
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
    let version = Command::new(&compiler).args(["-std=c++20", "-E", "-x", "c++", "/dev/null"]).output();
    if !version.as_ref().is_ok_and(|said| said.status.success()) {
        return Err(format!("`{compiler}` is no C++20 compiler; CXX names another"));
    }
    let mut sources = files(&root().join("src"), &["cu"]);
    sources.push(root().join("tests/shim/checks.cu"));
    let mut wanted = Vec::new();
    for source in sources {
        let text = fs::read_to_string(&source).expect("a source");
        let differs = text.contains("step.cuh") || text.contains("__CUDA_ARCH__");
        let chips = if differs { &CHIPS[..] } else { &CHIPS[CHIPS.len() - 1..] };
        let builds = if text.contains("quant/step.cuh") { &["", "featured", "experts"][..] } else { &[""] };
        let wanted_of = |build: &&'static str| {
            chips.iter().map(|chip| (source.clone(), *build, kernels(&text), *chip)).collect::<Vec<_>>()
        };
        wanted.extend(builds.iter().flat_map(wanted_of));
    }
    let queue = Mutex::new(wanted.into_iter());
    let work = || {
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        std::iter::from_fn(next)
            .map(|(source, build, kernels, chip)| unit(&compiler, &source, build, kernels, chip))
            .collect()
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    Ok(thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| -> Vec<Unit> { worker.join().expect("a compiler") }).collect()
    }))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names of the kernels in a source, those that the macros of step.cuh and few_rows.cuh make included.
fn kernels(text: &str) -> Vec<String> {
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let plain = text.split("__global__ void ").skip(1).map(|rest| {
        let rest = match rest.strip_prefix("__launch_bounds__(") {
            Some(rest) => rest.split_once(')').map_or("", |(_, rest)| rest).trim_start(),
            None => rest,
        };
        name(rest)
    });
    let steps = text.split("\nSTEP_KERNEL(").skip(1).map(|rest| format!("{}_step", name(rest)));
    let few_rows = text.split("\nFEW_ROWS_KERNEL(").skip(1).map(name);
    plain.chain(steps).chain(few_rows).collect()
}

/// Compiles where the library is older than anything it is made of.
fn unit(compiler: &str, source: &Path, build: &str, kernels: Vec<String>, chip: u32) -> Unit {
    let stem = source.file_stem().expect("a file").to_string_lossy();
    let name = if build.is_empty() { stem.into_owned() } else { format!("{stem}_{build}") };
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("shim-{name}-{chip}.so"));
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let shim = root().join("tests/shim");
    let made_of =
        [files(&root().join("src"), &["cu", "cuh"]), files(&shim, &["cu", "cuh", "cpp", "hpp", "rs"])].concat();
    let newest = made_of.iter().filter_map(|path| modified(path)).max();
    if modified(&library).is_none_or(|built| Some(built) <= newest) {
        // Renamed when whole: another run may have the old one open.
        let partial = library.with_extension(format!("{}.partial", std::process::id()));
        let kernels: String = kernels.iter().map(|kernel| format!("KERNEL({kernel})")).collect();
        let made = Command::new(compiler)
            .args(["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-w"])
            // What C++ leaves open is not what kernels rely on; no product and sum in one rounding; no assumption that
            // nobody else changes a static between two of a thread's operations.
            .args(["-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-ipa-reference", "-U_FORTIFY_SOURCE"])
            .arg("-ftrivial-auto-var-init=pattern")
            .args(["-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error"])
            .arg(format!("-D__CUDA_ARCH__={chip}"))
            .args((!build.is_empty()).then(|| format!("-DSTEP_{}", build.to_uppercase())))
            .arg(format!("-DSOURCE=\"{}\"", source.display()))
            .arg(format!("-DKERNELS={kernels}"))
            .arg("-I")
            .arg(shim.join("include"))
            .arg("-I")
            .arg(root().join("src"))
            .arg(shim.join("unit.cpp"))
            .arg("-o")
            .arg(&partial)
            .output()
            .expect("the compiler that was just asked");
        let said = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{compiler} cannot compile {} for {chip}:\n{said}", source.display());
        fs::rename(&partial, &library).expect("the library that was just made");
    }
    // SAFETY: the library was made of this checkout, and has no initialiser with demands of its own.
    let library = unsafe { Library::new(&library) }.unwrap_or_else(|error| panic!("{}: {error}", library.display()));
    Unit { name, chip, kernels, library }
}

fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let is_wanted = |path: &PathBuf| path.extension().is_some_and(|found| extensions.iter().any(|&e| found == e));
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.flat_map(|p| if p.is_dir() { files(&p, extensions) } else { vec![p] }).filter(is_wanted).collect()
}
