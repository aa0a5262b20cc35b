//! What one launch of a step's kernel runs: jobs, one after the other, as job.cuh has them.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, sys};
use candle_core::{CudaDevice, Result, bail};

use super::attention::Attention;
use super::attributes;
use super::launch::{Fatbin, Grid, Kernel, Launcher, dimension, launch};
use super::matvec::{CHUNK_BYTES, Epilogue, Family, Input, Matvec, Mode, Product, TILE_ROWS};
use super::memory::driver_error;
use crate::parameters;

/// As in job.cuh.
const THREADS: usize = 512;
const LANES: usize = 32;
pub(super) const WARPS: usize = THREADS / LANES;
const COPIERS: usize = 4;
const MAX_SLOTS: usize = 5;
/// What a block may have on Hopper, and what is left of it for static variables.
const HOPPER_SHARED_BYTES: usize = 227 << 10;
pub const HOPPER_STATIC_BYTES: usize = 8 << 10;

/// Where no job of the launch has written what another one reads.
const NONE: i32 = -1;
/// Tags of fp16 values have 16 bits, and those of two steps must differ.
const MAX_JOBS: usize = (1 << 16) / 2 - 1;
/// What attention and the wait in front of it take of a block, beside reading keys and values (docs/benchmarks.md).
const ATTENTION_US: usize = 5;

/// A kernel that runs programs. Each reads fp16 and fp32 matrices, and those of one format of its own.
pub struct StepKernel {
    pub fatbin: &'static Fatbin,
    pub name: &'static str,
    /// Whether tables of its format share the memory with what warps copy ahead.
    pub has_tables: bool,
    /// Words that a lane copies for a step beside the weights: `Place::WORDS`.
    pub place_words: usize,
    /// Of what one matrix and tile add to a row.
    pub partial_bytes: usize,
    /// What its own decoder makes of an element of x, in eighths of a byte.
    pub converted_eighths: usize,
}

/// Whose decoder reads a job's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Half,
    Float,
    /// The kernel's own.
    Own,
}

/// As `struct Job`; numbered as `enum Kind` of job.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C, i32)]
pub enum Job {
    Half(Matvec),
    Float(Matvec),
    Own(Matvec),
    Attention(Attention),
}

// SAFETY: laid out as the kernels' struct, and made of numbers and of addresses that are the caller's promise at each launch.
unsafe impl DeviceRepr for Job {}

/// Where the token goes, as `struct Head`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Head {
    /// `[blocks]` of 8 bytes; 0 where no job is a head.
    pub best: u64,
    /// Token, position and step.
    pub state: u64,
    pub host: u64,
    pub table: u64,
    pub embedding: u64,
    pub table_scale: f32,
    pub table_stride: i32,
    pub hidden: i32,
    pub host_slots: i32,
    pub advance: i32,
}

/// All that a launch is told, as `struct Program`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Program {
    only: Job,
    jobs: u64,
    code: u64,
    /// Two counters of 32 bits: [`COUNTERS`], zero at first; 0 for a single job without a head.
    pub ended: u64,
    pub head: Head,
    n_jobs: i32,
    slots: i32,
}

/// Blocks that have ended a launch, zero between launches, and launches of several jobs.
pub const COUNTERS: usize = 2;

/// An fp32 value as kernels of several jobs keep it: with a tag, here that of a value that nobody waits for.
pub fn tagged_float(value: f32) -> u64 {
    u64::from(value.to_bits())
}

/// What a launch depends on.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    pub multiprocessors: usize,
    /// Bytes that memory gives in a microsecond; 0 where the driver does not tell.
    pub bytes_per_us: usize,
    /// Major and minor.
    pub compute_capability: (i32, i32),
}

