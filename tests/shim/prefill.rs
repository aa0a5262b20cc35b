//! Whole prompts, encoders and pictures of tiny models, by the calls that the engine queues on a GPU, against the reference runs in
//! tests/golden; cuBLAS is the host's.

use quantbench::engine::{self, Device, Setup};
use quantbench::events::Silent;
use quantbench::harness::picture::Preprocessor;
use quantbench::kernels::isa::Isa;
use quantbench::plan::EncoderInputKind;
use quantbench::quant::{FormatOptions, int8};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};

use super::coverage::combinations;
use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::session::{Session, folder, golden};
use super::step::{Case, RUNS, families, follow, of_family};

/// Steps behind a prompt, the first of which it makes itself.
const N_GEN: usize = 2;

/// Eight tokens attend in a launch of our own, 37 through cuBLAS.
pub fn prompts_follow_the_reference() {
    let models = ["llama-tiny", "llama-odd", "phi-tiny", "phi-odd"];
    let runs = RUNS.map(|run| ["p1", "p2"].map(|prompt| (run, prompt)));
    for (turn, (model, (run, prompt))) in combinations(&models, runs.as_flattened(), 1).into_iter().enumerate() {
        prompt_of(model, run, prompt, CHIPS[turn % CHIPS.len()]);
    }
}

/// Prompts that fit a family's window or original length, and longer ones.
pub fn prompts_of_families_follow_the_reference() {
    let runs = RUNS.map(|run| ["p1", "p2"].map(|prompt| (run, prompt)));
    for (turn, (model, (run, prompt))) in combinations(&families(), runs.as_flattened(), 1).into_iter().enumerate() {
        prompt_of(model, of_family(model, run), prompt, CHIPS[turn % CHIPS.len()]);
    }
}

pub fn encoders_follow_the_reference() {
    prompt_of("t5-tiny", RUNS[0], "p2", CHIPS[0]);
    prompt_of("t5-odd", RUNS[1], "p1", CHIPS[1]);
    prompt_of("t5-tied-relu", RUNS[0], "p1", CHIPS[2]);
    prompt_of("paligemma-odd", RUNS[0], "p0", CHIPS[1]);
}

fn prompt_of(model: &str, case: Case, prompt: &str, chip: u32) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let mut session = Session::load(model, case.0, &host, 16);
    let mut ids = ids(model, prompt);
    match session.model.encoder.as_ref().map(|encoder| encoder.input) {
        None => {}
        Some(EncoderInputKind::Tokens) => {
            session.encode(&ids, &[]);
            ids = vec![session.model.decoder_start.expect("a start")];
        }
        Some(EncoderInputKind::Picture(picture)) => {
            let config = std::fs::read_to_string(folder(model).join("preprocessor_config.json")).expect("a file");
            let config = serde_json::from_str(&config).expect("JSON");
            let preprocessor = Preprocessor::new(Some(&config), picture.size).expect("a preprocessor");
            let pixels = preprocessor.open(&folder(model).join("image.png")).expect("a picture").values;
            session.encode(&[], &pixels);
        }
    }
    session.prefill(&ids);
    let what = format!("{model} {} {prompt}, chip {chip}", case.0);
    follow(&mut session, case, (model, prompt), ids.len(), N_GEN, &what);
}

fn ids(model: &str, prompt: &str) -> Vec<u32> {
    golden(model, "golden", &format!("{prompt}.input_ids")).iter().map(|id| *id as u32).collect()
}

/// Outliers are found once for all matrices that read the same rows: as many as the CPU engine finds. No activation of these prompts
/// is within fp16's rounding of the threshold.
pub fn prompts_find_the_outliers_of_the_cpu() {
    for (turn, (model, prompt)) in [("llama-tiny", "p2"), ("phi-odd", "p1")].into_iter().enumerate() {
        let memory = Memory::default();
        let host = Host { chip: CHIPS[turn], memory: &memory };
        let mut session = Session::load(model, "int8", &host, 16);
        session.prefill(&ids(model, prompt));
        let on_cpu = outliers_on_cpu(model, &ids(model, prompt));
        let found = engine::OutlierColumns { columns: session.outlier_columns(), ..session.examined };
        assert_eq!(found, on_cpu, "{model} {prompt}");
    }
}

fn outliers_on_cpu(model: &str, ids: &[u32]) -> engine::OutlierColumns {
    let request = ModelRequest::of(folder(model).display().to_string());
    let checkpoint = weights::open(&request, &Silent).expect("a golden model");
    let plan = quantbench::models::build(&checkpoint.config).expect("a golden model");
    let source = checkpoint.source(&plan.matrices, &plan.vectors).expect("a golden model");
    let setup = Setup {
        model: &plan,
        source: source.as_ref(),
        formats: &Formats::new(int8::ID, FormatOptions::default()),
        device: Device::Cpu,
        threads: 1,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: 64,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    let mut session = engine::cpu::load(&setup, Isa::detect(), &Silent).expect("a session").session;
    session.prefill(ids).expect("a prompt");
    session.outlier_columns().expect("counts")
}
