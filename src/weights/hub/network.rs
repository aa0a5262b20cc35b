//! Proxies and trusted certificates, as the variables of the environment and the system name them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ureq::Proxy;
use ureq::http::Uri;
use ureq::tls::{Certificate, PemItem, RootCerts, parse_pem};

/// Files that hold a system's trusted certificates, by distribution; the first that is there is read.
const SYSTEM_BUNDLES: [&str; 7] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
    "/etc/openssl/certs/ca-certificates.crt",
];

/// Variables that name a file or a folder of certificates: OpenSSL's, those of Python's `requests`, and curl's.
const CERTIFICATE_VARIABLES: [&str; 4] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];

/// What stands between this machine and a hub.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// Variable and value.
    certificates: Vec<(&'static str, String)>,
    proxy_of_http: Option<String>,
    proxy_of_https: Option<String>,
    /// Hosts that are reached without a proxy.
    no_proxy: Vec<String>,
}

/// The certificates that are trusted, and what of the settings could not be used.
pub struct Trust {
    pub roots: RootCerts,
    pub problems: Vec<String>,
}

impl Network {
    /// `SSL_CERT_FILE` and its kin, `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`; lower case counts first.
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| variable(&name.to_lowercase()).or_else(|| variable(name));
        let proxy = |name: &str| either(name).or_else(|| either("ALL_PROXY"));
        let certificates = CERTIFICATE_VARIABLES.iter().filter_map(|name| Some((*name, variable(name)?)));
        let no_proxy = either("NO_PROXY").unwrap_or_default();
        Self {
            certificates: certificates.collect(),
            proxy_of_http: proxy("HTTP_PROXY"),
            proxy_of_https: proxy("HTTPS_PROXY"),
            no_proxy: no_proxy.split([',', ' ']).filter(|host| !host.is_empty()).map(str::to_lowercase).collect(),
        }
    }

    /// The proxy for an address. Fails, with the variable's name, on one that cannot be used.
    pub fn proxy(&self, address: &Uri) -> Result<Option<Proxy>, String> {
        let (name, proxy) = match address.scheme_str() {
            Some("https") => ("HTTPS_PROXY", &self.proxy_of_https),
            _ => ("HTTP_PROXY", &self.proxy_of_http),
        };
        let Some(proxy) = proxy.as_ref().filter(|_| !self.bypasses(address)) else { return Ok(None) };
        // Its text may hold a password.
        Proxy::new(proxy).map(Some).map_err(|_| format!("`{name}` or `ALL_PROXY` names no proxy"))
    }

    fn bypasses(&self, address: &Uri) -> bool {
        let host = address.host().unwrap_or_default().trim_matches(['[', ']']).to_lowercase();
        self.no_proxy.iter().any(|entry| {
            let (name, port) = match entry.rsplit_once(':') {
                Some((name, port)) if !name.contains(':') => (name, port.parse().ok()),
                _ => (entry.as_str(), None),
            };
            let name = name.trim_start_matches('*').trim_start_matches('.');
            let named = name.is_empty() || host == name || host.ends_with(&format!(".{name}"));
            named && port.is_none_or(|port: u16| address.port_u16() == Some(port))
        })
    }

    /// The system's certificates and those that variables name besides; Mozilla's where there are none.
    pub fn trust(&self) -> Trust {
        let mut problems = Vec::new();
        let system = SYSTEM_BUNDLES.iter().map(Path::new).find(|path| path.is_file());
        let mut found = system.map(|path| certificates(path).unwrap_or_default()).unwrap_or_default();
        for (name, value) in &self.certificates {
            let mut of_variable = Vec::new();
            for path in std::env::split_paths(value).filter(|path| !path.as_os_str().is_empty()) {
                match certificates_at(&path) {
                    Ok(certificates) => of_variable.extend(certificates),
                    Err(error) => problems.push(format!("`{name}`: reading `{}`: {error}", path.display())),
                }
            }
            if of_variable.is_empty() {
                problems.push(format!("`{name}` names no certificate"));
            }
            found.extend(of_variable);
        }
        let roots = if found.is_empty() { RootCerts::WebPki } else { RootCerts::Specific(Arc::new(found)) };
        Trust { roots, problems }
    }
}

/// Of a file, or of the files of a folder.
fn certificates_at(path: &Path) -> std::io::Result<Vec<Certificate<'static>>> {
    if !path.is_dir() {
        return certificates(path);
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)?.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    // A folder may hold other files too.
    Ok(files.iter().flat_map(|file| certificates(file).unwrap_or_default()).collect())
}

fn certificates(file: &Path) -> std::io::Result<Vec<Certificate<'static>>> {
    let pem = std::fs::read(file)?;
    let items = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    Ok(items.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(variables: &[(&str, &str)]) -> Network {
        let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Network::from_variables(&get)
    }

    fn proxied(network: &Network, address: &str) -> Option<String> {
        network.proxy(&address.parse().unwrap()).unwrap().map(|proxy| proxy.host().to_owned())
    }

    #[test]
    fn a_proxy_is_chosen_by_scheme_and_left_out_for_named_hosts() {
        let set = network(&[
            ("HTTPS_PROXY", "http://upper:1"),
            ("https_proxy", "http://me:secret@secure:3128"),
            ("ALL_PROXY", "socks5://any:1080"),
            ("NO_PROXY", "localhost, .inside.example,ported.example:8080"),
        ]);
        assert_eq!(proxied(&set, "https://hub.example/a").as_deref(), Some("secure"));
        assert_eq!(proxied(&set, "http://hub.example/a").as_deref(), Some("any"));
        for address in
            ["http://localhost:99", "https://a.inside.example", "https://INSIDE.example", "http://ported.example:8080"]
        {
            assert_eq!(proxied(&set, address), None, "{address}");
        }
        for address in ["http://ported.example:81", "https://notinside.example", "https://localhost.example"] {
            assert!(proxied(&set, address).is_some(), "{address}");
        }
        assert_eq!(proxied(&network(&[("HTTP_PROXY", "p:1"), ("no_proxy", "*")]), "http://hub.example"), None);
        let bad = network(&[("HTTPS_PROXY", "quic://me:secret@p")]).proxy(&"https://hub.example".parse().unwrap());
        assert!(bad.is_err_and(|error| error.contains("HTTPS_PROXY") && !error.contains("secret")));
    }

    #[test]
    fn certificates_that_cannot_be_read_are_told() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("note.txt"), "no certificate").unwrap();
        let path = folder.path().to_str().unwrap();
        let problems = network(&[("SSL_CERT_FILE", "/absent/ca.pem"), ("SSL_CERT_DIR", path)]).trust().problems;
        assert!(problems[0].contains("SSL_CERT_FILE") && problems[0].contains("/absent/ca.pem"), "{problems:?}");
        assert!(problems.last().unwrap().contains("`SSL_CERT_DIR` names no certificate"), "{problems:?}");
    }
}
