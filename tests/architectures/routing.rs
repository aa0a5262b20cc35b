//! Random weights behave as trained ones do where that decides speed: tokens of a mixture go to all experts, and LLM.int8 meets few outlier columns.

use quantbench::engine::{self, Device, Session, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::plan::{ArgmaxSpec, Buffer, LastRowSpec, LinearPart, LinearSpec, Model, Op, Rows};
use quantbench::quant::{FormatId, FormatOptions, fp16, int8};
use quantbench::weights::builtin;
use quantbench::weights::policy::Formats;
use quantbench::weights::random::Random;

const TOKENS: usize = 512;

/// A built-in mixture with fewer and smaller layers.
fn shape(name: &str, changes: serde_json::Value) -> Model {
    let mut config = builtin::by_name(name).expect("a built-in shape").config();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    quantbench::models::build(&config).unwrap()
}

/// The model up to the router of each mixture, whose scores are its logits.
fn up_to_routers(model: &Model) -> Vec<(Model, usize)> {
    let ops = &model.decoder.ops;
    let routers =
        ops.iter().filter_map(|op| if let Op::Experts(spec) = op { Some(spec) } else { None }).map(|mixture| {
            let is_router = |op: &Op| matches!(op, Op::Linear(spec) if spec.parts[0].out == mixture.scores);
            let index = ops.iter().position(is_router).unwrap();
            let Op::Linear(LinearSpec { x, parts }) = &ops[index] else { unreachable!() };
            let mut cut = model.clone();
            let mut buffer = |name: &str, width: usize| {
                cut.decoder.buffers.push(Buffer { name: name.to_owned(), width, rows: Rows::Last });
                quantbench::plan::BufferId(cut.decoder.buffers.len() - 1)
            };
            let (last, logits) =
                (buffer("last", model.decoder.buffers[x.0].width), buffer("logits", mixture.experts.len()));
            cut.decoder.ops = ops[..index].to_vec();
            cut.decoder.ops.extend([
                Op::LastRow(LastRowSpec { x: *x, out: last, scale: 1.0 }),
                Op::Linear(LinearSpec { x: last, parts: vec![LinearPart { out: logits, ..parts[0] }] }),
                Op::Argmax(ArgmaxSpec { logits, softcap: None }),
            ]);
            (cut, mixture.top_k)
        });
    routers.collect()
}

/// A session of random weights with the planted outlier channels.
fn load(model: &Model, format: FormatId) -> Box<dyn Session> {
    let source = Random::new(0, 6, &model.matrices, &model.vectors);
    let setup = Setup {
        model,
        source: &source,
        formats: &Formats::new(format, FormatOptions::default()),
        device: Device::Cpu,
        threads: 2,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: TOKENS,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    engine::cpu::load(&setup, Isa::detect(), &Silent).unwrap().session
}

/// Uses of each expert over different tokens, as a share of the mean.
fn shares(model: &Model, top_k: usize) -> Vec<f64> {
    let mut session = load(model, fp16::ID);
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 37 % model.vocab as u32).collect();
    let mut uses = Vec::new();
    session
        .score(&tokens, &mut |_, scores| {
            uses.resize(scores.len(), 0);
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            order[..top_k].iter().for_each(|expert| uses[*expert] += 1);
        })
        .unwrap();
    let mean = (TOKENS * top_k) as f64 / uses.len() as f64;
    uses.iter().map(|uses| f64::from(*uses) / mean).collect()
}

/// With 64 expected uses an even choice alone spreads by 1/8 (one standard deviation), so by ±0.4 over 32 experts. A batch of a trained and
/// balanced mixture spreads by about a factor of 2.
#[test]
fn experts_of_random_weights_are_used_evenly() {
    let small = serde_json::json!({"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 1024, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64});
    let mut qwen = small.clone();
    qwen.as_object_mut().unwrap().extend(
        serde_json::json!({"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64})
            .as_object()
            .unwrap()
            .clone(),
    );
    let mut mixtral = small;
    mixtral["intermediate_size"] = 128.into();
    for (name, changes) in [("qwen3-30b-a3b", qwen), ("mixtral-8x7b", mixtral)] {
        let model = shape(name, changes);
        let layers = up_to_routers(&model);
        assert_eq!(layers.len(), 8);
        for (layer, (cut, top_k)) in layers.iter().enumerate() {
            let shares = shares(cut, *top_k);
            let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
            let most = shares.iter().copied().fold(0.0, f64::max);
            println!("{name} layer {layer}: {least:.2} to {most:.2} of the mean");
            assert!(least >= 0.3 && most <= 2.0, "{name} layer {layer}: {least} to {most} of the mean");
        }
    }
}

/// The planted six in front of queries, keys and values and in front of a gate, and next to none in front of the two other products of a layer: 3 of
/// four calls' mean. SmolLM2-135M itself has 2.66 over 512 tokens of such a prompt.
#[test]
fn int8_meets_the_planted_outlier_columns_and_few_others() {
    let model = shape("smollm2-135m", serde_json::json!({"num_hidden_layers": 6, "vocab_size": 1024}));
    let mut session = load(&model, int8::ID);
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 37 % 1024).collect();
    session.prefill(&tokens).unwrap();
    let found = session.outlier_columns().unwrap();
    let mean = found.columns as f64 / found.calls as f64;
    println!("{mean:.2} outlier columns a call");
    assert!((2.9..=3.5).contains(&mean), "{mean} outlier columns a call");
}
