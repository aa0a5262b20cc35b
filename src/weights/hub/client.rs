//! Requests to the hub: whom the token goes to, which redirects are followed, how long an answer is waited for.

use ureq::http::{HeaderMap, Method, Request, Response, Uri};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body, BodyReader};

use super::config::HubConfig;
use super::refusal::{Answer, Refusal};
use super::url::{self, Origin};

/// More redirects than this are a circle.
const MAX_REDIRECTS: usize = 10;

const USER_AGENT: &str = concat!("quantbench/", env!("CARGO_PKG_VERSION"));

/// Asks one hub. Only the hub's own origin (scheme, host and port) is sent the token; a redirect to another host is followed
/// without it.
pub struct Client<'a> {
    config: &'a HubConfig,
    origin: Option<Origin>,
    /// For requests about a file.
    asking: Agent,
    /// For a file's content.
    loading: Agent,
    /// What of the certificates' settings could not be used.
    problems: Vec<String>,
}

/// What the hub says about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    pub commit: String,
    /// By which the cache names the content; the SHA-256 of what is stored as a large file.
    pub etag: String,
    /// `None` where the hub does not report it.
    pub bytes: Option<u64>,
}

/// The content of a file from some byte on.
pub struct Content {
    /// 0 where the server ignores ranges.
    pub from: u64,
    /// Bytes of the whole file, where the hub reports them.
    pub total: Option<u64>,
    pub is_web_page: bool,
    pub reader: BodyReader<'static>,
}

impl<'a> Client<'a> {
    pub fn new(config: &'a HubConfig) -> Self {
        let trust = config.network.trust();
        let tls = TlsConfig::builder().root_certs(trust.roots).build();
        let usual = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(0)
                .max_redirects_will_error(false)
                .proxy(None)
                .tls_config(tls.clone())
                .user_agent(USER_AGENT)
                .timeout_resolve(Some(config.timeouts.answer))
                .timeout_connect(Some(config.timeouts.answer))
        };
        let (answer, idle) = (Some(config.timeouts.answer), Some(config.timeouts.idle));
        Self {
            config,
            origin: url::parse(&config.endpoint).map(|endpoint| Origin::of(&endpoint)),
            asking: usual().timeout_recv_response(answer).build().into(),
            loading: usual().timeout_recv_response(idle).timeout_per_read(idle).build().into(),
            problems: trust.problems,
        }
    }

    /// Asks about a file. Redirects are followed until they leave the host with all that is to be known.
    pub fn metadata(&self, address: &str) -> Result<Metadata, Refusal> {
        let mut address = self.parse(address)?;
        let mut known = Known::default();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&self.asking, Method::HEAD, &address, 0)?;
            Answer::of(&response).accept(self.config.token.is_some())?;
            known.add(response.headers(), response.status().is_redirection());
            let Some(next) = target(&address, &response)? else { return known.metadata(response.headers()) };
            if Origin::of(&next) != Origin::of(&address) && known.is_enough() {
                return known.metadata(response.headers());
            }
            address = next;
        }
        Err(too_many_redirects())
    }

    /// Opens a file's content from byte `from` on, wherever redirects lead.
    pub fn content(&self, address: &str, from: u64) -> Result<Content, Refusal> {
        let mut address = self.parse(address)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&self.loading, Method::GET, &address, from)?;
            match target(&address, &response)? {
                Some(next) => address = next,
                None if response.status().as_u16() == 416 => return Err(Refusal::NoSuchRange),
                None if response.status().is_success() => return content(response, from),
                None if Some(Origin::of(&address)) == self.origin => {
                    Answer::of(&response).accept(self.config.token.is_some())?;
                    return Err(Refusal::Other { reason: format!("it answered {}", response.status().as_u16()) });
                }
                // A signed address may have expired; the hub makes a new one.
                None => {
                    let status = response.status().as_u16();
                    return Err(Refusal::Interrupted { reason: format!("the host that stores it answered {status}") });
                }
            }
        }
        Err(too_many_redirects())
    }

    fn parse(&self, address: &str) -> Result<Uri, Refusal> {
        url::parse(address).ok_or_else(|| Refusal::Other { reason: format!("`{address}` is no address") })
    }

    fn send(&self, agent: &Agent, method: Method, address: &Uri, from: u64) -> Result<Response<Body>, Refusal> {
        let mut request = Request::builder().method(method).uri(address).header("Accept-Encoding", "identity");
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        if let Some(token) = self.config.token.as_ref().filter(|_| Some(Origin::of(address)) == self.origin) {
            request = request.header("Authorization", format!("Bearer {}", token.secret()));
        }
        let request = request.body(()).map_err(|error| Refusal::Other { reason: error.to_string() })?;
        let proxy = self.config.network.proxy(address).map_err(|reason| Refusal::Other { reason })?;
        let request = agent.configure_request(request).proxy(proxy).build();
        agent.run(request).map_err(|error| Refusal::of_transport(error, &self.problems))
    }
}

fn too_many_redirects() -> Refusal {
    Refusal::Other { reason: format!("it redirects more than {MAX_REDIRECTS} times") }
}

/// Where an answer leads; `None` for one that is no redirect.
fn target(address: &Uri, response: &Response<Body>) -> Result<Option<Uri>, Refusal> {
    if !response.status().is_redirection() || response.status().as_u16() == 304 {
        return Ok(None);
    }
    let location = response.headers().get("location").map(|value| value.as_bytes());
    let target = location.and_then(|location| url::redirect(address, location));
    target.map(Some).ok_or_else(|| Refusal::Other { reason: "it redirects to no address".to_owned() })
}

