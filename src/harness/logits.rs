//! The untimed pass that saves every step's logits.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::engine::Session;
use crate::error::BadInput;

/// Generates `n_gen` tokens of each of `sequences` sequences after a prefill and writes the logits of all of the first, fp32 `[n_gen, vocab]` as
/// tensor `logits`. The file is written atomically.
pub fn save(session: &mut dyn Session, (n_gen, sequences): (usize, usize), path: &Path) -> Result<()> {
    let mut rows = session.logits()?;
    let vocab = rows.len() / sequences;
    rows.truncate(vocab);
    for _ in 1..n_gen {
        session.decode_batch(1, &mut |_| {})?;
        rows.extend_from_slice(&session.logits()?[..vocab]);
    }
    let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![n_gen, vocab], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None)?;
    // Records hold no path.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    write_whole(path, &file).with_context(|| format!("the logits could not be written to `{name}`"))
}

/// Writes under a temporary name beside `path`, then renames.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|seen| !seen.is_file()) {
        // A device or a pipe: renaming a file over it would destroy it.
        return Ok(std::fs::OpenOptions::new().write(true).open(path)?.write_all(bytes)?);
    }
    let mut temporary = tempfile::NamedTempFile::new_in(folder(path))?;
    temporary.write_all(bytes)?;
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    Ok(())
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Fails where [`save`] could not write, before anything long is done.
pub fn check_writable(path: &Path) -> Result<(), BadInput> {
    let refuse = |reason: String| {
        BadInput::new(format!("cannot write logits to `{}`: {reason}", path.display()))
            .hint("name a file in a folder that exists and may be written to")
    };
    if path.is_dir() {
        return Err(refuse("it is a folder".to_owned()));
    }
    tempfile::NamedTempFile::new_in(folder(path)).map(drop).map_err(|error| refuse(error.to_string()))
}

/// The file of one precision: `path` itself where there is only one, else `name.precision.ext`.
pub fn path_of(path: &Path, precision: &str, n_precisions: usize) -> std::path::PathBuf {
    if n_precisions == 1 {
        return path.to_owned();
    }
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!(".{precision}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{FakeRun, FakeSession, FakeTime};

    #[test]
    fn logits_are_one_row_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("l.safetensors");
        let run = FakeRun { logits: vec![0.5, -1.0, 2.0], ..FakeRun::default() };
        let mut session = FakeSession::new(FakeTime::default(), [run]);
        session.prefill(&[1, 2]).unwrap();
        save(&mut session, (4, 1), &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("logits").unwrap().shape(), [4, 3]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_reported_without_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("l.safetensors");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut session = FakeSession::new(FakeTime::default(), [FakeRun { logits: vec![0.5], ..FakeRun::default() }]);
        session.prefill(&[1]).unwrap();
        let error = format!("{:#}", save(&mut session, (2, 1), &path).unwrap_err());
        assert!(error.starts_with("the logits could not be written to `l.safetensors`: No space left"), "{error}");
    }

    #[test]
    fn several_precisions_have_a_file_each() {
        let path = Path::new("out/l.safetensors");
        assert_eq!(path_of(path, "int8", 1), path);
        assert_eq!(path_of(path, "int8", 2), Path::new("out/l.int8.safetensors"));
    }

    #[test]
    fn unwritable_places_are_found_early() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_writable(&folder.path().join("l.safetensors")).is_ok());
        assert!(check_writable(folder.path()).is_err());
        assert!(check_writable(&folder.path().join("absent/l.safetensors")).is_err());
    }
}
