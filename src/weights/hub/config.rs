//! How to reach the hub, from the environment variables that its own tools read, in their order of precedence.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::network::Network;
use super::url;
use crate::error::BadInput;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Without `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// How to reach the hub and where its files are kept.
#[derive(Clone)]
pub struct HubConfig {
    /// Without a trailing slash.
    pub endpoint: String,
    /// The folder of repositories, `$HF_HOME/hub` by default.
    pub cache: PathBuf,
    pub token: Option<Token>,
    /// Only what the cache holds.
    pub offline: bool,
    pub timeouts: Timeouts,
    pub patience: Patience,
    /// Proxies and additional certificates.
    pub network: Network,
}

/// How long a silent host is waited for. A download of any length may take its time as long as bytes arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For connecting, and for an answer about a file.
    pub answer: Duration,
    /// Between two parts of a download.
    pub idle: Duration,
}

/// How often and after which pause a hub that is busy or a connection that broke is tried again.
#[derive(Clone)]
pub struct Patience {
    /// Attempts in a row that bring nothing, after the first.
    pub retries: usize,
    /// Before the first further attempt, where the hub names no time; each later pause is twice as long, up to `longest_pause`.
    pub pause: Duration,
    pub longest_pause: Duration,
    /// A hub that asks for a longer pause than this is given up.
    pub longest_asked: Duration,
    /// Between two looks at a lock that another process holds.
    pub lock_pause: Duration,
    /// Lets the time pass; tests replace it.
    pub sleep: Arc<dyn Fn(Duration) + Send + Sync>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            retries: 5,
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(8),
            // The hub counts requests over five minutes.
            longest_asked: Duration::from_secs(300),
            lock_pause: Duration::from_millis(250),
            sleep: Arc::new(std::thread::sleep),
        }
    }
}

/// An access token. It has no `Debug` and no `Display`: it goes into a header and nowhere else.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Fails on what no HTTP header can hold, without repeating it.
    pub fn new(text: &str, from: &str) -> Result<Self> {
        match text.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(Self(text.to_owned())),
            false => Err(BadInput::new(format!("the access token in {from} holds blanks or non-ASCII characters"))
                .hint("copy it again from the hub's settings page")
                .into()),
        }
    }

    pub(super) fn secret(&self) -> &str {
        &self.0
    }
}

impl HubConfig {
    /// An endpoint and a cache folder, without a token, with the usual times and no proxy.
    pub fn new(endpoint: &str, cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: cache.into(),
            token: None,
            offline: false,
            timeouts: Timeouts { answer: DEFAULT_TIMEOUT, idle: DEFAULT_TIMEOUT },
            patience: Patience::default(),
            network: Network::default(),
        }
    }

    /// The settings of this process's environment; docs/offline.md lists the variables.
    pub fn from_env(offline: bool) -> Result<Self> {
        Self::from_variables(offline, &|name| std::env::var(name).ok())
    }

    /// The settings of an environment in which `variable` gives the value of a name. Fails on values that mean nothing.
    pub fn from_variables(offline: bool, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let variables = Variables(variable);
        let endpoint = variables.get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        check_endpoint(&endpoint)?;
        let home = variables.home()?;
        let offline = offline || variables.is_on("HF_HUB_OFFLINE") || variables.is_on("TRANSFORMERS_OFFLINE");
        Ok(Self {
            token: variables.token(&home)?,
            offline,
            timeouts: Timeouts {
                answer: variables.seconds("HF_HUB_ETAG_TIMEOUT")?,
                idle: variables.seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
            },
            network: Network::from_variables(&|name| variables.get(name)),
            ..Self::new(&endpoint, variables.cache(&home)?)
        })
    }
}

fn check_endpoint(endpoint: &str) -> Result<(), BadInput> {
    let bad = |why: &str| Err(BadInput::new(format!("`HF_ENDPOINT` {why}")));
    match url::parse(endpoint) {
        None => bad(&format!("is `{endpoint}`, which is no address"))
            .map_err(|error| error.hint("give a whole one, such as `https://huggingface.co`")),
        Some(address) if address.authority().is_some_and(|authority| authority.as_str().contains('@')) => {
            bad("holds a user name or a password, which is not sent")
                .map_err(|error| error.hint("leave it out and set `HF_TOKEN`"))
        }
        Some(_) => Ok(()),
    }
}

