//! Output files, written atomically.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::Builder;

use crate::error::BadInput;

/// Writes `text` under a temporary name beside `path` and renames it, so that no reader ever sees half a file. Devices
/// and pipes are written in place. Fails with [`BadInput`] where the path cannot be written.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    let written = match target(path)? {
        Target::File(file) => replace(&file, text),
        Target::Stream => fs::OpenOptions::new().write(true).open(path).and_then(|mut f| f.write_all(text.as_bytes())),
    };
    written.map_err(|error| unwritable(path, &error.to_string()))
}

/// Fails as [`write_file`] would, before the long work, and leaves no file behind.
pub fn check_writable(path: &Path) -> Result<()> {
    let opened = match target(path)? {
        Target::File(file) => tempfile::tempfile_in(folder(&file)).map(drop),
        Target::Stream => fs::OpenOptions::new().write(true).open(path).map(drop),
    };
    opened.map_err(|error| unwritable(path, &error.to_string()))
}

enum Target {
    /// A regular file, links followed, that exists or can be made.
    File(PathBuf),
    /// A device or a pipe: renaming a file over it would destroy it.
    Stream,
}

fn target(path: &Path) -> Result<Target> {
    if path.file_name().is_none() {
        return Err(unwritable(path, "this names no file"));
    }
    match fs::metadata(path) {
        Ok(seen) if seen.is_dir() => Err(unwritable(path, "it is a folder")),
        Ok(seen) if !seen.is_file() => Ok(Target::Stream),
        Ok(_) => fs::canonicalize(path).map(Target::File).map_err(|error| unwritable(path, &error.to_string())),
        Err(_) if !folder(path).is_dir() => Err(unwritable(path, &missing_folder(path))),
        Err(_) => Ok(Target::File(path.to_owned())),
    }
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mode = fs::metadata(path).map(|seen| seen.permissions()).ok().or_else(usual_permissions);
    let mut builder = Builder::new();
    builder.prefix(".quantbench-");
    if let Some(mode) = mode {
        builder.permissions(mode);
    }
    let mut file = builder.tempfile_in(folder(path))?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// What a plain `open` asks for; the umask takes from it. A temporary file would be the owner's alone.
#[cfg(unix)]
fn usual_permissions() -> Option<Permissions> {
    use std::os::unix::fs::PermissionsExt;
    Some(Permissions::from_mode(0o666))
}

#[cfg(not(unix))]
fn usual_permissions() -> Option<Permissions> {
    None
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn missing_folder(path: &Path) -> String {
    let folder = folder(path).display();
    if self::folder(path).exists() {
        format!("`{folder}` is no folder")
    } else {
        format!("there is no folder `{folder}`")
    }
}

fn unwritable(path: &Path, why: &str) -> anyhow::Error {
    BadInput::new(format!("cannot write `{}`: {why}", path.display()))
        .hint("name a file in a folder that exists and that you may write to")
        .into()
}
