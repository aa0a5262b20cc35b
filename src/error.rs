//! The errors that code chooses by; everything else is an `anyhow::Error` with context.
//!
//! A message says what, where, what was seen and what is allowed, in lower case without a full stop, with the user's own
//! words in backticks. A hint says what to do next. [`crate::ui`] prints them, and the command ends with [`EXIT_CODE`].

use std::fmt;

/// What the user typed, or a file they named, cannot be used: exit code 2.
#[derive(Debug)]
pub struct BadInput {
    message: String,
    hint: Option<String>,
}

impl BadInput {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: without_backtrace(&message.into()).to_owned(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BadInput {}

/// A model did not fit: the case becomes a record with status `oom` and the others go on.
#[derive(Debug, Clone, Copy)]
pub struct OutOfMemory {
    /// Bytes of the allocation that failed, or that the case is known to need; 0 where unknown.
    pub wanted_bytes: u64,
    /// Bytes that were free then; 0 where unknown.
    pub free_bytes: u64,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of memory")?;
        match (self.wanted_bytes, self.free_bytes) {
            (0, 0) => Ok(()),
            (wanted, 0) => write!(f, ": wanted {}", size(wanted)),
            (0, free) => write!(f, ": {} free", size(free)),
            (wanted, free) => write!(f, ": wanted {}, {} free", size(wanted), size(free)),
        }
    }
}

impl std::error::Error for OutOfMemory {}

/// A result that cannot be right, found before anything was measured.
#[derive(Debug)]
pub struct InvalidResult(pub String);

impl fmt::Display for InvalidResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidResult {}

/// An allocation that was refused, as the context of the refusal: how large it was, and what for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub bytes: u64,
    pub what: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {} could not be allocated", size(self.bytes), self.what)
    }
}

/// `41 bytes`, `1.5 KiB`, `12.0 MiB`, `3.00 GiB`: as every message writes sizes.
pub fn size(bytes: u64) -> String {
    let of = |unit: u32| bytes as f64 / f64::from(1u32 << unit);
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        _ if of(10) < 1000.0 => format!("{:.1} KiB", of(10)),
        _ if of(20) < 1000.0 => format!("{:.1} MiB", of(20)),
        _ => format!("{:.2} GiB", of(30)),
    }
}

/// What the driver's and the libraries' codes mean, where their own words say too little.
const MEANINGS: &[(&str, &str)] = &[
    ("CUDA_ERROR_OUT_OF_MEMORY", "the device has too little free memory"),
    ("CUDA_ERROR_NO_DEVICE", "the driver sees no GPU"),
    ("CUDA_ERROR_INVALID_DEVICE", "the driver has no device of this number"),
    ("CUDA_ERROR_DEVICE_UNAVAILABLE", "another process has the device to itself"),
    ("CUDA_ERROR_ILLEGAL_ADDRESS", "a kernel used memory that is not its own"),
    ("CUDA_ERROR_MISALIGNED_ADDRESS", "a kernel used a misaligned address"),
    ("CUDA_ERROR_LAUNCH_FAILED", "a kernel failed on the device"),
    ("CUDA_ERROR_LAUNCH_TIMEOUT", "a kernel ran longer than the driver allows"),
    ("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "a kernel needs more registers or shared memory than the device has"),
    ("CUDA_ERROR_ECC_UNCORRECTABLE", "the device's memory has an error that cannot be corrected"),
    ("CUDA_ERROR_NO_BINARY_FOR_GPU", "the kernels of this build are not for this device"),
    ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "the driver and its libraries are of different versions"),
    (
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "the device is not ready: on a machine with NVSwitch its fabric manager may not run",
    ),
    ("CUBLAS_STATUS_ALLOC_FAILED", "cuBLAS had too little free memory"),
    ("CUBLAS_STATUS_NOT_INITIALIZED", "cuBLAS could not be started"),
];

/// `text` with the driver's errors in plain words and their codes in brackets: `DriverError(CUDA_ERROR_X, "y")` becomes
/// `y (CUDA_ERROR_X)`.
pub fn plain_driver_errors(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    let found = |rest: &str| {
        let kinds = ["DriverError(", "CublasError(", "CurandError("];
        kinds.iter().filter_map(|kind| Some((rest.find(kind)?, kind.len()))).min()
    };
    while let Some((at, len)) = found(rest) {
        let inside = &rest[at + len..];
        let Some((code, words, behind)) = driver_error(inside) else {
            plain += &rest[..at + len];
            rest = inside;
            continue;
        };
        let meaning = MEANINGS.iter().find(|(known, _)| *known == code).map(|(_, meaning)| *meaning);
        let meaning = meaning.or(words).unwrap_or("the driver reports an error");
        plain += &format!("{}{meaning} ({code})", &rest[..at]);
        rest = behind;
    }
    plain + rest
}

