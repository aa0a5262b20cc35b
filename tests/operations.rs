//! Operations say what they cost, and executors refuse those that they have no code for, by name.

use candle_core::DType;
use quantbench::call::{Batch, KvFormat};
use quantbench::engine::{self, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::plan::{
    AttentionSpec, Model, Norm, NormKind, Op, QkNorm, QkNormOver, Sinks, Softcap, VectorId, Window,
};
use quantbench::quant::{FormatOptions, fp16};
use quantbench::weights::builtin;
use quantbench::weights::policy::Formats;
use quantbench::weights::random::Random;

fn shape(name: &str) -> Model {
    let config = builtin::by_name(name).expect("a built-in shape").config();
    quantbench::models::build(&config).expect("built-in shapes build")
}

/// A built-in model whose first attention of the decoder has one more feature, and what a refusal calls that.
fn unusual_models() -> Vec<(Model, &'static str)> {
    let with = |change: &dyn Fn(&mut AttentionSpec)| {
        let mut model = shape("smollm2-135m");
        let mut specs =
            model.decoder.ops.iter_mut().filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None });
        change(specs.next().expect("an attention"));
        model
    };
    let norm = Norm { kind: NormKind::Rms, weight: VectorId(0), epsilon: 1e-6 };
    vec![
        (with(&|spec| spec.window = Some(Window(128))), "a window of 128"),
        (with(&|spec| spec.softcap = Some(Softcap(50.0))), "scores capped at 50"),
        (
            with(&|spec| spec.qk_norm = Some(QkNorm { q: norm, k: norm, over: QkNormOver::Head })),
            "norms of queries and keys",
        ),
        (with(&|spec| spec.sinks = Some(Sinks(VectorId(0)))), "attention sinks"),
    ]
}

#[cfg(feature = "cuda")]
#[test]
fn the_cuda_lowering_refuses_by_name_what_it_cannot_run() {
    use quantbench::kernels::cuda::step_kernel::DeviceProperties;
    let properties = DeviceProperties { multiprocessors: 132, bytes_per_us: 0, compute_capability: (9, 0) };
    let refusal = |model: &Model| {
        let error = quantbench::lower::cuda::check(model, properties).expect_err("a refusal");
        error.root_cause().to_string().lines().next().unwrap_or_default().to_owned()
    };
    for (model, _) in unusual_models() {
        quantbench::lower::cuda::check(&model, properties).expect("each feature has code");
    }
    let (mut layer_normed, _) = unusual_models().remove(2);
    for op in &mut layer_normed.decoder.ops {
        if let Op::Attention(AttentionSpec { qk_norm: Some(norms), .. }) = op {
            norms.k.kind = NormKind::Layer { bias: VectorId(0) };
        }
    }
    let norms = "norms of queries and keys that are no rms norms of one epsilon";
    assert_eq!(refusal(&layer_normed), format!("the CUDA step cannot run an attention with {norms}"));
    let mut unequal = shape("mixtral-8x7b");
    let odd = unequal
        .decoder
        .ops
        .iter()
        .find_map(|op| if let Op::Experts(spec) = op { Some(spec.experts[5].up) } else { None });
    unequal.matrices[odd.expect("experts").weight.0].n += 1;
    assert_eq!(refusal(&unequal), "the CUDA step cannot run a mixture with experts of several formats or sizes");
    let mut many = shape("mixtral-8x7b");
    for op in &mut many.decoder.ops {
        if let Op::Experts(spec) = op {
            spec.experts.resize(600, spec.experts[0]);
        }
    }
    assert_eq!(refusal(&many), "2 of 600 experts for a token, allowed are 8 of 512");
    // An encoder's attention is no part of a step.
    let mut model = shape("flan-t5-base");
    let encoder = &mut model.encoder.as_mut().expect("an encoder").plan;
    let mut specs =
        encoder.ops.iter_mut().filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None });
    specs.next().expect("an attention").window = Some(Window(128));
    let refused = "the CUDA prefill cannot run an attention that sees what follows with a window of 128";
    assert_eq!(refusal(&model), refused);
    for built_in in builtin::builtin_models() {
        let model = shape(built_in.name);
        quantbench::lower::cuda::check(&model, properties).expect("this shape can be run");
    }
}

/// The message by which `load` refuses a model; nothing is read before.
fn refusal<T>(model: &Model, load: &dyn Fn(&Setup) -> anyhow::Result<T>) -> String {
    refused_call(model, 1, engine::Device::Cpu.kv_format(), load)
}

