//! Addresses: what is a hub's own, and where a redirect leads.

use ureq::http::Uri;

/// An `http` or `https` address with a host.
pub fn parse(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    (known && uri.host().is_some_and(|host| !host.is_empty())).then_some(uri)
}

/// Whom an address belongs to. A token goes to one origin alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    pub fn of(address: &Uri) -> Self {
        let scheme = address.scheme_str().unwrap_or_default().to_owned();
        let port = address.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Self { scheme, host: address.host().unwrap_or_default().to_ascii_lowercase(), port }
    }
}

/// Where the `Location` header of an answer from `base` leads; `None` where it is no address of the web.
pub fn redirect(base: &Uri, location: &[u8]) -> Option<Uri> {
    let location: String = location.iter().map(|&byte| escaped(byte, |byte| byte.is_ascii_graphic())).collect();
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let whole = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    parse(&whole)
}

/// A file's name as a part of an address; its slashes stay.
pub fn escape_path(name: &str) -> String {
    name.bytes().map(|byte| escaped(byte, |byte| byte == b'/' || is_unreserved(byte))).collect()
}

/// A revision as one part of an address.
pub fn escape_part(name: &str) -> String {
    name.bytes().map(|byte| escaped(byte, is_unreserved)).collect()
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn escaped(byte: u8, stays: impl Fn(u8) -> bool) -> String {
    if stays(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_a_browser_would_go() {
        let base = parse("https://hub.example:8443/mirror/a/resolve/main/config.json?x=1").unwrap();
        for (location, expected) in [
            ("https://cdn.example/f?sig=a%2Fb", "https://cdn.example/f?sig=a%2Fb"),
            ("HTTP://cdn.example/f#part", "HTTP://cdn.example/f"),
            ("//cdn.example/f", "https://cdn.example/f"),
            ("/b/f", "https://hub.example:8443/b/f"),
            ("other.json", "https://hub.example:8443/mirror/a/resolve/main/other.json"),
            ("?y=2", "https://hub.example:8443/mirror/a/resolve/main/config.json?y=2"),
            ("/a b\u{e9}", "https://hub.example:8443/a%20b%C3%A9"),
        ] {
            let seen = redirect(&base, location.as_bytes()).unwrap_or_else(|| panic!("{location}"));
            assert_eq!(seen, expected.parse::<Uri>().unwrap(), "{location}");
        }
        for location in ["ftp://cdn.example/f", "http://", "file:///etc/passwd"] {
            assert_eq!(redirect(&base, location.as_bytes()), None, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let of = |text: &str| Origin::of(&parse(text).unwrap());
        assert_eq!(of("https://Hub.example/a"), of("https://hub.example:443/b"));
        for other in
            ["http://hub.example", "https://hub.example:444", "https://hub.example.test", "https://x.hub.example"]
        {
            assert_ne!(of("https://hub.example"), of(other), "{other}");
        }
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(escape_path("sub/model 1#2?.safetensors"), "sub/model%201%232%3F.safetensors");
        assert_eq!(escape_part("refs/pr/1"), "refs%2Fpr%2F1");
    }
}
