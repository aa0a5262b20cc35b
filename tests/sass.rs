//! The machine code of our kernels as the toolkit compiled it for each chip: nothing spills, weights move 16 bytes at a time, and
//! a step over them takes few enough instructions that reading them stays what takes the time. Needs no GPU, but `cuobjdump`
//! and `nvdisasm`, which scripts/cuda-toolkit.sh gets; where they are missing the tests say so and skip.
#![cfg(feature = "cuda")]

mod skips;

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Command;

use quantbench::kernels::cuda::attend;
use quantbench::kernels::cuda::choose;
use quantbench::kernels::cuda::launch::Fatbin;
use quantbench::kernels::cuda::rows;
use quantbench::kernels::cuda::step_kernel::{EXPERTS_STATIC_BYTES, HOPPER_STATIC_BYTES};
use quantbench::quant::{dense, int8, nf4};

const OURS: [&Fatbin; 12] = [
    &attend::KERNELS,
    &dense::cuda::KERNELS.plain,
    &dense::cuda::ENCODE_KERNELS,
    &int8::cuda::KERNELS.plain,
    &int8::cuda::ENCODE_KERNELS,
    &nf4::cuda::KERNELS.plain,
    &nf4::cuda::ENCODE_KERNELS,
    &nf4::cuda::ROWS_KERNELS,
    &int8::cuda::ROWS_KERNELS,
    &dense::cuda::ROWS_KERNELS,
    &choose::KERNELS,
    &rows::KERNELS,
];

/// A chip that there is machine code for, and the bytes that memory gives one of its multiprocessors in a clock: the H100 reads 3015
/// GB/s with 132 at 1.755 GHz, the A100 1750 with 108 at 1.41, the RTX 3090 936 with 82 at 1.7, the L40S 780 with 142 at 1.8, the RTX
/// 2080 Ti 560 with 68 at 1.55.
struct Chip {
    sm: u32,
    bytes_per_clock: f64,
}

impl Chip {
    /// Steps of a way round a streaming loop: `STEPS_OF_SLOT` of pipeline.cuh.
    fn steps(&self) -> usize {
        if self.sm == 90 { 2 } else { 1 }
    }

    /// As in the names of what is compiled for it.
    fn name(&self) -> String {
        format!("sm_{}{}", self.sm, if self.sm == 90 { "a" } else { "" })
    }
}

const CHIPS: [Chip; 5] = [
    Chip { sm: 75, bytes_per_clock: 5.3 },
    Chip { sm: 80, bytes_per_clock: 11.5 },
    Chip { sm: 86, bytes_per_clock: 6.7 },
    Chip { sm: 89, bytes_per_clock: 3.1 },
    Chip { sm: 90, bytes_per_clock: 13.0 },
];

/// Threads whose instructions a multiprocessor can issue in a clock: four warps.
const ISSUED_PER_CLOCK: f64 = 128.0;
/// The share of the issue slots that a step over the weights may take while memory is read at full speed.
const SHARE: f64 = 0.5;
/// NF4's with double quantization on Hopper, whose memory gives the most bytes in a clock: 2.59 instructions a weight are 51 % of the
/// slots, as few as were found (docs/engine.md).
const NF4_NESTED_SHARE_ON_HOPPER: f64 = 0.512;

