//! How to reach the hub, from the environment variables that its own tools read.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hf_hub::Cache;

use crate::error::BadInput;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How to reach the hub and where its files are kept.
pub struct HubConfig {
    /// Without a trailing slash.
    pub endpoint: String,
    /// The folder that holds `hub/` and `token`.
    pub home: PathBuf,
    pub token: Option<Token>,
    /// Only what the cache holds.
    pub offline: bool,
    /// Attempts after the first, each from where the last one stopped.
    pub retries: usize,
}

/// An access token. It has no `Debug` and no `Display`: it goes into a header and nowhere else.
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
    /// `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, and the token of `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` or
    /// `$HF_HOME/token`.
    pub fn from_env(offline: bool) -> Result<Self> {
        let set = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|v| !v.is_empty());
        let user_home = || set("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
        let home = set("HF_HOME").map_or_else(|| user_home().join(".cache/huggingface"), PathBuf::from);
        // hf-hub links files by relative paths and needs both ends absolute.
        let home = std::path::absolute(&home).context("`HF_HOME` names no folder")?;
        let variable = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(|name| Some((set(name)?, name)));
        let token = match variable {
            Some((text, name)) => Some(Token::new(&text, &format!("`{name}`"))?),
            None => token_file(&home)?,
        };
        let yes = |value: String| ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str());
        Ok(Self {
            endpoint: set("HF_ENDPOINT")
                .unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned())
                .trim_end_matches('/')
                .to_owned(),
            home,
            token,
            offline: offline || set("HF_HUB_OFFLINE").is_some_and(yes),
            retries: 5,
        })
    }

    pub(super) fn cache(&self) -> Cache {
        Cache::new(self.home.join("hub"))
    }
}

fn token_file(home: &Path) -> Result<Option<Token>> {
    let text = std::fs::read_to_string(home.join("token")).unwrap_or_default();
    match text.trim() {
        "" => Ok(None),
        text => Token::new(text, "the token file").map(Some),
    }
}
