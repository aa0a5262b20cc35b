//! `quant_state`: what bitsandbytes says about a 4-bit matrix, as Python's `json.dumps` writes it.

use anyhow::Result;
use serde::Deserialize;

use super::BLOCK;
use super::nested::NESTED_BLOCK;
use crate::error::BadInput;

/// A matrix of NF4 blocks of 64; with an offset its absmax values are quantized too.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    pub n: usize,
    pub k: usize,
    pub nested_offset: Option<f32>,
}

#[derive(Deserialize)]
struct Text {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

impl QuantState {
    /// Fails with [`BadInput`] on text that is none, and on blocks that NF4 has not here.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let bad = |what: String| BadInput::new(what).hint("name the model that the checkpoint was made from");
        let text: Text = serde_json::from_slice(text).map_err(|error| bad(format!("it cannot be read: {error}")))?;
        if text.quant_type != "nf4" {
            return Err(bad(format!("it says `{}`; only `nf4` is known", text.quant_type)).into());
        }
        let nested = text.nested_blocksize.unwrap_or(NESTED_BLOCK);
        if text.blocksize != BLOCK || nested != NESTED_BLOCK {
            let seen = format!("blocks of {} and {nested}", text.blocksize);
            return Err(bad(format!("it says {seen}; only {} and {} are known", BLOCK, NESTED_BLOCK)).into());
        }
        let &[n, k] = text.shape.as_slice() else {
            return Err(bad(format!("its shape {:?} is no matrix", text.shape)).into());
        };
        Ok(Self { n, k, nested_offset: text.nested_offset.map(|offset| offset as f32) })
    }

    /// For a model whose dtype is fp16.
    pub fn to_json(&self) -> String {
        let Self { n, k, nested_offset } = self;
        let nested = nested_offset.map_or(String::new(), |offset| {
            let (block, offset) = (NESTED_BLOCK, python_float(f64::from(offset)));
            format!(r#", "nested_blocksize": {block}, "nested_dtype": "float32", "nested_offset": {offset}"#)
        });
        let block = BLOCK;
        format!(r#"{{"quant_type": "nf4", "blocksize": {block}, "dtype": "float16", "shape": [{n}, {k}]{nested}}}"#)
    }
}

/// A float as Python's `repr` writes it: the shortest digits that read back the same, as an exponent below 1e-4 and from
/// 1e16 on.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{value:e}");
    // `{:e}` always writes an exponent.
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    match exponent {
        -4..16 => format!("{value:?}"),
        _ => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, text) in [
            (0.25911593437194824, "0.25911593437194824"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (9.999999960041972e-13, "9.999999960041972e-13"),
            (1e-38, "1e-38"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e22, "-2.5e+22"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn a_state_comes_back() {
        for nested_offset in [None, Some(0.25911593), Some(1e-7)] {
            let state = QuantState { n: 3, k: 70, nested_offset };
            assert_eq!(QuantState::parse(state.to_json().as_bytes()).unwrap(), state);
        }
    }

    #[test]
    fn other_states_are_refused() {
        let good = QuantState { n: 3, k: 70, nested_offset: Some(0.5) }.to_json();
        for (from, to, expected) in [
            ("\"nf4\"", "\"fp4\"", "`fp4`"),
            ("64", "128", "blocks of 128 and 256"),
            ("256", "64", "blocks of 64 and 64"),
            ("[3, 70]", "[210]", "no matrix"),
            ("}", "", "cannot be read"),
        ] {
            let error = QuantState::parse(good.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
