//! From an error to a failure on the wire and back.

use crate::error::{BadInput, InvalidResult, OutOfMemory, Refused, plain_driver_errors, without_backtrace};
use crate::protocol::Failure;
use crate::record::Status;

/// Sorts an error by what the parent does about it.
pub fn failure_of(error: &anyhow::Error) -> Failure {
    let message = plain_driver_errors(without_backtrace(&format!("{error:#}")));
    if error.downcast_ref::<BadInput>().is_some() {
        return Failure::BadInput { message, hint: crate::error::hint(error) };
    }
    if let Some(oom) = error.downcast_ref::<OutOfMemory>() {
        let (wanted_bytes, free_bytes) = (oom.wanted_bytes, oom.free_bytes);
        return Failure::OutOfMemory { message, wanted_bytes, free_bytes };
    }
    if error.downcast_ref::<InvalidResult>().is_some() {
        return Failure::Invalid { message };
    }
    let refused = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::OutOfMemory;
    // cuBLAS allocates by itself, and its error is no driver's.
    let by_library = message.contains("CUBLAS_STATUS_ALLOC_FAILED");
    let by_system = error.chain().filter_map(|cause| cause.downcast_ref()).any(refused);
    if by_system || by_library || crate::engine::memory::is_out_of_memory(error) {
        let wanted_bytes = error.downcast_ref::<Refused>().map_or(0, |refused| refused.bytes);
        return Failure::OutOfMemory { message, wanted_bytes, free_bytes: 0 };
    }
    Failure::Error { message }
}

/// Status of the record that reports a failure.
pub fn status_of(failure: &Failure) -> Status {
    match failure {
        Failure::OutOfMemory { .. } => Status::Oom,
        Failure::Invalid { .. } => Status::Invalid,
        Failure::Timeout { .. } => Status::Timeout,
        Failure::BadInput { .. } | Failure::Error { .. } => Status::Error,
    }
}

/// A failure as an error of the command: for what no precision can run with.
pub fn into_error(failure: Failure) -> anyhow::Error {
    match failure {
        Failure::BadInput { message, hint: Some(hint) } => BadInput::new(message).hint(hint).into(),
        Failure::BadInput { message, hint: None } => BadInput::new(message).into(),
        other => anyhow::anyhow!(other.message().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn errors_are_sorted_through_context() {
        let bad = Err::<(), _>(BadInput::new("no such folder").hint("look again")).context("loading").unwrap_err();
        let bad = failure_of(&bad);
        assert_eq!(bad.message(), "loading: no such folder");
        assert!(matches!(bad, Failure::BadInput { hint: Some(hint), .. } if hint == "look again"));
        let oom = Err::<(), _>(OutOfMemory { wanted_bytes: 7, free_bytes: 5 }).context("loading").unwrap_err();
        assert!(matches!(failure_of(&oom), Failure::OutOfMemory { wanted_bytes: 7, free_bytes: 5, .. }));
        let os = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::OutOfMemory)).context("reading");
        assert!(matches!(failure_of(&os), Failure::OutOfMemory { wanted_bytes: 0, .. }));
        let what = "the attention scores".to_owned();
        let refused = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::OutOfMemory))
            .context(Refused { bytes: 3 << 30, what })
            .context("filling the cache");
        let refused = failure_of(&refused);
        assert!(refused.message().starts_with("filling the cache: 3.00 GiB for the attention scores could not be"));
        assert!(matches!(refused, Failure::OutOfMemory { wanted_bytes, .. } if wanted_bytes == 3 << 30));
        assert!(matches!(failure_of(&InvalidResult("no".into()).into()), Failure::Invalid { .. }));
        let blas = failure_of(&anyhow::anyhow!("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"));
        assert_eq!(blas.message(), "cuBLAS had too little free memory (CUBLAS_STATUS_ALLOC_FAILED)");
        assert!(matches!(blas, Failure::OutOfMemory { .. }));
        let other = failure_of(&anyhow::anyhow!("other"));
        assert!(matches!(&other, Failure::Error { .. }));
        assert_eq!(other.within("the reference").message(), "the reference: other");
    }
}
