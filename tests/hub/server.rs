//! A loopback hub with commits, etags, ranges, redirects, refusals, broken connections and other hosts.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use sha2::{Digest, Sha256};

use super::{COMMIT, SECRET};

/// What the server holds and how it behaves.
#[derive(Default)]
pub struct Behaviour {
    pub files: BTreeMap<&'static str, Vec<u8>>,
    /// Answer to every request without the token [`SECRET`]; a 403 to those with it too.
    pub refuse: Option<Refuse>,
    /// The next transfer of this many bytes or more breaks off after that many; 0 is never.
    pub break_after: AtomicUsize,
    /// Sends files whole, whatever range is asked for.
    pub ignores_ranges: bool,
    /// Status and headers for the first request of each path.
    pub first: Option<(&'static str, &'static str)>,
    /// Status, headers and body for every request, once set.
    pub all: Mutex<Option<(&'static str, &'static str, &'static str)>>,
    /// Where large files lie; the hub's own `/blobs` where unset.
    pub store: Option<String>,
    /// Holds `/blobs` alone, and refuses whoever shows a token, as object stores do.
    pub is_store: bool,
    /// What `/blobs` holds in place of the file that the hub announced.
    pub swapped: BTreeMap<&'static str, Vec<u8>>,
    /// Etags are the SHA-256 of the content, told with its size beside a redirect, as the hub does for large files.
    pub is_hashed: bool,
    /// Sends the content of a large file only when so many have asked about it.
    pub waits_for_askers: usize,
    /// Speaks TLS.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

pub struct Refuse {
    pub status: u16,
    pub code: &'static str,
    pub message: &'static str,
    /// Tells HEAD alone the code.
    pub only_head: bool,
}

pub struct Hub {
    pub endpoint: String,
    pub behaviour: Arc<Behaviour>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Method, path and range of each request, and whether it showed a token.
    log: Mutex<Vec<(String, bool)>>,
    seen: Mutex<HashSet<String>>,
    askers: Mutex<usize>,
    more_askers: Condvar,
}

impl Hub {
    pub fn serve(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let scheme = if behaviour.tls.is_some() { "https" } else { "http" };
        // Two names of one machine are two hosts.
        let host = if behaviour.is_store || behaviour.tls.is_some() { "localhost" } else { "127.0.0.1" };
        let endpoint = format!("{scheme}://{host}:{}", listener.local_addr().unwrap().port());
        let hub = Self { endpoint, behaviour: Arc::new(behaviour), state: Arc::default() };
        let (endpoint, behaviour, state) = (hub.endpoint.clone(), hub.behaviour.clone(), hub.state.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (endpoint, behaviour, state) = (endpoint.clone(), behaviour.clone(), state.clone());
                // A client may hang up at any time.
                std::thread::spawn(move || match &behaviour.tls {
                    None => answer(stream, &endpoint, &behaviour, &state),
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                        answer(rustls::StreamOwned::new(connection, stream), &endpoint, &behaviour, &state)
                    }
                });
            }
        });
        hub
    }

    /// Method, path and range of each request since the last call.
    pub fn log(&self) -> Vec<String> {
        self.log_with_tokens().into_iter().map(|(line, _)| line).collect()
    }

    /// The same, and whether the request showed a token.
    pub fn log_with_tokens(&self) -> Vec<(String, bool)> {
        std::mem::take(&mut self.state.log.lock().unwrap())
    }

    /// From now on every request is answered so.
    pub fn answer_all(&self, status: &'static str, headers: &'static str, body: &'static str) {
        *self.behaviour.all.lock().unwrap() = Some((status, headers, body));
    }
}

/// What was asked.
struct Asked {
    method: String,
    path: String,
    range: String,
    token: Option<String>,
}

