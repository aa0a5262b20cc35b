//! Values beyond fp16 between operations, and weights beyond it.

use quantbench::engine;
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;

use super::planted::{logits_behind_prompt, planted, rewritten};
use super::{FP32_LOGIT_TOLERANCE, Golden, NF4_LOGIT_TOLERANCE, largest_difference};

/// Beyond fp16 and within what the issue of such models names.
fn is_planted(value: f32) -> bool {
    (1e5..2e6).contains(&value)
}

#[test]
fn values_beyond_fp16_stay_finite_and_near_the_fp32_reference() {
    for planted in planted() {
        let values = planted.largest_values();
        let beyond: Vec<&(String, f32)> = values.iter().filter(|(_, value)| is_planted(*value)).collect();
        println!("{}: {} of {} buffers: {beyond:?}", planted.name, beyond.len(), values.len());
        assert!(beyond.len() >= 2, "{}: {values:?}", planted.name);
        let model = planted.model();
        // fp16 holds every weight, so that fp16 is fp32 here. A value of LLM.int8 that crosses a boundary moves logits by up to 0.7.
        let exact = planted.logits("fp32");
        for (precision, tolerance) in [("fp16", FP32_LOGIT_TOLERANCE), ("nf4", NF4_LOGIT_TOLERANCE), ("int8", 0.7)] {
            let expected = planted.logits(precision);
            assert!(expected.iter().all(|logit| logit.is_finite()), "{} {precision}: {expected:?}", planted.name);
            if precision == "fp16" {
                assert_eq!(largest_difference(&expected, &exact), 0.0, "{}", planted.name);
            }
            for isa in Isa::available() {
                let logits = planted.with_setup(&model, precision, |setup| {
                    let mut session = engine::cpu::load(setup, isa, &Silent).unwrap().session;
                    logits_behind_prompt(session.as_mut())
                });
                assert!(logits.iter().all(|logit| logit.is_finite()), "{} {precision} {isa:?}", planted.name);
                let difference = largest_difference(&logits, &expected);
                assert!(difference <= tolerance, "{} {precision} {isa:?}: {difference}", planted.name);
            }
        }
    }
}

/// Powers of two between norms cancel but for the norms' epsilon: of a residual of mean square 0.09 it is 1.1e-5, so that embeddings are larger by 5.6e-6. A
/// relative change of 1e-6 in the embeddings moves logits by up to 1.9e-4 (the golden folder's README).
#[test]
fn a_model_planted_between_norms_has_the_golden_logits() {
    const TOLERANCE: f32 = FP32_LOGIT_TOLERANCE + 5.6 * 1.9e-4;
    for (planted, golden) in planted().iter().zip(["qwen3-odd", "gemma3-odd"]) {
        let own = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/architectures");
        let golden = Golden::open_in(&own, golden, "golden");
        let prompt = &golden.prompts()[1].0;
        let logits = planted.with_setup(&planted.model(), "fp16", |setup| {
            let mut session = engine::cpu::load(setup, Isa::detect(), &Silent).unwrap().session;
            session.prefill(prompt).unwrap();
            session.logits().unwrap()
        });
        let difference = largest_difference(&logits, &golden.steps("p1.step_logits")[0]);
        assert!(difference <= TOLERANCE, "{}: {difference}", planted.name);
    }
}

/// A weight of 1e5 is infinite in fp16: the record counts it and names its tensor, whatever comes of the run.
#[test]
fn weights_beyond_fp16_are_counted_and_named() {
    let tensor = "model.layers.1.mlp.up_proj.weight";
    let folder = rewritten("qwen3-odd", |name, index, value| if name == tensor && index < 3 { -1e5 } else { value });
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_quantbench"))
        .args(["--model-id", folder.path().to_str().unwrap(), "--device", "cpu", "--threads", "1"])
        .args([
            "--precision",
            "fp16",
            "--prompt-ids",
            "5,6,7",
            "--max-new-tokens",
            "2",
            "--warmup",
            "0",
            "--repeats",
            "1",
        ])
        .args(["--format", "json"])
        .output()
        .unwrap();
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let record = &document["records"][0];
    assert_eq!(record["weights"]["fp16_overflow"], 3, "{document}");
    assert_eq!(record["weights"]["fp16_overflow_by_tensor"], serde_json::json!({ tensor: 3 }));
    let warned = record["warnings"].to_string();
    assert!(
        warned.contains(&format!(
            "3 weights of the checkpoint exceed the range of fp16 and became infinite: 3 in `{tensor}`"
        )),
        "{warned}"
    );
}
