//! What a CUDA build holds: kernels for every supported chip, and nothing that only one chip can load. Needs no GPU.
#![cfg(feature = "cuda")]

mod shipped;

use quantbench::kernels::cuda::attend;
use quantbench::kernels::cuda::choose;
use quantbench::kernels::cuda::launch::Fatbin;
use quantbench::kernels::cuda::rows;
use quantbench::quant::{dense, int8, nf4};
use shipped::binary;

/// The fatbins of this project.
fn ours() -> Vec<&'static Fatbin> {
    let steps = [&dense::cuda::KERNELS, &int8::cuda::KERNELS, &nf4::cuda::KERNELS];
    let others = [
        &dense::cuda::ENCODE_KERNELS,
        &int8::cuda::ENCODE_KERNELS,
        &nf4::cuda::ENCODE_KERNELS,
        &nf4::cuda::ROWS_KERNELS,
        &int8::cuda::ROWS_KERNELS,
        &dense::cuda::ROWS_KERNELS,
        &choose::KERNELS,
        &attend::KERNELS,
        &rows::KERNELS,
    ];
    let builds = steps.into_iter().flat_map(|step| [&step.plain, &step.traced, &step.featured, &step.experts]);
    builds.chain(others).collect()
}
/// Chips with machine code of their own.
const CHIPS: [u32; 5] = [75, 80, 86, 89, 90];

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Code {
    Ptx,
    Machine,
}

/// The entries of a fatbin: a header of 16 bytes, then entries of kind (1 PTX, 2 ELF) at 0, header size at 4, payload size
/// at 8 and chip at 28, little-endian.
fn entries(image: &[u8]) -> Vec<(Code, u32)> {
    let u16_at = |at: usize| u16::from_le_bytes(image[at..at + 2].try_into().expect("2 bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!(u32_at(0), 0xba55_ed50, "not a fatbin");
    let mut at = usize::from(u16_at(6));
    let mut found = Vec::new();
    while at < image.len() {
        let code = if u16_at(at) == 1 { Code::Ptx } else { Code::Machine };
        found.push((code, u32_at(at + 28)));
        at += u32_at(at + 4) as usize + u32_at(at + 8) as usize;
    }
    found.sort();
    found
}

/// Every word after `.target ` in `bytes`.
fn ptx_targets(bytes: &[u8]) -> Vec<String> {
    let mark = b".target sm_";
    let starts = bytes.windows(mark.len()).enumerate().filter(|(_, window)| window == mark).map(|(at, _)| at + 8);
    let word = |at: usize| bytes[at..].iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_');
    starts.map(|at| word(at).map(|byte| char::from(*byte)).collect()).collect()
}

#[test]
fn our_kernels_have_code_for_every_chip_and_ptx_for_newer_ones() {
    let mut expected: Vec<_> = CHIPS.map(|chip| (Code::Machine, chip)).to_vec();
    expected.insert(0, (Code::Ptx, 89));
    for fatbin in ours() {
        assert_eq!(entries(fatbin.image), expected, "{}.cu", fatbin.name);
    }
}

/// CUDA's libraries are opened when a GPU is asked for, wherever they are: the loader finds none of them here.
#[test]
fn the_binary_starts_where_the_loader_finds_no_cuda() {
    let output = std::process::Command::new(binary()).arg("--version").env_clear().output().expect("start the binary");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn candles_kernels_in_the_binary_run_on_every_supported_chip() {
    let path = binary();
    let targets = ptx_targets(&std::fs::read(&path).expect("the binary"));
    let path = path.display();
    assert!(!targets.is_empty(), "no PTX in {path}");
    let foreign: Vec<_> = targets.iter().filter(|target| *target != "sm_75").collect();
    assert!(foreign.is_empty(), "{foreign:?} in {path}: shipped builds are made with CUDA_COMPUTE_CAP=75");
}
