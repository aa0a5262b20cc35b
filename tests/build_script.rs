//! What the build script decides before it compiles anything.

#[allow(dead_code)] // its `main` and what that alone uses
#[path = "../build.rs"]
mod build_script;

use build_script::nvcc_refusal;

/// As nvcc prints it.
fn version(release: &str) -> String {
    format!(
        "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2025 NVIDIA Corporation\nBuilt on Wed_Aug_20_01:58:59_PM_PDT_2025\n\
         Cuda compilation tools, release {release}, V{release}.88\nBuild cuda_{release}.r{release}/compiler.36424714_0\n"
    )
}

#[test]
fn an_nvcc_that_is_too_old_is_refused_with_what_was_found() {
    for release in ["13.0", "13.1", "14.0", "13.10"] {
        assert_eq!(nvcc_refusal(Some(&version(release))), None, "{release}");
    }
    for release in ["12.0", "12.4", "12.9", "11.8", "9.2"] {
        let expected =
            format!("feature `cuda` needs nvcc of CUDA 13.0 or newer on PATH; the one there is of CUDA {release}");
        assert_eq!(nvcc_refusal(Some(&version(release))), Some(expected));
    }
    assert!(nvcc_refusal(None).is_some_and(|refusal| refusal.ends_with("on PATH; there is none")));
    for said in ["", "no such thing", "release x.y,", "release 13"] {
        assert!(nvcc_refusal(Some(said)).is_some_and(|refusal| refusal.ends_with("names no release")), "{said}");
    }
}