/// The message by which `load` refuses a number of sequences, or a format of keys and values.
fn refused_call<T>(
    model: &Model,
    sequences: usize,
    kv_format: KvFormat,
    load: &dyn Fn(&Setup) -> anyhow::Result<T>,
) -> String {
    let source = Random::new(0, 0, &model.matrices, &model.vectors);
    let setup = Setup {
        model,
        source: &source,
        formats: &Formats::new(fp16::ID, FormatOptions::default()),
        device: engine::Device::Cpu,
        threads: 1,
        sequences,
        kv_format,
        capacity: 4,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    let error = load(&setup).err().expect("a refusal");
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn executors_refuse_by_name_what_they_cannot_run() {
    let mut model = shape("smollm2-135m");
    let mut specs =
        model.decoder.ops.iter_mut().filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None });
    specs.next().expect("an attention").append = None;
    let cpu = refusal(&model, &|setup| engine::cpu::load(setup, Isa::detect(), &Silent));
    assert_eq!(cpu, "the CPU engine cannot run an attention with a rope and no keys to append");
}

#[test]
fn the_cpu_engine_refuses_caches_that_hold_other_positions_than_are_seen() {
    let cpu = |model: &Model| refusal(model, &|setup| engine::cpu::load(setup, Isa::detect(), &Silent));
    let mut dropping = shape("smollm2-135m");
    dropping.caches[0].window = Some(128);
    assert_eq!(cpu(&dropping), "the CPU engine cannot run an attention over all positions of a cache that holds 128");
    let (mut narrow, _) = unusual_models().remove(0);
    narrow.caches[0].window = Some(256);
    assert_eq!(cpu(&narrow), "the CPU engine cannot run an attention over 128 positions of a cache that holds 256");
}

#[test]
fn executors_refuse_by_name_batches_and_caches_that_they_cannot_run() {
    let model = shape("smollm2-135m");
    let config = builtin::by_name("smollm2-135m").expect("a built-in shape").config();
    type Load<'a> = &'a dyn Fn(&Setup) -> anyhow::Result<engine::Loaded>;
    let executors: [(&str, &str, Load); 3] = [
        ("the reference executor", "fp32", &|setup| engine::reference::load(setup, &Silent)),
        ("the CPU engine", "fp32", &|setup| engine::cpu::load(setup, Isa::detect(), &Silent)),
        ("candle's engine", "fp16", &|setup| engine::candle::load(setup, &config, DType::F16, &Silent)),
    ];
    for (name, format, load) in &executors {
        let runs = if *name == "candle's engine" { "1" } else { "1 or more" };
        let none = refused_call(&model, 0, KvFormat::Fp32, *load);
        assert_eq!(none, format!("{name} cannot run a batch of 0 sequences; it runs {runs}"));
        let expected = format!("{name} cannot run a cache in fp8; it runs {format}");
        assert_eq!(refused_call(&model, 1, KvFormat::Fp8, *load), expected);
    }
    let two = refused_call(&model, 2, KvFormat::Fp16, executors[2].2);
    assert_eq!(two, "candle's engine cannot run a batch of 2 sequences; it runs 1");
}

#[cfg(feature = "cuda")]
#[test]
fn the_cuda_engine_refuses_by_name_batches_and_caches_that_it_cannot_run() {
    use quantbench::lower::cuda::{CALLS, check_sequences};
    let refusal = CALLS.check(1, KvFormat::Fp32).unwrap_err().to_string();
    assert_eq!(refusal, "the CUDA engine cannot run a cache in fp32; it runs fp16");
    let refusal = check_sequences(&shape("mixtral-8x7b"), 2).unwrap_err().to_string();
    assert_eq!(refusal, "the CUDA engine cannot run a batch of 2 sequences of a mixture of experts; it runs 1");
    assert!(check_sequences(&shape("mixtral-8x7b"), 1).is_ok() && check_sequences(&shape("phi-2"), 64).is_ok());
}

