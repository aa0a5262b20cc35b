//! Looks for shared libraries: drivers bring theirs, and nothing is linked against what a machine may lack.

use std::ffi::CStr;

/// Returns whether the loader finds `name` and can open it. Nothing of it is called but what it runs by itself when it is opened.
#[cfg(unix)]
pub fn can_open(name: &CStr) -> bool {
    // SAFETY: `name` ends in a zero byte, and only a handle that was given is closed, once.
    unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL);
        !handle.is_null() && libc::dlclose(handle) == 0
    }
}

#[cfg(not(unix))]
pub fn can_open(_name: &CStr) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_there_can_be_opened() {
        assert!(can_open(c"libc.so.6"));
        assert!(!can_open(c"libquantbench-absent.so.1"));
    }
}
