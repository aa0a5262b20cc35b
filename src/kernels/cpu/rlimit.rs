//! The limit of what this process may allocate.

use std::io;

/// Limits the private writable memory of this process to `bytes`. An allocation beyond it
/// fails. It cannot be raised again; a limit that is lower already stays.
#[cfg(target_os = "linux")]
pub fn limit_data_bytes(bytes: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the call writes the struct, which lives until it returns, and nothing else.
    if unsafe { libc::getrlimit(libc::RLIMIT_DATA, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = bytes.min(limit.rlim_cur).min(limit.rlim_max);
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the call reads the struct, which lives until it returns, and writes to no memory of ours.
    match unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Elsewhere the limit does not cover what an allocator maps.
#[cfg(not(target_os = "linux"))]
pub fn limit_data_bytes(_bytes: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
