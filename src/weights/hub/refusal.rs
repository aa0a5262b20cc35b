//! Reasons why the hub did not give a file, by status and `X-Error-Code`, and which may be retried.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use ureq::http::{HeaderMap, Response};

use super::client::text;
use super::random_hint;
use crate::error::BadInput;

/// What the hub answered, without the body.
pub struct Answer {
    status: u16,
    error_code: Option<String>,
    error_message: Option<String>,
    /// How long the hub asks to be left alone.
    pause: Option<Duration>,
}

impl Answer {
    pub fn of(response: &Response<ureq::Body>) -> Self {
        let header = |name: &str| text(response.headers(), name);
        Self {
            status: response.status().as_u16(),
            error_code: header("x-error-code"),
            error_message: header("x-error-message"),
            pause: asked_pause(response.headers()),
        }
    }

    /// `Ok` for a file that is there, whether here or behind a redirect.
    pub fn accept(self, signed: bool) -> Result<(), Refusal> {
        let code = self.error_code.as_deref().unwrap_or_default();
        let message = self.error_message.as_deref().unwrap_or_default();
        Err(match (self.status, code) {
            (200..=399 | 416, _) => return Ok(()),
            (_, "GatedRepo") if signed => Refusal::LicenceNotAccepted,
            (_, "GatedRepo") => Refusal::GatedWithoutToken,
            (_, "RevisionNotFound") => Refusal::NoSuchRevision,
            (_, "EntryNotFound") => Refusal::NoSuchFile { is_certain: true },
            (401, _) if signed && (code.is_empty() || message.contains("nvalid credentials")) => Refusal::BadToken,
            (401 | 404, "RepoNotFound") => Refusal::NoSuchRepository { signed },
            (401 | 403, _) if !signed => Refusal::NoToken,
            (401, _) => Refusal::BadToken,
            (403, _) => Refusal::TokenLacksAccess,
            // An endpoint that sends no codes: the repository was found when its config.json was.
            (404, _) => Refusal::NoSuchFile { is_certain: false },
            (status @ (408 | 425 | 429 | 500 | 502..=504), _) => Refusal::Busy { status, pause: self.pause },
            (status, _) => Refusal::Other { reason: format!("it answered {status}") },
        })
    }
}

/// `Retry-After: SECONDS`, or the `t=SECONDS` of `RateLimit`, which is the time until the count is reset.
fn asked_pause(headers: &HeaderMap) -> Option<Duration> {
    let limit = text(headers, "ratelimit").filter(|limit| limit.split(';').any(|part| part.trim() == "r=0"));
    let reset = limit.as_deref().and_then(|limit| limit.split(';').find_map(|part| part.trim().strip_prefix("t=")));
    let seconds = text(headers, "retry-after").and_then(|text| text.trim().parse().ok());
    seconds.or_else(|| reset?.parse().ok()).map(Duration::from_secs)
}

/// Of a connection that was there.
const BROKEN: &str = "the connection broke";

/// Why a file could not be had.
#[derive(Debug)]
pub enum Refusal {
    Unreachable {
        /// Without any host's name: it may stand in a record.
        brief: &'static str,
        reason: String,
    },
    /// Its certificate is signed by nobody who is trusted here.
    Untrusted {
        reason: String,
    },
    /// Something else answers at its address.
    NoHub {
        reason: String,
    },
    Busy {
        status: u16,
        pause: Option<Duration>,
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
    NoSuchFile {
        /// The hub said so, not a status alone.
        is_certain: bool,
    },
    /// A part of a file that is longer than the file.
    NoSuchRange,
    /// A download broke off and may be resumed.
    Interrupted {
        reason: String,
    },
    /// The content is not what was announced.
    Corrupt {
        reason: String,
    },
    /// The cache cannot be written.
    Cache {
        path: String,
        error: io::Error,
    },
    Other {
        reason: String,
    },
}

impl Refusal {
    /// `problems` are those of the certificates' settings.
    pub fn of_transport(error: ureq::Error, problems: &[String]) -> Self {
        let reason = error.to_string();
        let brief = match &error {
            ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => "connection refused",
            ureq::Error::HostNotFound => "no such host",
            ureq::Error::Timeout(_) => "no answer in time",
            ureq::Error::ConnectProxyFailed(_) => "the proxy did not connect",
            _ if reason.contains("certificate") => {
                let problems = problems.iter().map(|problem| format!("; {problem}")).collect::<String>();
                return Self::Untrusted { reason: format!("{reason}{problems}") };
            }
            _ => BROKEN,
        };
        Self::Unreachable { brief, reason }
    }