fn read(stream: &mut impl Read) -> std::io::Result<Asked> {
    let mut lines = BufReader::with_capacity(1, stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut headers = BTreeMap::new();
    while let Some(line) = lines.next().transpose()?.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or_default();
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let range = headers.get("range").cloned().unwrap_or_default();
    Ok(Asked { method, path, range, token: headers.get("authorization").cloned() })
}

fn answer(mut stream: impl Read + Write, endpoint: &str, hub: &Behaviour, state: &State) -> std::io::Result<()> {
    let Asked { method, path, range, token } = read(&mut stream)?;
    state.log.lock().unwrap().push((format!("{method} {path} {range}"), token.is_some()));
    let is_first = state.seen.lock().unwrap().insert(path.clone());
    let (prefix, name) = path.rsplit_once('/').unwrap_or_default();
    let large = name.ends_with(".safetensors");
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        let head =
            format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        let whole = hub.break_after.load(Ordering::SeqCst);
        match method.as_str() {
            "HEAD" => Ok(()),
            _ if whole > 0 && body.len() >= whole => {
                hub.break_after.store(0, Ordering::SeqCst);
                stream.write_all(&body[..whole])
            }
            _ => stream.write_all(body),
        }?;
        stream.flush()
    };
    if let Some((status, headers, body)) = *hub.all.lock().unwrap() {
        return reply(status, headers, body.as_bytes());
    }
    if let Some((status, headers)) = hub.first.filter(|_| is_first) {
        return reply(status, headers, b"");
    }
    if hub.is_store && token.is_some() {
        return reply("400", "", b"only one way to sign in is allowed");
    }
    let at_hub = !prefix.starts_with("/blobs");
    let welcome = token.is_some_and(|value| value == format!("Bearer {SECRET}"));
    if let Some(refuse) = hub.refuse.as_ref().filter(|refuse| at_hub && (!welcome || refuse.status == 403)) {
        let told = !refuse.code.is_empty() && (method == "HEAD" || !refuse.only_head);
        let code = if told { format!("X-Error-Code: {}\r\n", refuse.code) } else { String::new() };
        let explained = format!("{code}X-Error-Message: {}\r\n", refuse.message);
        return reply(&refuse.status.to_string(), &explained, b"");
    }
    if at_hub && !prefix.ends_with("/main") && !prefix.ends_with(COMMIT) {
        return reply("404", "X-Error-Code: RevisionNotFound\r\n", b"");
    }
    let Some(file) = hub.files.get(name) else {
        return reply("404", "X-Error-Code: EntryNotFound\r\n", b"");
    };
    if large {
        wait_for_askers(hub, state, method == "HEAD" && at_hub);
    }
    let facts = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{}\"\r\n", etag(hub, name));
    match (at_hub, large, prefix.starts_with("/relative")) {
        // Large files lie elsewhere, and small ones behind a relative redirect.
        (true, true, _) => {
            let store = hub.store.as_deref().unwrap_or(endpoint);
            let size = format!("X-Linked-Size: {}\r\n", file.len());
            let linked =
                if hub.is_hashed { format!("X-Linked-Etag: \"{}\"\r\n{size}", etag(hub, name)) } else { String::new() };
            reply("302", &format!("{facts}{linked}Location: {store}/blobs/{name}\r\n"), b"")
        }
        (true, false, false) => reply("307", &format!("{facts}Location: /relative{path}\r\n"), b""),
        _ => {
            let file = hub.swapped.get(name).unwrap_or(file);
            let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap_or(0);
            match from {
                _ if hub.ignores_ranges || range.is_empty() => reply("200", &facts, file),
                from if from >= file.len() => reply("416", "", b""),
                from => {
                    let content = format!("Content-Range: bytes {from}-{}/{}\r\n{facts}", file.len() - 1, file.len());
                    reply("206", &content, &file[from..])
                }
            }
        }
    }
}

fn wait_for_askers(hub: &Behaviour, state: &State, asks: bool) {
    let mut askers = state.askers.lock().unwrap();
    if asks {
        *askers += 1;
        state.more_askers.notify_all();
        return;
    }
    while *askers < hub.waits_for_askers {
        askers = state.more_askers.wait(askers).unwrap();
    }
}

fn etag(hub: &Behaviour, name: &str) -> String {
    match hub.is_hashed {
        true => Sha256::digest(&hub.files[name]).iter().map(|byte| format!("{byte:02x}")).collect(),
        false => format!("etag-{}", name.replace('.', "-")),
    }
}

/// An address at which nobody listens any more.
pub fn refused_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// An address that takes connections and never answers, as long as the listener lives.
pub fn silent_endpoint() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (format!("http://{}", listener.local_addr().unwrap()), listener)
}
