//! Fusion keeps what a plan computes, in as few operations as each architecture allows.

use quantbench::plan::fuse::{FusedOp, MatvecSpec, fuse};
use quantbench::plan::{AppendSpec, AttentionSpec, MatrixId, Model, Op, Window};
use quantbench::weights::builtin;

/// Built-in shapes, and fused operations of one token: the embedding is fetched by the operation that finds the token.
const SHAPES: [(&str, usize); 11] = [
    ("smollm2-135m", 151),
    ("llama-3.2-1b", 81),
    ("phi-2", 97),
    ("flan-t5-base", 97),
    ("paligemma-3b-pt-224", 91),
    ("qwen3-0.6b", 141),
    ("gemma-3-1b", 183),
    ("olmo-2-1b", 113),
    ("phi-4-mini", 161),
    ("smollm3-3b", 181),
    ("mixtral-8x7b", 161),
];

fn shape(name: &str) -> Model {
    let config = builtin::by_name(name).expect("a built-in shape").config();
    quantbench::models::build(&config).expect("built-in shapes build")
}

fn fused(model: &Model) -> Vec<FusedOp> {
    fuse(&model.decoder, &|_| "nf4").expect("a decoder fuses")
}

fn matvecs(fused: &[FusedOp]) -> impl Iterator<Item = &MatvecSpec> {
    fused.iter().filter_map(|op| if let FusedOp::Matvec(spec) = op { Some(spec) } else { None })
}

#[test]
fn a_step_is_as_few_operations_as_the_architecture_allows() {
    for (name, expected) in SHAPES {
        let fused = fused(&shape(name));
        let counted = fused.iter().filter(|op| !matches!(op, FusedOp::Embed(_))).count();
        assert_eq!(counted, expected, "{name}");
    }
}

#[test]
fn every_matrix_of_the_plan_is_multiplied_as_often_as_before() {
    for (name, _) in SHAPES {
        let model = shape(name);
        let fused = fused(&model);
        let mut multiplied: Vec<MatrixId> = matvecs(&fused).flat_map(|spec| &spec.parts).map(|p| p.weight).collect();
        let linears =
            model.decoder.ops.iter().filter_map(|op| if let Op::Linear(spec) = op { Some(spec) } else { None });
        let mut planned: Vec<MatrixId> = linears.flat_map(|spec| &spec.parts).map(|part| part.weight).collect();
        multiplied.sort();
        planned.sort();
        assert_eq!(multiplied, planned, "{name}");
    }
}

#[test]
fn nothing_is_read_before_it_is_written() {
    for (name, _) in SHAPES {
        let fused = fused(&shape(name));
        for (at, op) in fused.iter().enumerate() {
            for buffer in op.reads() {
                let is_written = fused[..at].iter().any(|before| before.writes().contains(&buffer));
                assert!(is_written, "{name}: {op:?} reads {buffer:?}");
            }
        }
    }
}

#[test]
fn matrices_of_different_formats_share_no_operation() {
    let model = shape("llama-3.2-1b");
    let format_of = |id: MatrixId| if model.matrices[id.0].name.ends_with("v_proj.weight") { "fp16" } else { "nf4" };
    for MatvecSpec { parts, .. } in matvecs(&fuse(&model.decoder, &format_of).expect("a decoder fuses")) {
        assert!(parts.iter().all(|part| format_of(part.weight) == format_of(parts[0].weight)), "{parts:?}");
    }
}

#[test]
fn attention_travels_whole() {
    let mut model = shape("llama-3.2-1b");
    let mut described: Vec<AttentionSpec> = Vec::new();
    for op in &mut model.decoder.ops {
        if let Op::Attention(spec) = op {
            spec.window = Some(Window(described.len() + 1));
            described.push(*spec);
        }
    }
    let fused = fused(&model);
    let kept = fused.iter().filter_map(|op| if let FusedOp::Attention(spec) = op { Some(*spec) } else { None });
    assert_eq!(kept.collect::<Vec<_>>(), described);
}

#[test]
fn an_append_without_its_attention_is_refused() {
    let mut model = shape("llama-3.2-1b");
    let at = model.decoder.ops.iter().position(|op| matches!(op, Op::Attention(_))).expect("an attention");
    let Op::Attention(AttentionSpec { append: Some(kv), cache, .. }) = model.decoder.ops[at] else {
        panic!("no append")
    };
    model.decoder.ops.insert(at, Op::Append(AppendSpec { kv, cache }));
    let error = fuse(&model.decoder, &|_| "nf4").expect_err("keys that no attention of the step appends");
    assert!(error.to_string().starts_with("a decode step cannot hold Append"), "{error}");
}