impl Facts {
    pub fn of(device: &CudaDevice) -> Result<Self> {
        use sys::CUdevice_attribute_enum as attribute;
        let stream = device.cuda_stream();
        let ask = |attribute| stream.context().attribute(attribute).map_err(driver_error);
        Ok(Self {
            multiprocessors: usize::try_from(ask(attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?).unwrap_or(1),
            bytes_per_us: attributes::of(stream.context().ordinal()).bytes_per_us().unwrap_or(0),
            compute_capability: (
                ask(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                ask(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
        })
    }

    /// Whether warps of their own copy the weights, as `RingOf` of step.cuh says.
    fn has_copiers(self, kernel: &StepKernel) -> bool {
        self.compute_capability.0 == 9 && kernel.place_words == 0
    }

    fn threads(self, kernel: &StepKernel) -> usize {
        THREADS + if self.has_copiers(kernel) { COPIERS * LANES } else { 0 }
    }

    /// Slots of a warp's ring and the bytes of each, as ring.cuh has them, beside `of_job` bytes. Chips newer than 9.x run what is
    /// compiled for 8.9.
    fn ring(self, kernel: &StepKernel, of_job: usize) -> (usize, usize) {
        // `SLOTS`, `SLOTS_BESIDE_TABLES` and `STEPS_OF_SLOT`.
        let (alone, beside_tables, steps) = match self.compute_capability {
            (9, _) => (3, 3, 2),
            (8, 0) => (6, 4, 1),
            (7, _) => (1, 1, 1),
            _ => (3, 2, 1),
        };
        let rows_bytes = steps * TILE_ROWS * CHUNK_BYTES + CHUNK_BYTES / 2;
        let slot_bytes = rows_bytes + steps * size_of::<u32>() * LANES * kernel.place_words;
        let slots = if self.has_copiers(kernel) {
            let free = (HOPPER_SHARED_BYTES - HOPPER_STATIC_BYTES).saturating_sub(of_job);
            (free / (WARPS * slot_bytes)).clamp(2, MAX_SLOTS)
        } else if kernel.has_tables {
            beside_tables
        } else {
            alone
        };
        (slots, slot_bytes)
    }
}

impl Job {
    /// Shared memory beside the warps' rings.
    fn shared_bytes(&self, kernel: &StepKernel) -> usize {
        let (matvec, converted_eighths) = match self {
            Self::Half(matvec) => (matvec, 0),
            Self::Float(matvec) => (matvec, 8 * size_of::<f32>()),
            Self::Own(matvec) => (matvec, kernel.converted_eighths),
            Self::Attention(attention) => return attention.shared_bytes(),
        };
        let x_eighths = 8 * size_of::<half::f16>() + converted_eighths;
        matvec.partials() * kernel.partial_bytes + matvec.padded() * x_eighths / 8
    }

    /// Rows that it looks through for outlier columns, and their elements.
    pub fn examines(&self) -> (usize, usize) {
        self.matvec().map_or((0, 0), Matvec::examines)
    }

    fn matvec(&self) -> Option<&Matvec> {
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Own(matvec) => Some(matvec),
            Self::Attention(_) => None,
        }
    }

    /// Whether it writes what lies at `address`.
    fn writes(&self, address: u64) -> bool {
        address != 0
            && match self {
                Self::Half(matvec) | Self::Float(matvec) | Self::Own(matvec) => matvec.writes(address),
                Self::Attention(attention) => attention.out == address,
            }
    }

    /// What it awaits: where that lies, and the job that writes it, if one does.
    fn awaits(&self) -> Vec<(u64, Option<usize>)> {
        let of = |address: u64, job: i32| (address, usize::try_from(job).ok());
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Own(matvec) => {
                matvec.inputs().iter().map(|input| of(input.x, input.of_job)).collect()
            }
            Self::Attention(Attention { q, k, v, of_job, .. }) => {
                [q, k, v].into_iter().zip(of_job).map(|(address, job)| of(*address, *job)).collect()
            }
        }
    }

    fn of(kind: Kind, matvec: Matvec) -> Self {
        match kind {
            Kind::Half => Self::Half(matvec),
            Kind::Float => Self::Float(matvec),
            Kind::Own => Self::Own(matvec),
        }
    }

    fn kind(&self) -> Option<Kind> {
        match self {
            Self::Half(_) => Some(Kind::Half),
            Self::Float(_) => Some(Kind::Float),
            Self::Own(_) => Some(Kind::Own),
            Self::Attention(_) => None,
        }
    }
}

/// Jobs of a launch, in their order.
pub struct Jobs {
    facts: Facts,
    list: Vec<Job>,
    families: Vec<&'static Family>,
    /// What the kernel's own decoder needs, 0 without.
    code: u64,
}

impl Jobs {
    pub fn new(facts: Facts) -> Self {
        Self { facts, list: Vec::new(), families: Vec::new(), code: 0 }
    }

    /// As [`Matvec::new`].
    pub fn multiply(
        &mut self,
        mode: Mode,
        mut inputs: Vec<Input>,
        parts: &[Product],
        epilogue: Epilogue,
    ) -> Result<()> {
        let mut parts = parts.to_vec();
        // Kernels read one after the other: first what is there first.
        if let [first, second] = &inputs[..]
            && self.writer(first.x) > self.writer(second.x)
        {
            inputs.reverse();
            parts.reverse();
        }
        let matvec = Matvec::new(self.facts, mode, inputs, &parts, epilogue)?;
        for matrix in parts.iter().map(|part| part.matrix) {
            self.families.push(matrix.family);
            self.code = self.code.max(matrix.code);
        }
        self.push(Job::of(parts[0].matrix.family.kind, matvec))
    }

    /// Attention; if the matrices before it make something else than its q, k and v that takes long enough, that becomes a job of its
    /// own between the two, in which blocks that attend have less to do.
    pub fn attend(&mut self, attention: Attention) -> Result<()> {
        attention.check()?;
        let outs = [attention.q, attention.k, attention.v];
        if let Some(job) = self.list.last_mut()
            && let Some(kind) = job.kind()
            && let Job::Half(matvec) | Job::Float(matvec) | Job::Own(matvec) = job
            && let Some(mut beside) = matvec.split_off(&outs, ATTENTION_US * self.facts.bytes_per_us, self.facts)
        {
            let of_block = ATTENTION_US * self.facts.bytes_per_us / self.facts.multiprocessors;
            beside.spare(attention.units(), of_block + attention.unit_bytes(), self.facts);
            self.list.push(Job::of(kind, beside));
        }
        self.push(Job::Attention(attention))
    }

    /// The last job that writes what lies at `address`.
    fn writer(&self, address: u64) -> i32 {
        self.list.iter().rposition(|job| job.writes(address)).map_or(NONE, |at| at as i32)
    }

    /// Adds a job that finds the writers of what it reads.
    fn push(&mut self, mut job: Job) -> Result<()> {
        let writer = |address| self.writer(address);
        match &mut job {
            Job::Half(matvec) | Job::Float(matvec) | Job::Own(matvec) => matvec.link(writer)?,
            Job::Attention(attention) => attention.of_job = [attention.q, attention.k, attention.v].map(writer),
        }
        self.list.push(job);
        Ok(())
    }

    /// That no value is written anew before all have read it: no block asks for that, but each has what every reader made of it, since
    /// a matrix job reads all that its inputs' jobs made, and those of theirs.
    fn check_order(&self) -> Result<()> {
        let n = self.list.len();
        if n > MAX_JOBS {
            bail!("{n} jobs, allowed are {MAX_JOBS}");
        }
        let awaits: Vec<_> = self.list.iter().map(Job::awaits).collect();
        // By job, those whose results it has.
        let mut has = vec![vec![false; n]; n];
        for at in 0..n {
            for writer in awaits[at].iter().filter_map(|(_, writer)| *writer) {
                let of_writer = has[writer].clone();
                has[at].iter_mut().zip(of_writer).for_each(|(has, of_writer)| *has |= of_writer);
                has[at][writer] = true;
            }
        }
        for (writer, job) in self.list.iter().enumerate() {
            // A unit of attention has a part of what it awaits, and all that this was made of.
            let has_part =
                |reader: usize| job.matvec().is_none() && awaits[writer].iter().any(|(_, of)| *of == Some(reader));
            let is_overwritten = |reader: &usize| awaits[*reader].iter().any(|(address, _)| job.writes(*address));
            let misses = |reader: &usize| !has[writer][*reader] || has_part(*reader);
            if let Some(reader) = (0..writer).filter(is_overwritten).find(misses) {
                bail!("job {writer} may write what job {reader} has not read yet");
            }
        }
        Ok(())
    }

    /// For the launch to find them at one address.
    pub fn list(&self) -> &[Job] {
        &self.list
    }

    /// The launch, which finds [`Self::list`] at `jobs`: 0 for a single one.
    pub fn plan(&self, jobs: u64) -> Result<Planned> {
        self.plan_on(self.kernel()?, jobs)
    }

    /// As [`Self::plan`], by a kernel that reads all matrices.
    pub fn plan_on(&self, kernel: &'static StepKernel, jobs: u64) -> Result<Planned> {
        let Some(&only) = self.list.first().filter(|_| self.list.len() == 1 || jobs != 0) else {
            bail!("{} jobs at no address", self.list.len())
        };
        self.check_order()?;
        let of_job = self.list.iter().map(|job| job.shared_bytes(kernel)).max().unwrap_or(0);
        let of_job = of_job.next_multiple_of(16);
        let (slots, slot_bytes) = self.facts.ring(kernel, of_job);
        let grid = Grid {
            shared_bytes: WARPS * slots * slot_bytes + of_job,
            cooperative: self.list.len() > 1,
            ..Grid::new((self.facts.multiprocessors, 1), self.facts.threads(kernel) as u32)
        };
        let (n_jobs, slots) = (dimension(self.list.len())?, dimension(slots)?);
        let program = Program { only, jobs, code: self.code, ended: 0, head: Head::default(), n_jobs, slots };
        Ok(Planned { kernel, grid, program })
    }

    /// The first kernel that reads all matrices.
    fn kernel(&self) -> Result<&'static StepKernel> {
        let own = || self.families.iter().filter(|family| family.kind == Kind::Own);
        let Some(first) = own().next().or(self.families.first()) else { bail!("a launch of no matrices") };
        let reads = |kernel: &StepKernel, family: &Family| family.kernels.iter().any(|other| other.name == kernel.name);
        match first.kernels.iter().find(|kernel| own().all(|family| reads(kernel, family))) {
            Some(kernel) => Ok(kernel),
            None => bail!("no kernel reads the matrices of all jobs"),
        }
    }
}

/// A launch made of shapes and addresses alone, on whatever machine they are.
#[derive(Clone, Copy)]
pub struct Planned {
    kernel: &'static StepKernel,
    grid: Grid,
    pub program: Program,
}

impl Planned {
    /// Loads the kernel onto a device, which must have the shared memory for it.
    pub fn ready(self, device: &CudaDevice) -> Result<Ready> {
        let Self { kernel: StepKernel { fatbin, name, .. }, grid, program } = self;
        let kernel = fatbin.kernel(device, name)?;
        kernel.allow_shared(grid.shared_bytes)?;
        if kernel.blocks_per_multiprocessor(grid.threads, grid.shared_bytes)? == 0 {
            bail!(
                "`{name}` needs {} bytes of shared memory for its longest row, more than this device has",
                grid.shared_bytes
            );
        }
        Ok(Ready { kernel, grid, program })
    }

