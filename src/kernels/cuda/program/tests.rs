use super::super::matvec::{MatrixDesc, OutputType};
use super::*;

static HALVES: Family = Family {
    name: "halves",
    decoder: WeightDecoder::Half,
    chunk: 64,
    kernels: &[],
    product_is_float: false,
    rounds_products: false,
    multiply_few: |_, _, _| Ok(false),
    multiply_rows: |_, _, _, _| Ok(()),
};

fn multiply(program: &mut ProgramBuilder, x: u64, is_tagged: i32, out: u64) -> Result<()> {
    // Buffers do not overlap.
    let [x, out] = [x, out].map(|buffer| buffer << 16);
    let matrix = MatrixDesc {
        family: &HALVES,
        n: 64,
        k: 64,
        weight: 99,
        stride_bytes: 128,
        scales: 0,
        nested: 0,
        offset: 0.0,
        constants: 0,
        threshold: f32::NAN,
    };
    let input = InputDesc { x, scale: 1.0, is_tagged, ..InputDesc::default() };
    let product = Product { matrix, first_row: 0, bias: 0, out, activation: 0 };
    program.multiply(
        Mode::Apart,
        vec![input],
        &[product],
        Epilogue { output_type: OutputType::TaggedHalves, ..Epilogue::default() },
    )
}

/// A program of matvecs, by the addresses that each reads and writes.
fn chain(matvecs: &[(u64, u64)]) -> ProgramBuilder {
    let mut made =
        ProgramBuilder::new(DeviceProperties { multiprocessors: 4, bytes_per_us: 0, compute_capability: (9, 0) });
    matvecs.iter().for_each(|(x, out)| multiply(&mut made, *x, 1, *out).unwrap());
    made
}

#[test]
fn write_after_read_hazards_are_refused() {
    // Its first line: the rest may be a backtrace.
    let said = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    let order = |program: &ProgramBuilder| program.check_hazards().map_err(said);
    assert_eq!(order(&chain(&[(1, 2), (2, 3), (3, 1)])), Ok(()));
    let refused = Err("instruction 1 may overwrite what instruction 0 has not read yet".to_string());
    assert_eq!(order(&chain(&[(1, 2), (3, 1)])), refused);
    // A unit of attention reads a part of q; an instruction behind it depends on all units.
    let attention = |q: u64, out: u64| Attention {
        q: q << 16,
        out: out << 16,
        d: 8,
        d_pad: 8,
        kv_heads: 1,
        group: 1,
        ..Attention::default()
    };
    let mut direct = chain(&[(1, 2)]);
    direct.attend(attention(2, 1)).unwrap();
    assert_eq!(order(&direct), refused);
    let mut behind = chain(&[(1, 2)]);
    behind.attend(attention(2, 3)).unwrap();
    multiply(&mut behind, 3, 1, 1).unwrap();
    assert_eq!(order(&behind), Ok(()));
}

#[test]
fn values_of_the_same_launch_are_read_with_their_tag() {
    let mut program = chain(&[(1, 2)]);
    multiply(&mut program, 2, 1, 3).unwrap();
    assert_eq!(program.list[1].reads(), [(2 << 16, Some(0))]);
    assert_eq!(program.list[0].reads(), [(1 << 16, None)]);
    assert!(multiply(&mut program, 3, 0, 4).is_err());
}
