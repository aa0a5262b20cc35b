//! Checks of whether a result can be right at all. Garbage is fast, too.

use super::measured::Sample;
use crate::engine::check::SelfCheck;
use crate::error::InvalidResult;
use crate::quant::FormatId;

/// A text this short may repeat one token by chance or by sense.
const COLLAPSE_FROM: usize = 8;

/// Fails with [`InvalidResult`] where the kernels of a precision do not multiply as its reference does.
pub fn check_kernels(precision: FormatId, found: Option<&SelfCheck>) -> Result<(), InvalidResult> {
    let Some(found) = found.filter(|found| !found.passes()) else { return Ok(()) };
    let matrix = &found.matrix;
    Err(InvalidResult(match found.error_share {
        Some(share) => format!(
            "the kernels of {precision} are wrong on this machine: on `{matrix}` they differ from the reference by {share:.1} \
             times what rounding explains"
        ),
        None => format!("the kernels of {precision} are wrong on this machine: on `{matrix}` they give no number"),
    }))
}

/// Reason why these repeats cannot be a result; `None` where nothing speaks against them. `fp16` are the repeats of fp16 in the
/// same run, given only for real weights: random ones collapse by nature. Each repeat generates `n_gen` tokens of each of `sequences` sequences.
pub fn invalid_reason(
    samples: &[Sample],
    (n_gen, sequences): (usize, usize),
    fp16: Option<&[Sample]>,
) -> Option<String> {
    if samples.is_empty() {
        return Some("no repeat was measured".to_owned());
    }
    if let Some(at) = samples.iter().position(|sample| !sample.finite_logits) {
        return Some(format!("the logits are not finite after repeat {}", at + 1));
    }
    let expected = n_gen * sequences;
    if let Some((at, sample)) = samples.iter().enumerate().find(|(_, sample)| sample.ids.len() != expected) {
        return Some(format!("repeat {} generated {} tokens, not {expected}", at + 1, sample.ids.len()));
    }
    let fp16 = fp16?;
    (0..sequences).find_map(|sequence| {
        let collapsed = |sample: &Sample| collapsed(sample, sequence, sequences);
        let collapsed_beside = !fp16.iter().any(collapsed);
        let collapse = samples.iter().find(|sample| collapsed_beside && collapsed(sample))?;
        let of = if sequences == 1 { String::new() } else { format!(" of sequence {sequence}") };
        Some(format!("the text{of} is one repeated token, id {}, where fp16's is not", collapse.ids[sequence]))
    })
}

fn collapsed(sample: &Sample, sequence: usize, sequences: usize) -> bool {
    let mut ids = sample.ids.iter().skip(sequence).step_by(sequences);
    let n = sample.ids.len() / sequences;
    let first = ids.next();
    n >= COLLAPSE_FROM && ids.all(|id| Some(id) == first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::nf4;

    fn sample(ids: &[u32], finite_logits: bool) -> Sample {
        Sample { ids: ids.to_vec(), finite_logits, ..Sample::default() }
    }

    #[test]
    fn kernels_that_differ_from_their_reference_are_wrong() {
        let said = |error_share| {
            let found = SelfCheck { matrix: "q".to_owned(), error_share };
            check_kernels(nf4::ID, Some(&found)).err().map(|wrong| wrong.0).unwrap_or_default()
        };
        assert_eq!((said(Some(0.9)), check_kernels(nf4::ID, None).is_ok()), (String::new(), true));
        let start = "the kernels of nf4 are wrong on this machine: on `q` they ";
        assert_eq!(said(Some(12.34)), format!("{start}differ from the reference by 12.3 times what rounding explains"));
        assert_eq!(said(None), format!("{start}give no number"));
    }

    #[test]
    fn each_cause_has_its_reason() {
        let varied = [sample(&[1, 2, 1, 2, 1, 2, 1, 2], true)];
        let same = [sample(&[3; 8], true)];
        let check = |samples: &[Sample], fp16| invalid_reason(samples, (8, 1), fp16).unwrap_or_default();
        assert_eq!(check(&varied, None), "");
        assert_eq!(check(&[], None), "no repeat was measured");
        let nan = [varied[0].clone(), sample(&[1; 8], false)];
        assert_eq!(check(&nan, None), "the logits are not finite after repeat 2");
        assert_eq!(check(&[sample(&[1, 2], true)], None), "repeat 1 generated 2 tokens, not 8");
        assert_eq!(check(&same, Some(&varied)), "the text is one repeated token, id 3, where fp16's is not");
        assert_eq!(check(&same, Some(&same)), "", "fp16 collapses as well");
        assert_eq!(check(&same, None), "", "random weights, or no fp16 to compare with");
        assert_eq!(invalid_reason(&[sample(&[3; 7], true)], (7, 1), Some(&varied)), None, "too short");
        // Two sequences, of which the second repeats.
        let of_two = |second: u32| {
            let ids: Vec<u32> = (0..8).flat_map(|step| [step, if second == 0 { step + 1 } else { second }]).collect();
            [sample(&ids, true)]
        };
        assert_eq!(invalid_reason(&of_two(0), (8, 2), Some(&of_two(0))), None);
        let reason = invalid_reason(&of_two(5), (8, 2), Some(&of_two(0)));
        assert_eq!(reason.unwrap(), "the text of sequence 1 is one repeated token, id 5, where fp16's is not");
        assert_eq!(invalid_reason(&of_two(5), (4, 2), None).unwrap(), "repeat 1 generated 16 tokens, not 8");
    }
}