/// A step of a streaming loop: a warp's kilobyte of weights. Hopper takes two at a time.
struct Step {
    kernel: &'static str,
    what: &'static str,
    weights: u32,
    bytes_per_weight: f64,
    /// Instruction that multiplies, and how often a step needs it; on Turing, whose tensor cores take smaller tiles, more often.
    multiplies: (&'static str, usize),
    on_turing: usize,
    /// What tells it from other loops of its kernel.
    besides: Option<(Mark, usize)>,
}

const INT8: Step = Step::of("int8_step", "", 1024, 1.0, ("IMMA", 2), 8);
/// A look-up for every pair of weights of a lane.
const LOOKUPS: Option<(Mark, usize)> = Some((Mark::Narrow("LDS"), 32));

const STEPS: [Step; 7] = [
    Step::of("half_step", "", 512, 2.0, ("HMMA", 2), 4),
    Step::of("half_step", "over fp32", 256, 4.0, ("FFMA", 6), 6),
    Step::of("nf4_nested_step", "over fp16", 512, 2.0, ("HMMA", 2), 4),
    INT8,
    // Two columns of outliers for one lane: a search for the first bit that is set each.
    Step { what: "with two outliers", besides: Some((Mark::Name("FLO"), 2)), ..INT8 },
    Step { besides: LOOKUPS, ..Step::of("nf4_nested_step", "", 2048, 0.515_87, ("HMMA", 8), 16) },
    Step { besides: LOOKUPS, ..Step::of("nf4_plain_step", "", 2048, 0.5625, ("HMMA", 8), 16) },
];

impl Step {
    const fn of(
        kernel: &'static str,
        what: &'static str,
        weights: u32,
        bytes_per_weight: f64,
        multiplies: (&'static str, usize),
        on_turing: usize,
    ) -> Self {
        Self { kernel, what, weights, bytes_per_weight, multiplies, on_turing, besides: None }
    }

    /// Instructions of a thread for each weight that leave the other issue slots free while memory is read at full speed.
    fn budget(&self, chip: &Chip) -> f64 {
        let share = match (self.kernel, self.weights, chip.sm) {
            ("nf4_nested_step", 2048, 90) => NF4_NESTED_SHARE_ON_HOPPER,
            _ => SHARE,
        };
        ISSUED_PER_CLOCK * share * self.bytes_per_weight / chip.bytes_per_clock
    }

    /// What a way round the loop has to hold to be whole steps.
    fn needs(&self, chip: &Chip) -> Vec<(Mark, usize)> {
        let (multiply, n) = self.multiplies;
        let (n, copy) = match chip.sm {
            75 => (self.on_turing, (Mark::Wide("LDG"), 2)),
            // Another warp copies: this one waits for a full stage, and releases it when it is read.
            90 if !self.kernel.starts_with("nf4") => (n, (Mark::Name("SYNCS"), 2)),
            90 => (n, (Mark::Wide("LDGSTS"), 4)),
            _ => (n, (Mark::Wide("LDGSTS"), 2)),
        };
        let of_steps = |(mark, n): (Mark, usize)| (mark, n * chip.steps());
        let besides = self.besides.map(|(mark, n)| (mark, n * if self.what.is_empty() { chip.steps() } else { 1 }));
        let multiplies = of_steps((Mark::Name(multiply), n));
        [multiplies, copy, of_steps((Mark::Wide("LDS"), 2))].into_iter().chain(besides).collect()
    }
}

/// What an instruction is known by.
#[derive(Clone, Copy)]
enum Mark {
    Name(&'static str),
    /// Of 128 bits.
    Wide(&'static str),
    /// Of 32 bits.
    Narrow(&'static str),
}

impl Mark {
    fn is_on(self, instruction: &Instruction) -> bool {
        let mut parts = instruction.operation.split('.');
        match self {
            Mark::Name(name) => parts.next() == Some(name),
            Mark::Wide(name) => parts.next() == Some(name) && parts.any(|part| part == "128"),
            Mark::Narrow(name) => parts.next() == Some(name) && !parts.any(|part| part == "64" || part == "128"),
        }
    }
}

struct Instruction {
    /// As disassembled, without the address.
    text: String,
    /// Its name with what qualifies it: `LDG.E.128`.
    operation: String,
    /// Where it may go on: behind itself, at a label, or nowhere.
    next: Vec<usize>,
}

struct Kernel {
    name: String,
    instructions: Vec<Instruction>,
}

impl Kernel {
    /// The shortest closed way through the code that holds all `needs`: what one step of a loop runs through, without the
    /// branches that it only sometimes takes. Places along with how much of each need was met, breadth first.
    fn shortest_way(&self, needs: &[(Mark, usize)]) -> Option<Vec<&Instruction>> {
        // From the rarest.
        let starts_of = |need: &(Mark, usize)| -> Vec<usize> {
            (0..self.instructions.len()).filter(|&at| need.0.is_on(&self.instructions[at])).collect()
        };
        let starts = needs.iter().map(starts_of).min_by_key(Vec::len)?;
        starts.into_iter().filter_map(|start| self.way_from(start, needs)).min_by_key(Vec::len)
    }

    fn way_from(&self, start: usize, needs: &[(Mark, usize)]) -> Option<Vec<&Instruction>> {
        let all: Vec<usize> = needs.iter().map(|need| need.1).collect();
        let first = (start, vec![0; needs.len()]);
        let mut before = HashMap::from([(first.clone(), None)]);
        let mut queue = VecDeque::from([first]);
        while let Some((at, met)) = queue.pop_front() {
            let instruction = &self.instructions[at];
            // A loop over weights or keys waits for no other warp.
            if Mark::Name("BAR").is_on(instruction) {
                continue;
            }
            let reaches =
                |(index, met): (usize, &usize)| (met + usize::from(needs[index].0.is_on(instruction))).min(all[index]);
            let met_behind: Vec<usize> = met.iter().enumerate().map(reaches).collect();
            for &next in &instruction.next {
                if next == start && met_behind == all {
                    return Some(self.way_back((at, met), &before));
                }
                let place = (next, met_behind.clone());
                if next < self.instructions.len() && !before.contains_key(&place) {
                    before.insert(place.clone(), Some((at, met.clone())));
                    queue.push_back(place);
                }
            }
        }
        None
    }

    fn way_back(&self, last: Place, before: &HashMap<Place, Option<Place>>) -> Vec<&Instruction> {
        let places = std::iter::successors(Some(last), |place| before[place].clone());
        let mut way: Vec<&Instruction> = places.map(|(at, _)| &self.instructions[at]).collect();
        way.reverse();
        way
    }
}

/// An instruction, and how much of each need was met before it.
type Place = (usize, Vec<usize>);

/// The kernels in a disassembled file.
fn parse(text: &str) -> Vec<Kernel> {
    let sections = text.split("\t.section\t.text.").skip(1);
    sections.map(|section| Kernel { name: word(section).to_owned(), instructions: instructions(section) }).collect()
}

fn word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '.').next().unwrap_or("")
}

/// Lines are `.L_x_7:` or `/*01a0*/ @!P0 BRA `(.L_x_7) ;`.
fn instructions(section: &str) -> Vec<Instruction> {
    let mut labels: HashMap<&str, usize> = HashMap::new();
    let mut lines: Vec<&str> = Vec::new();
    for line in section.lines().map(str::trim) {
        if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, lines.len());
        } else if let Some((address, rest)) = line.strip_prefix("/*").and_then(|line| line.split_once("*/"))
            && address.len() >= 4
            && address.bytes().all(|byte| byte.is_ascii_hexdigit())
            && let Some((instruction, _)) = rest.split_once(';')
        {
            lines.push(instruction.trim());
        }
    }
    let made = lines.iter().enumerate().map(|(at, line)| {
        let (condition, rest) = match line.strip_prefix('@').and_then(|line| line.split_once(' ')) {
            Some((condition, rest)) => (Some(condition), rest.trim_start()),
            None => (None, *line),
        };
        let (operation, operands) = rest.split_once(' ').unwrap_or((rest, ""));
        let target = operands.split_once("`(").map(|(_, label)| word(label)).and_then(|label| labels.get(label));
        let is_certain = condition.is_none() && operands.starts_with('`');
        let next = match word(operation.split('.').next().unwrap_or("")) {
            "BRA" => target.copied().into_iter().chain((!is_certain).then_some(at + 1)).collect(),
            "EXIT" | "RET" if condition.is_none() => Vec::new(),
            _ => vec![at + 1],
        };
        Instruction { text: (*line).to_owned(), operation: operation.to_owned(), next }
    });
    made.collect()
}

/// As a file alone in a folder, which goes with the first of the two.
fn written(fatbin: &Fatbin) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join(format!("{}.fatbin", fatbin.name));
    std::fs::write(&file, fatbin.image).expect("write a fatbin");
    (folder, file)
}