/// Environment variables; empty ones count as unset.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn is_on(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()))
    }

    fn seconds(&self, name: &str) -> Result<Duration, BadInput> {
        let Some(value) = self.get(name) else { return Ok(DEFAULT_TIMEOUT) };
        match value.parse::<u32>() {
            Ok(0) => Ok(DEFAULT_TIMEOUT),
            Ok(seconds) => Ok(Duration::from_secs(seconds.into())),
            Err(_) => Err(BadInput::new(format!("`{name}` is `{value}`, not a whole number of seconds"))
                .hint("give such as `30`, or unset it")),
        }
    }

    /// The first of `names` that is set, as an absolute path.
    fn path(&self, names: &[&str]) -> Result<Option<PathBuf>> {
        let found = names.iter().find_map(|name| Some((name, self.get(name)?)));
        found.map(|(name, value)| absolute(&self.expand(&value), name)).transpose()
    }

    fn home(&self) -> Result<PathBuf> {
        if let Some(home) = self.path(&["HF_HOME"])? {
            return Ok(home);
        }
        let caches = match self.path(&["XDG_CACHE_HOME"])? {
            Some(caches) => caches,
            None => absolute(&self.expand("~/.cache"), "HOME")?,
        };
        Ok(caches.join("huggingface"))
    }

    fn cache(&self, home: &Path) -> Result<PathBuf> {
        Ok(self.path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])?.unwrap_or_else(|| home.join("hub")))
    }

    fn token(&self, home: &Path) -> Result<Option<Token>> {
        if self.is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            return Ok(None);
        }
        for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            if let Some(text) = self.get(name) {
                return Token::new(&text, &format!("`{name}`")).map(Some);
            }
        }
        let file = self.path(&["HF_TOKEN_PATH"])?.unwrap_or_else(|| home.join("token"));
        match std::fs::read_to_string(file).unwrap_or_default().trim() {
            "" => Ok(None),
            text => Token::new(text, "the token file").map(Some),
        }
    }

    /// A leading `~`, and `$NAME` and `${NAME}` of variables that are set, as Python expands them.
    fn expand(&self, text: &str) -> String {
        let user_home = || self.get("HOME").unwrap_or_else(|| ".".to_owned());
        let text = match text.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("{}{rest}", user_home()),
            _ => text.to_owned(),
        };
        let mut parts = text.split('$');
        let mut expanded = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let braced = part.strip_prefix('{').and_then(|rest| rest.split_once('}'));
            let plain = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
            let (name, rest) = braced.unwrap_or(part.split_at(plain));
            match self.get(name) {
                Some(value) => expanded += &format!("{value}{rest}"),
                None => expanded += &format!("${part}"),
            }
        }
        expanded
    }
}

/// Links in the cache are relative and need both ends absolute.
fn absolute(path: &str, name: impl Display) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("`{name}` names no folder"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn config(variables: &[(&str, &str)]) -> Result<HubConfig> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        HubConfig::from_variables(false, &|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn the_cache_variables_count_in_the_order_of_huggingface_hub() {
        let all = [
            ("HF_HUB_CACHE", "/a/hub"),
            ("HUGGINGFACE_HUB_CACHE", "/b/hub"),
            ("HF_HOME", "/c"),
            ("XDG_CACHE_HOME", "/d"),
            ("HOME", "/e"),
        ];
        let expected = ["/a/hub", "/b/hub", "/c/hub", "/d/huggingface/hub", "/e/.cache/huggingface/hub"];
        for (at, expected) in expected.iter().enumerate() {
            assert_eq!(config(&all[at..]).unwrap().cache, Path::new(expected));
        }
        let blank = config(&[("HF_HUB_CACHE", " "), ("HF_HOME", "/c")]).unwrap();
        assert_eq!(blank.cache, Path::new("/c/hub"));
        for (value, expected) in [("~/m", "/e/m"), ("$D/m", "/d/m"), ("${D}m", "/dm"), ("/x/$NONE/y", "/x/$NONE/y")] {
            let seen = config(&[("HF_HUB_CACHE", value), ("HOME", "/e"), ("D", "/d")]).unwrap();
            assert_eq!(seen.cache, Path::new(expected), "{value}");
        }
        let relative = config(&[("HF_HUB_CACHE", "models")]).unwrap();
        assert!(relative.cache.is_absolute() && relative.cache.ends_with("models"));
    }

    #[test]
    fn tokens_come_from_variables_and_files_unless_they_are_switched_off() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let elsewhere = format!("{home}/elsewhere");
        std::fs::write(folder.path().join("token"), "hf_home\n").unwrap();
        std::fs::write(&elsewhere, "hf_elsewhere").unwrap();
        let all = [
            ("HF_TOKEN", "hf_new"),
            ("HUGGING_FACE_HUB_TOKEN", "hf_old"),
            ("HF_TOKEN_PATH", &elsewhere),
            ("HF_HOME", home),
        ];
        let secret = |config: HubConfig| config.token.map(|token| token.secret().to_owned());
        for (at, expected) in ["hf_new", "hf_old", "hf_elsewhere", "hf_home"].into_iter().enumerate() {
            assert_eq!(secret(config(&all[at..]).unwrap()).as_deref(), Some(expected));
        }
        let off = [&all[..], &[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]].concat();
        assert_eq!(secret(config(&off).unwrap()), None);
    }

    #[test]
    fn settings_that_mean_nothing_are_refused() {
        let set = config(&[
            ("HF_ENDPOINT", "http://mirror:81/path//"),
            ("HF_HUB_ETAG_TIMEOUT", "3"),
            ("HF_HUB_OFFLINE", "ON"),
        ])
        .unwrap();
        assert_eq!((set.endpoint.as_str(), set.offline), ("http://mirror:81/path", true));
        let expected = Timeouts { answer: Duration::from_secs(3), idle: DEFAULT_TIMEOUT };
        assert_eq!(set.timeouts, expected);
        for (name, value, part) in [
            ("HF_ENDPOINT", "mirror.example", "no address"),
            ("HF_ENDPOINT", "ftp://mirror.example", "no address"),
            ("HF_ENDPOINT", "https://me:pass@mirror.example", "user name or a password"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "`soon`"),
            ("HF_TOKEN", "hf a", "blanks"),
        ] {
            let error = config(&[(name, value)]).err().expect(value);
            assert!(error.to_string().contains(part), "{error}");
            assert!(!error.to_string().contains("pass@"), "{error}");
        }
    }
}