fn content(response: Response<Body>, asked_from: u64) -> Result<Content, Refusal> {
    let header = |name: &str| text(response.headers(), name);
    let encoded = header("content-encoding").is_some_and(|encoding| encoding != "identity");
    if encoded {
        return Err(Refusal::Other {
            reason: "it sends the file compressed although that was not asked for".to_owned(),
        });
    }
    let (from, total) = match response.status().as_u16() {
        206 => range(header("content-range").unwrap_or_default().as_str())
            .filter(|(from, _)| *from == asked_from)
            .ok_or_else(|| Refusal::Interrupted { reason: "it sent another part than asked for".to_owned() })?,
        _ => (0, header("content-length").and_then(|length| length.parse().ok())),
    };
    let is_web_page = is_web_page(response.headers());
    Ok(Content { from, total, is_web_page, reader: response.into_body().into_reader() })
}

/// First byte and whole length of `bytes FIRST-LAST/LENGTH`.
fn range(header: &str) -> Option<(u64, Option<u64>)> {
    let (part, total) = header.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some((part.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
}

/// Facts from the answers to one request.
#[derive(Default)]
struct Known {
    commit: Option<String>,
    etag: Option<String>,
    linked_etag: Option<String>,
    bytes: Option<u64>,
    linked_bytes: Option<u64>,
}

impl Known {
    /// A later answer counts, but what the hub says of a linked file counts before what its store says.
    fn add(&mut self, headers: &HeaderMap, is_redirect: bool) {
        let number = |name: &str| text(headers, name).and_then(|value| value.trim().parse().ok());
        let later = |new: Option<String>, old: &mut Option<String>| *old = new.or(old.take());
        later(text(headers, "x-repo-commit"), &mut self.commit);
        later(text(headers, "etag"), &mut self.etag);
        self.linked_etag = self.linked_etag.take().or(text(headers, "x-linked-etag"));
        self.linked_bytes = self.linked_bytes.or(number("x-linked-size"));
        // A redirect has a length of its own.
        self.bytes = number("content-length").filter(|_| !is_redirect);
    }

    fn is_enough(&self) -> bool {
        self.commit.is_some() && (self.linked_etag.is_some() || self.etag.is_some())
    }

    fn metadata(self, last: &HeaderMap) -> Result<Metadata, Refusal> {
        let plain =
            |text: &str| !text.is_empty() && text.len() <= 128 && text.bytes().all(|b| b.is_ascii_alphanumeric());
        let Some(commit) = self.commit.filter(|commit| plain(commit)) else {
            let what = if is_web_page(last) { "a web page" } else { "something without a commit" };
            return Err(Refusal::NoHub { reason: format!("{what} came, as from a sign-in page or a proxy") });
        };
        let etag = self.linked_etag.or(self.etag).unwrap_or_default();
        let etag = etag.trim().trim_start_matches("W/").trim_matches('"').to_owned();
        let is_file_name = etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if etag.is_empty() || etag.starts_with('.') || etag.len() > 200 || !is_file_name {
            return Err(Refusal::Other { reason: "its ETag header names no content".to_owned() });
        }
        Ok(Metadata { commit, etag, bytes: self.linked_bytes.or(self.bytes) })
    }
}

fn is_web_page(headers: &HeaderMap) -> bool {
    text(headers, "content-type").is_some_and(|kind| kind.to_ascii_lowercase().starts_with("text/html"))
}

/// A header's text.
pub fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn known(answers: &[(&[(&'static str, &'static str)], bool)]) -> Result<Metadata, Refusal> {
        let mut known = Known::default();
        for (lines, is_redirect) in answers {
            known.add(&headers(lines), *is_redirect);
        }
        known.metadata(&headers(answers.last().unwrap().0))
    }

    #[test]
    fn the_hubs_own_word_counts_before_that_of_its_store() {
        let hub = [("x-repo-commit", "abc"), ("etag", "\"short\""), ("content-length", "9")];
        let linked = [("x-repo-commit", "abc"), ("x-linked-etag", "\"sha\""), ("x-linked-size", "1000")];
        let store = [("etag", "W/\"store\""), ("content-length", "1000")];
        let expect = |etag: &str, bytes| Metadata { commit: "abc".into(), etag: etag.into(), bytes };
        assert_eq!(known(&[(&hub, false)]).unwrap(), expect("short", Some(9)));
        assert_eq!(known(&[(&hub, true)]).unwrap(), expect("short", None));
        assert_eq!(known(&[(&linked, true)]).unwrap(), expect("sha", Some(1000)));
        assert_eq!(known(&[(&linked, true), (&store, false)]).unwrap(), expect("sha", Some(1000)));
        assert_eq!(known(&[(&hub, true), (&store, false)]).unwrap(), expect("store", Some(1000)));
    }

    #[test]
    fn answers_of_what_is_no_hub_are_refused() {
        let page = [("content-type", "Text/HTML; charset=utf-8"), ("etag", "\"x\"")];
        assert!(matches!(known(&[(&page, false)]), Err(Refusal::NoHub { reason }) if reason.contains("web page")));
        for commit in ["", "../x", "a/b"] {
            let lines = [("x-repo-commit", commit), ("etag", "\"x\"")];
            assert!(matches!(known(&[(&lines, false)]), Err(Refusal::NoHub { .. })), "{commit}");
        }
        for etag in ["", "\"\"", "\"../x\"", "\"a/b\"", "\".x\"", "\"a b\""] {
            let lines = [("x-repo-commit", "abc"), ("etag", etag)];
            assert!(matches!(known(&[(&lines, false)]), Err(Refusal::Other { .. })), "{etag}");
        }
    }

    #[test]
    fn ranges_are_read() {
        assert_eq!(range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes */10", "lines 5-9/10", "bytes 5-9"] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }
}