/// The kernels of a fatbin on each chip; `None`, with the reason printed, where the tools are missing.
fn disassemble(fatbin: &Fatbin) -> Option<Vec<(&'static Chip, Vec<Kernel>)>> {
    let (folder, file) = written(fatbin);
    run("cuobjdump", &["-xelf", "all"], &file)?;
    let mut cubins: Vec<_> =
        std::fs::read_dir(folder.path()).expect("the folder").flatten().map(|entry| entry.path()).collect();
    cubins.retain(|path| path.extension().is_some_and(|extension| extension == "cubin"));
    CHIPS
        .iter()
        .map(|chip| {
            let name = format!("{}.", chip.name());
            let is_its = |path: &&PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().contains(&name));
            let cubin =
                cubins.iter().find(is_its).unwrap_or_else(|| panic!("{}: no code for sm_{}", fatbin.name, chip.sm));
            Some((chip, parse(&run("nvdisasm", &["-c"], cubin)?)))
        })
        .collect()
}

/// What a tool of the toolkit prints of `file`.
#[track_caller]
fn run(tool: &str, arguments: &[&str], file: &Path) -> Option<String> {
    let folder = file.parent().expect("a file has a folder");
    match Command::new(tool).args(arguments).arg(file).current_dir(folder).output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => panic!("{tool} {}: {}", file.display(), String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            skips::skip(format!("`{tool}` does not run ({error}); scripts/cuda-toolkit.sh gets it"));
            None
        }
    }
}