/// Code, the driver's own words, and what follows, of the inside of an error's brackets.
fn driver_error(inside: &str) -> Option<(&str, Option<&str>, &str)> {
    let is_code = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let (code, behind) = inside.split_at(inside.find(|c| !is_code(c))?);
    if code.is_empty() {
        return None;
    }
    if let Some(behind) = behind.strip_prefix(')') {
        return Some((code, None, behind));
    }
    let (words, behind) = behind.strip_prefix(", \"")?.split_once("\")")?;
    Some((code, Some(words), behind))
}

/// The word of `known` that `word` was probably meant to be; `None` where it is near none of them.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let likeness = |known: &str| strsim::normalized_damerau_levenshtein(&word, &known.to_lowercase());
    let rated = known.into_iter().map(|known| (likeness(known), known));
    let (likeness, nearest) = rated.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (likeness >= NEAR).then_some(nearest)
}

/// Two letters of five may differ: `fp61` is near `fp16`, and `nosuch` is near nothing.
const NEAR: f64 = 0.6;

/// `text` up to the first backtrace. candle writes one into its messages where `RUST_BACKTRACE` asks for it, and it names the
/// folders of the build, which no record may hold.
pub fn without_backtrace(text: &str) -> &str {
    text.split_once("\n   0: ").map_or(text, |(message, _)| message)
}

/// Exit code of a command that fails with an error: usage or set-up. A failed case is a record, and its command ends with 1.
pub const EXIT_CODE: u8 = 2;

/// The hint of the innermost [`BadInput`] in the chain, if it has one.
pub fn hint(error: &anyhow::Error) -> Option<String> {
    error.downcast_ref::<BadInput>().and_then(BadInput::hint_text).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_sizes_are_not_told() {
        for (wanted_bytes, free_bytes, said) in [
            (0, 0, "out of memory"),
            (3 << 30, 0, "out of memory: wanted 3.00 GiB"),
            (0, 5 << 20, "out of memory: 5.0 MiB free"),
            (3 << 20, 1 << 30, "out of memory: wanted 3.0 MiB, 1.00 GiB free"),
        ] {
            assert_eq!(OutOfMemory { wanted_bytes, free_bytes }.to_string(), said);
        }
    }

    #[test]
    fn sizes_have_one_form() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (41, "41 bytes"),
            (1536, "1.5 KiB"),
            (12 << 20, "12.0 MiB"),
            (1000 << 20, "0.98 GiB"),
            (124 << 30, "124.00 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn the_driver_is_told_in_plain_words_with_its_code() {
        let full = r#"placing `a.weight`: DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#;
        for (raw, plain) in [
            (full, "placing `a.weight`: the device has too little free memory (CUDA_ERROR_OUT_OF_MEMORY)"),
            (r#"DriverError(CUDA_ERROR_NEW, "it is new"); more"#, "it is new (CUDA_ERROR_NEW); more"),
            ("CublasError(CUBLAS_STATUS_NOT_SUPPORTED)", "the driver reports an error (CUBLAS_STATUS_NOT_SUPPORTED)"),
            ("DriverError(what", "DriverError(what"),
            ("nothing of it", "nothing of it"),
        ] {
            assert_eq!(plain_driver_errors(raw), plain);
        }
    }

    #[test]
    fn a_word_is_near_or_it_is_not() {
        let shapes = ["smollm2-135m", "phi-2", "flan-t5-base"];
        for (word, near) in
            [("smollm2-135", Some("smollm2-135m")), ("PHI2", Some("phi-2")), ("nosuch", None), ("", None)]
        {
            assert_eq!(nearest(word, shapes), near, "{word}");
        }
    }

    #[test]
    fn backtraces_are_cut() {
        let candle = candle_core::Error::Msg("no `model_type`".into());
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let error = candle_core::Error::WithBacktrace { inner: Box::new(candle), backtrace };
        assert!(error.to_string().lines().count() > 1);
        assert_eq!(without_backtrace(&error.to_string()), "no `model_type`");
        assert_eq!(BadInput::new(format!("config.json: {error}")).to_string(), "config.json: no `model_type`");
        assert_eq!(without_backtrace("two\nlines"), "two\nlines");
    }
}
