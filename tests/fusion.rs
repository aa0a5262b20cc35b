//! Fusion keeps what a plan computes, in as few jobs as each architecture allows.

use quantbench::plan::fusion::{Job, Join, fuse};
use quantbench::plan::{BufferId, MatrixId, Model, Op};
use quantbench::weights::builtin;

/// Built-in shapes, and jobs of one token: the embedding is fetched by the job that finds the token.
const SHAPES: [(&str, usize); 5] =
    [("smollm2-135m", 151), ("llama-3.2-1b", 81), ("phi-2", 97), ("flan-t5-base", 97), ("paligemma-3b-pt-224", 91)];

fn shape(name: &str) -> Model {
    let config = builtin::by_name(name).expect("a built-in shape").config();
    quantbench::models::build(&config).expect("built-in shapes build")
}

fn jobs(model: &Model) -> Vec<Job> {
    fuse(&model.decoder, &|_| "nf4").expect("a decoder fuses")
}

fn written(job: &Job) -> Vec<BufferId> {
    match job {
        Job::Embed { out, .. } | Job::Attention { out, .. } => vec![*out],
        Job::Matvec { parts, join, .. } => match join {
            Join::Apart => parts.iter().map(|part| part.out).collect(),
            Join::Gated { out, .. } => vec![*out],
            Join::Residual { x } => vec![*x],
            Join::Argmax => vec![],
        },
    }
}

fn read(job: &Job) -> Vec<BufferId> {
    match job {
        Job::Embed { .. } => vec![],
        Job::Matvec { inputs, .. } => inputs.iter().map(|input| input.x).collect(),
        Job::Attention { q, append, .. } => {
            [*q].into_iter().chain(append.iter().flat_map(|append| [append.k, append.v])).collect()
        }
    }
}

#[test]
fn a_step_is_as_few_jobs_as_the_architecture_allows() {
    for (name, expected) in SHAPES {
        let jobs = jobs(&shape(name));
        let counted = jobs.iter().filter(|job| !matches!(job, Job::Embed { .. })).count();
        assert_eq!(counted, expected, "{name}");
    }
}

#[test]
fn every_matrix_of_the_plan_is_multiplied_as_often_as_before() {
    for (name, _) in SHAPES {
        let model = shape(name);
        let mut fused: Vec<MatrixId> = jobs(&model)
            .iter()
            .flat_map(|job| match job {
                Job::Matvec { parts, .. } => parts.iter().map(|part| part.weight).collect(),
                _ => vec![],
            })
            .collect();
        let linears = model.decoder.ops.iter().filter_map(|op| match op {
            Op::Linear { parts, .. } => Some(parts.iter().map(|part| part.weight)),
            _ => None,
        });
        let mut planned: Vec<MatrixId> = linears.flatten().collect();
        fused.sort();
        planned.sort();
        assert_eq!(fused, planned, "{name}");
    }
}

#[test]
fn nothing_is_read_before_it_is_written() {
    for (name, _) in SHAPES {
        let jobs = jobs(&shape(name));
        for (at, job) in jobs.iter().enumerate() {
            for buffer in read(job) {
                let is_written = jobs[..at].iter().any(|before| written(before).contains(&buffer));
                assert!(is_written, "{name}: {job:?} reads {buffer:?}");
            }
        }
    }
}

#[test]
fn matrices_of_different_formats_share_no_job() {
    let model = shape("llama-3.2-1b");
    let format_of = |id: MatrixId| if model.matrices[id.0].name.ends_with("v_proj.weight") { "fp16" } else { "nf4" };
    for job in fuse(&model.decoder, &format_of).expect("a decoder fuses") {
        if let Job::Matvec { parts, .. } = job {
            assert!(parts.iter().all(|part| format_of(part.weight) == format_of(parts[0].weight)), "{parts:?}");
        }
    }
}