fn text(way: &[&Instruction]) -> String {
    way.iter().map(|instruction| format!("    {}\n", instruction.text)).collect()
}

#[test]
fn nothing_spills() {
    for fatbin in OURS {
        let Some(chips) = disassemble(fatbin) else { return };
        for (chip, kernels) in &chips {
            assert!(!kernels.is_empty(), "{}: no kernels for sm_{}", fatbin.name, chip.sm);
            for kernel in kernels {
                let is_local = |one: &&Instruction| ["LDL", "STL"].iter().any(|name| Mark::Name(name).is_on(one));
                let local: Vec<&Instruction> = kernel.instructions.iter().filter(is_local).collect();
                assert!(local.is_empty(), "{} on sm_{}:\n{}", kernel.name, chip.sm, text(&local));
            }
        }
    }
}

#[test]
fn steps_over_the_weights_leave_half_the_issue_slots_free() {
    let fatbins = [&dense::cuda::KERNELS.plain, &int8::cuda::KERNELS.plain, &nf4::cuda::KERNELS.plain];
    let Some(files) = fatbins.into_iter().map(disassemble).collect::<Option<Vec<_>>>() else { return };
    let mut problems = Vec::new();
    for step in &STEPS {
        for (chip, kernels) in files.iter().flatten() {
            let Some(kernel) = kernels.iter().find(|kernel| kernel.name == step.kernel) else { continue };
            let what = format!("{} {} on sm_{}", step.kernel, step.what, chip.sm);
            let Some(way) = kernel.shortest_way(&step.needs(chip)) else {
                problems.push(format!("{what}: no loop that copies 16 bytes at a time and multiplies what it copied"));
                continue;
            };
            let per_weight = 32.0 * way.len() as f64 / f64::from(step.weights) / chip.steps() as f64;
            let budget = step.budget(chip);
            println!("{what}: {} instructions round the loop, {per_weight:.2} a weight of {budget:.2}", way.len());
            if per_weight > budget {
                problems
                    .push(format!("{what}: {per_weight:.2} instructions a weight, over {budget:.2}:\n{}", text(&way)));
            }
        }
        let found =
            files.iter().flatten().filter(|(_, kernels)| kernels.iter().any(|kernel| kernel.name == step.kernel));
        assert_eq!(found.count(), CHIPS.len(), "{} is not compiled for every chip", step.kernel);
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Lines are `Function NAME:`, then `REG:96 STACK:0 SHARED:7648 ...`, which counts what the system keeps.
#[test]
fn steps_leave_their_pipelines_the_planned_memory() {
    const OF_SYSTEM: usize = 1024;
    let steps = [&dense::cuda::KERNELS, &int8::cuda::KERNELS, &nf4::cuda::KERNELS];
    let with_experts = HOPPER_STATIC_BYTES + EXPERTS_STATIC_BYTES;
    let builds = steps.into_iter().flat_map(|step| {
        let without = [&step.plain, &step.featured].map(|fatbin| (fatbin, HOPPER_STATIC_BYTES));
        without.into_iter().chain([(&step.experts, with_experts)])
    });
    for (fatbin, room) in builds {
        let (_folder, file) = written(fatbin);
        let Some(usage) = run("cuobjdump", &["-arch", "sm_90a", "-res-usage"], &file) else { return };
        let lines: Vec<&str> = usage.lines().map(str::trim).collect();
        let steps = lines.windows(2).filter_map(|pair| {
            let name = pair[0].strip_prefix("Function ")?.strip_suffix(":")?;
            let shared = pair[1].split_once("SHARED:")?.1.split(' ').next()?.parse::<usize>().ok()? - OF_SYSTEM;
            // Kernels of formats with tables have fewer stages, which do not depend on this.
            (name.ends_with("_step") && !name.starts_with("nf4_nested_s") && !name.starts_with("nf4_plain_s"))
                .then_some((name, shared))
        });
        let steps: Vec<_> = steps.collect();
        assert!(!steps.is_empty(), "no steps in {usage}");
        for (name, shared) in steps {
            println!("{name}: {shared} bytes");
            assert!(shared <= room, "{}: {name}: {shared} bytes of static variables", fatbin.name);
        }
    }
}

#[test]
fn attention_reads_its_cache_in_wide_loads() {
    /// Two keys and two values of 16 bytes for each lane.
    const WAY_BYTES: f64 = 4.0 * 16.0 * 32.0;
    let Some(chips) = disassemble(&dense::cuda::KERNELS.plain) else { return };
    for (chip, kernels) in &chips {
        let step = kernels.iter().find(|kernel| kernel.name == "half_step").expect("the kernel of a step");
        // Two keys and their values are in flight in the loop that takes powers.
        let way = step.shortest_way(&[(Mark::Name("MUFU"), 2), (Mark::Wide("LDG"), 4)]);
        let len = way.map_or(usize::MAX, |way| way.len());
        // As for weights: half of the issue slots while memory gives the bytes of a way at full speed.
        let budget = ISSUED_PER_CLOCK / 32.0 * SHARE * WAY_BYTES / chip.bytes_per_clock;
        println!("sm_{}: {len} instructions round the loop over keys, of {budget:.0}", chip.sm);
        assert!(len as f64 <= budget, "sm_{}: {len} instructions round the loop over keys, over {budget:.0}", chip.sm);
    }
}

#[test]
fn the_shortest_way_is_a_step_without_what_it_skips() {
    let code = "\t.section\t.text.loop,\"ax\",@progbits\n\
        .text.loop:\n\
        \t/*0000*/ MOV R1, R2 ;\n\
        .L_x_0:\n\
        \t/*0010*/ @!P0 BRA `(.L_x_1) ;\n\
        \t/*0020*/ MOV R3, R4 ;\n\
        \t/*0030*/ MOV R5, R6 ;\n\
        .L_x_1:\n\
        \t/*0040*/ LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;\n\
        \t/*0050*/ HMMA.16816.F32 R4, R8, R12, R4 ;\n\
        \t/*0060*/ LDS.128 R8, [R1] ;\n\
        \t/*0070*/ @P1 BRA `(.L_x_0) ;\n\
        \t/*0080*/ EXIT ;\n";
    let kernels = parse(code);
    assert_eq!((kernels.len(), kernels[0].name.as_str(), kernels[0].instructions.len()), (1, "loop", 9));
    let way = |needs: &[(Mark, usize)]| kernels[0].shortest_way(needs).map(|way| way.len());
    let copy = (Mark::Wide("LDGSTS"), 1);
    assert_eq!(way(&[(Mark::Name("HMMA"), 1), copy]), Some(5));
    assert_eq!(way(&[(Mark::Name("HMMA"), 1), copy, (Mark::Name("MOV"), 2)]), Some(7), "what is skipped was asked for");
    assert_eq!(way(&[(Mark::Name("HMMA"), 2), copy]), Some(10), "twice round");
    assert_eq!(way(&[(Mark::Name("EXIT"), 1), copy]), None);
}
