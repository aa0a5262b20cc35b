//! Why the hub did not give a file, told apart by status and `X-Error-Code`.

use hf_hub::api::sync::ApiError;
use ureq::http::{HeaderMap, Response};

use super::random_hint;
use crate::error::BadInput;

/// What the hub answered, without the body.
pub struct Answer {
    pub status: u16,
    pub commit: Option<String>,
    pub error_code: Option<String>,
    error_message: Option<String>,
}

impl Answer {
    pub fn of(response: Result<Response<ureq::Body>, ureq::Error>) -> Result<Self, Refusal> {
        let response = response.map_err(Refusal::of_transport)?;
        let header = |name: &str| text(response.headers(), name);
        Ok(Self {
            status: response.status().as_u16(),
            commit: header("x-repo-commit"),
            error_code: header("x-error-code"),
            error_message: header("x-error-message"),
        })
    }

    /// `Ok` for a file that is there, whether here or behind a redirect.
    pub fn accept(self, signed: bool) -> Result<Self, Refusal> {
        let code = self.error_code.as_deref().unwrap_or_default();
        let message = self.error_message.as_deref().unwrap_or_default();
        Err(match (self.status, code) {
            (200..=399 | 416, _) => return Ok(self),
            (_, "GatedRepo") if signed => Refusal::LicenceNotAccepted,
            (_, "GatedRepo") => Refusal::GatedWithoutToken,
            (_, "RevisionNotFound") => Refusal::NoSuchRevision,
            (_, "EntryNotFound") => Refusal::NoSuchFile,
            (401, _) if signed && (code.is_empty() || message.contains("nvalid credentials")) => Refusal::BadToken,
            (401 | 404, "RepoNotFound") => Refusal::NoSuchRepository { signed },
            (401 | 403, _) if !signed => Refusal::NoToken,
            (401, _) => Refusal::BadToken,
            (403, _) => Refusal::TokenLacksAccess,
            // An endpoint that sends no codes: the repository was found when its config.json was.
            (404, _) => Refusal::NoSuchFile,
            (status, _) => Refusal::Other { reason: format!("it answered {status}") },
        })
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// Why a file could not be had.
#[derive(Debug)]
pub enum Refusal {
    Unreachable {
        reason: String,
    },
    GatedWithoutToken,
    NoToken,
    BadToken,
    LicenceNotAccepted,
    TokenLacksAccess,
    NoSuchRepository {
        signed: bool,
    },
    NoSuchRevision,
    NoSuchFile,
    /// hf-hub met a 401 or 403; a further request finds out which.
    Denied {
        status: u16,
    },
    /// A download broke off and may be resumed.
    Interrupted {
        reason: String,
    },
    Other {
        reason: String,
    },
}

impl Refusal {
    pub fn of(error: ApiError) -> Self {
        match error {
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(status @ (401 | 403)) => Self::Denied { status },
                ureq::Error::StatusCode(404) => Self::NoSuchFile,
                ureq::Error::StatusCode(status) => Self::Other { reason: format!("it answered {status}") },
                other => Self::of_transport(other),
            },
            ApiError::TooManyRetries(error) => Self::of(*error),
            ApiError::IoError(error) => Self::Interrupted { reason: error.to_string() },
            ApiError::LockAcquisition(_) => {
                Self::Other { reason: "another process is downloading the same file".to_owned() }
            }
            other => Self::Other { reason: other.to_string() },
        }
    }

    fn of_transport(error: ureq::Error) -> Self {
        Self::Unreachable { reason: error.to_string() }
    }

    /// The message and what to do next.
    pub fn explain(self, id: &str, revision: &str, file: &str, endpoint: &str) -> anyhow::Error {
        let random = random_hint(id);
        let (message, hint) = match self {
            Self::Unreachable { reason } => (
                format!("the hub at `{endpoint}` cannot be reached: {reason}"),
                format!("check the network, or `HF_ENDPOINT`, {random}"),
            ),
            Self::GatedWithoutToken => (
                format!("`{id}` asks for a licence to be accepted, and no access token was found"),
                format!("accept it at {endpoint}/{id} and set `HF_TOKEN`, {random}"),
            ),
            Self::NoToken => (
                format!("`{id}` needs an access token, and none was found"),
                format!("set `HF_TOKEN` to a token that may read it, {random}"),
            ),
            Self::BadToken => (
                format!("the hub does not know the access token that was sent for `{id}`"),
                format!("set `HF_TOKEN` to a valid token, {random}"),
            ),
            Self::LicenceNotAccepted => (
                format!("the licence of `{id}` has not been accepted by the owner of the access token"),
                format!("accept it at {endpoint}/{id}, {random}"),
            ),
            Self::TokenLacksAccess => (
                format!("the access token that was sent may not read `{id}`"),
                format!("give the token access to the repository, {random}"),
            ),
            Self::NoSuchRepository { signed } => (
                match signed {
                    true => format!("the hub has no repository `{id}` that the access token may see"),
                    false => {
                        format!("the hub has no repository `{id}`, or it is private and no access token was found")
                    }
                },
                format!("check the spelling, {random}"),
            ),
            Self::NoSuchRevision => (
                format!("`{id}` has no branch, tag or commit `{revision}`"),
                "drop `--revision` for the default branch".to_owned(),
            ),
            Self::NoSuchFile => (
                format!("`{id}` has no file `{file}` at `{revision}`"),
                format!("check that the repository holds a model, {random}"),
            ),
            Self::Denied { status } => {
                (format!("the hub refused `{file}` of `{id}` with {status}"), format!("try again, {random}"))
            }
            Self::Interrupted { reason } => (
                format!("the download of `{file}` of `{id}` broke off: {reason}"),
                "run the command again: it goes on where it stopped".to_owned(),
            ),
            Self::Other { reason } => (
                format!("`{file}` of `{id}` could not be had from `{endpoint}`: {reason}"),
                format!("try again, {random}"),
            ),
        };
        BadInput::new(message).hint(hint).into()
    }
}