    pub fn of_cache(path: &Path, error: io::Error) -> Self {
        Self::Cache { path: path.display().to_string(), error }
    }

    /// Why a cached commit may stand in, as a record may say it, and the warning's name; `None` where the hub has spoken.
    pub fn outage(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Unreachable { brief, .. } => {
                Some(("hub_unreachable", format!("the hub cannot be reached ({brief})")))
            }
            Self::Untrusted { .. } => Some(("hub_unreachable", "the hub's certificate is not trusted here".to_owned())),
            Self::NoHub { reason } => Some(("hub_unreachable", format!("no hub answers at its address ({reason})"))),
            Self::Interrupted { .. } => Some(("hub_unreachable", "downloads from the hub break off".to_owned())),
            Self::Busy { status, .. } => Some(("hub_busy", format!("the hub is busy (it answered {status})"))),
            _ => None,
        }
    }

    /// Whether the same may work a moment later.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy { .. } | Self::Interrupted { .. })
    }

    /// Whether nobody answers at the hub's address, unlike somebody who breaks off.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Unreachable { brief, .. } if *brief != BROKEN)
    }

    /// In few words, for a line that says why something waits.
    pub fn brief(&self) -> String {
        match self {
            Self::Busy { status, .. } => format!("the hub answered {status}"),
            Self::Unreachable { brief, .. } => format!("the hub cannot be reached: {brief}"),
            _ => "the download broke off".to_owned(),
        }
    }

    /// The message and what to do next.
    pub fn explain(self, id: &str, revision: &str, file: &str, endpoint: &str) -> anyhow::Error {
        let random = random_hint(id);
        let again = "run the command again: it goes on where it stopped".to_owned();
        let (message, hint) = match self {
            Self::Unreachable { reason, .. } => (
                format!("the hub at `{endpoint}` cannot be reached: {reason}"),
                format!("check the network, or `HF_ENDPOINT`, {random}"),
            ),
            Self::Untrusted { reason } => (
                format!("the certificate of the hub at `{endpoint}` is not trusted: {reason}"),
                format!("name the file of the authority that signed it with `SSL_CERT_FILE`, {random}"),
            ),
            Self::NoHub { reason } => (
                format!("what answers at `{endpoint}` is no model hub: {reason}"),
                format!("check the network, its proxy, or `HF_ENDPOINT`, {random}"),
            ),
            Self::Busy { status, pause } => {
                let asked = pause.map(|pause| format!(" and asks to wait {} s", pause.as_secs())).unwrap_or_default();
                let reason = format!("the hub answered {status}{asked}");
                (
                    format!("`{file}` of `{id}` could not be had from `{endpoint}`: {reason}"),
                    format!("try again later, {random}"),
                )
            }
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
            Self::NoSuchFile { .. } => (
                format!("`{id}` has no file `{file}` at `{revision}`"),
                format!("check that the repository holds a model, {random}"),
            ),
            Self::NoSuchRange => (format!("the download of `{file}` of `{id}` could not be resumed"), again),
            Self::Interrupted { reason } => (format!("the download of `{file}` of `{id}` broke off: {reason}"), again),
            Self::Corrupt { reason } => (
                format!("`{file}` of `{id}` came otherwise than the hub announced it: {reason}"),
                format!("check the network and its proxy, and try again, {random}"),
            ),
            Self::Cache { path, error } => (
                format!("`{file}` of `{id}` cannot be kept in the cache `{path}`: {error}"),
                match error.kind() {
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                        "free some space, or name another folder with `HF_HUB_CACHE`; what came so far is kept"
                            .to_owned()
                    }
                    _ => "make the folder writable, or name another one with `HF_HUB_CACHE`".to_owned(),
                },
            ),
            Self::Other { reason } => (
                format!("`{file}` of `{id}` could not be had from `{endpoint}`: {reason}"),
                format!("try again, {random}"),
            ),
        };
        BadInput::new(message).hint(hint).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hub_says_how_long_to_wait() {
        for (lines, expected) in [
            (&[("retry-after", "7")][..], Some(7)),
            (&[("retry-after", "7"), ("ratelimit", "\"api\";r=0;t=55")], Some(7)),
            (&[("ratelimit", "\"api\"; r=0; t=55")], Some(55)),
            (&[("ratelimit", "\"api\";r=3;t=55")], None),
            (&[("retry-after", "Wed, 21 Oct 2037 07:28:00 GMT")], None),
            (&[], None),
        ] {
            let headers = lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            assert_eq!(asked_pause(&headers), expected.map(Duration::from_secs), "{lines:?}");
        }
    }
}