    /// # Safety
    /// Every address that this launch was made of is still good.
    pub unsafe fn launch_on(&self, launcher: &dyn Launcher) -> Result<()> {
        let StepKernel { fatbin, name, .. } = self.kernel;
        // SAFETY: steps' kernels take one struct, which `Program` mirrors; the caller vouches for the addresses.
        unsafe { launcher.launch(fatbin, name, self.grid, parameters![self.program]) }
    }
}

/// A launch, ready to be repeated.
pub struct Ready {
    kernel: Kernel,
    grid: Grid,
    program: Program,
}

impl Ready {
    /// # Safety
    /// Every address that this launch was made of is still good.
    pub unsafe fn launch(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: as [`Planned::launch_on`].
        unsafe { launch(device, self.kernel, self.grid, parameters![self.program]) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matvec::{Puts, Streamed};
    use super::*;

    static NO_CODE: Fatbin = Fatbin { name: "none", image: &[] };

    fn kernel(has_tables: bool, place_words: usize) -> StepKernel {
        StepKernel { fatbin: &NO_CODE, name: "none", has_tables, place_words, partial_bytes: 4, converted_eighths: 0 }
    }

    #[test]
    fn rings_take_what_a_job_leaves() {
        let on = |compute_capability| Facts { multiprocessors: 132, bytes_per_us: 0, compute_capability };
        let (half, nf4) = (&kernel(false, 0), &kernel(true, 1));
        let slots = |of_job| on((9, 0)).ring(half, of_job).0;
        assert_eq!([slots(0), slots(50_000), slots(100_000), slots(140_000), slots(400_000)], [5, 5, 3, 2, 2]);
        for of_job in (0..150_000).step_by(16) {
            let (slots, bytes) = on((9, 0)).ring(half, of_job);
            assert!(
                WARPS * slots * bytes + of_job <= HOPPER_SHARED_BYTES - HOPPER_STATIC_BYTES,
                "beside {of_job} bytes"
            );
        }
        assert_eq!([on((9, 0)).threads(half), on((9, 0)).threads(nf4), on((8, 9)).threads(half)], [640, 512, 512]);
        assert_eq!([on((9, 0)).ring(nf4, 0).0, on((8, 0)).ring(half, 0).0, on((12, 0)).ring(half, 0).0], [3, 6, 3]);
    }

    static HALVES: Family = Family {
        name: "halves",
        kind: Kind::Half,
        chunk: 64,
        kernels: &[],
        product_is_float: false,
        multiply_rows: |_, _, _, _| Ok(()),
    };

    fn multiply(jobs: &mut Jobs, x: u64, is_tagged: i32, out: u64) -> Result<()> {
        let matrix = Streamed {
            family: &HALVES,
            n: 64,
            k: 64,
            weight: 99,
            stride_bytes: 128,
            scales: 0,
            nested: 0,
            offset: 0.0,
            code: 0,
            threshold: f32::NAN,
        };
        let input = Input { x, scale: 1.0, is_tagged, ..Input::default() };
        let product = Product { matrix, bias: 0, out, activation: 0 };
        jobs.multiply(
            Mode::Apart,
            vec![input],
            &[product],
            Epilogue { puts: Puts::TaggedHalves, ..Epilogue::default() },
        )
    }

    /// What jobs of one input each read and write.
    fn chain(jobs: &[(u64, u64)]) -> Jobs {
        let mut made = Jobs::new(Facts { multiprocessors: 4, bytes_per_us: 0, compute_capability: (9, 0) });
        jobs.iter().for_each(|(x, out)| multiply(&mut made, *x, 1, *out).unwrap());
        made
    }

    #[test]
    fn nothing_is_written_anew_before_all_have_read_it() {
        // Its first line: the rest may be a backtrace.
        let said = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
        let order = |jobs: &Jobs| jobs.check_order().map_err(said);
        assert_eq!(order(&chain(&[(1, 2), (2, 3), (3, 1)])), Ok(()));
        let refused = Err("job 1 may write what job 0 has not read yet".to_string());
        assert_eq!(order(&chain(&[(1, 2), (3, 1)])), refused);
        // A head's unit has a part of q; who reads what all of them made has all.
        let attention = |q, out| Attention { q, out, d: 8, d_pad: 8, kv_heads: 1, group: 1, ..Attention::default() };
        let mut direct = chain(&[(1, 2)]);
        direct.attend(attention(2, 1)).unwrap();
        assert_eq!(order(&direct), refused);
        let mut behind = chain(&[(1, 2)]);
        behind.attend(attention(2, 3)).unwrap();
        multiply(&mut behind, 3, 1, 1).unwrap();
        assert_eq!(order(&behind), Ok(()));
    }

    #[test]
    fn what_a_job_of_the_launch_writes_is_read_with_its_tag() {
        let mut jobs = chain(&[(1, 2)]);
        multiply(&mut jobs, 2, 1, 3).unwrap();
        assert_eq!(jobs.list[1].awaits(), [(2, Some(0))]);
        assert_eq!(jobs.list[0].awaits(), [(1, None)]);
        assert!(multiply(&mut jobs, 3, 0, 4).is_err());
    }
}