#[test]
fn a_decode_step_computes_two_operations_a_weight_and_four_a_key_element() {
    for name in ["llama-3.2-1b", "phi-2", "flan-t5-base"] {
        let model = shape(name);
        let linears =
            model.decoder.ops.iter().filter_map(|op| if let Op::Linear(spec) = op { Some(spec) } else { None });
        let weights = linears.flat_map(|spec| &spec.parts).map(|part| &model.matrices[part.weight.0]);
        let products = 2 * weights.map(|matrix| matrix.n * matrix.k).sum::<usize>();
        let elements = |keys: usize| (model.decoder.flops(&model, Batch::step(keys - 1)) - products) / keys;
        let attentions =
            model.decoder.ops.iter().filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None });
        let widths: usize = attentions.map(|spec| model.decoder.buffers[spec.q.0].width).sum();
        assert_eq!([elements(1), elements(1000)], [4 * widths; 2], "{name}");
    }
    // 1.236e9 parameters, all in matrices but for the norms; the tied table is the head.
    let llama = shape("llama-3.2-1b");
    let vectors: usize = llama.vectors.iter().map(|vector| vector.len).sum();
    // One key for each of 16 layers of 32 heads of 64.
    let one_key = 4 * 16 * 2048;
    assert_eq!(llama.decoder.flops(&llama, Batch::step(0)), 2 * (llama.parameters() - vectors) + one_key);
    // The head reads the last row of a sequence alone.
    let head = 2 * 128_256 * 2048;
    let (call, step) = (llama.decoder.flops(&llama, Batch::one(0..7)), llama.decoder.flops(&llama, Batch::step(6)));
    assert_eq!(call - head, 7 * (step - head));
    // Sequences share nothing that is computed.
    let batch = Batch { sequences: 3, ..Batch::one(0..7) };
    assert_eq!(llama.decoder.flops(&llama, batch), 3 * call);
}

#[test]
fn a_window_bounds_the_keys_that_are_computed() {
    let (model, _) = unusual_models().remove(0);
    let plain = shape("smollm2-135m");
    let saved = |keys: usize| {
        plain.decoder.flops(&plain, Batch::step(keys - 1)) - model.decoder.flops(&model, Batch::step(keys - 1))
    };
    // One attention of 9 heads of 64.
    assert_eq!([saved(128), saved(129), saved(1128)], [0, 4 * 576, 4 * 576 * 1000]);
}

#[test]
fn vectors_of_an_attention_are_read_at_each_token() {
    let plain = shape("smollm2-135m");
    let bytes: Vec<usize> = plain.matrices.iter().map(|matrix| 2 * matrix.n * matrix.k).collect();
    let more = |model: &Model| model.weight_bytes_per_token(&bytes) - plain.weight_bytes_per_token(&bytes);
    let counted: Vec<usize> = unusual_models().iter().map(|(model, _)| more(model)).collect();
    let len = 2 * plain.vectors[0].len;
    assert_eq!(counted, [0, 0, 2 * len, len]);
}

/// As the repositories say, the head of a tied model counted once; of gemma-3-4b the text alone.
#[test]
fn shapes_have_as_many_parameters_as_the_models() {
    for (name, parameters) in [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("mixtral-8x7b", 46_702_792_704),
        ("gpt-oss-20b", 20_914_757_184),
        ("gemma-3-1b", 999_885_952),
        ("gemma-3-4b", 3_880_263_168),
        ("phi-4-mini", 3_836_021_760),
        ("smollm3-3b", 3_075_098_624),
        ("olmo-2-1b", 1_484_916_736),
    ] {
        assert_eq!(shape(name).parameters(), parameters, "{name}");
    }
}

/// A token reads the chosen experts' share of all experts, and all of everything else.
#[test]
fn a_token_of_a_mixture_reads_the_experts_that_it_chooses() {
    let model = shape("qwen3-30b-a3b");
    let bytes: Vec<usize> = model.matrices.iter().map(|matrix| 2 * matrix.n * matrix.k).collect();
    let experts = 48 * 128 * 3 * 768 * 2048;
    let vectors: usize = model.vectors.iter().map(|vector| vector.len).sum();
    // One row of the table of tokens, and the head.
    let dense = model.parameters() - experts - 151_936 * 2048 + 2048;
    assert_eq!(model.weight_bytes_per_token(&bytes), 2 * (dense + experts * 8 / 128));
    // Two tokens choose 8 of 128 each, and share half an expert on average.
    let two = experts as f64 * (1.0 - (120.0f64 / 128.0).powi(2));
    assert_eq!(model.weight_bytes_per_step(&bytes, 2), 2 * (dense + 2048) + (2.0 * two) as usize);
    assert_eq!(model.experts(), Some((8, 128)));
    let active = dense - vectors - 2048 + experts / 16;
    assert_eq!(model.decoder.flops(&model, Batch::step(0)) - 4 * 48 * 32 * 128, 2 * active);
}
