//! A hub whose certificate a company's own authority signed.

use std::path::PathBuf;
use std::sync::Arc;

use quantbench::error;
use quantbench::events::Silent;
use quantbench::weights::hub::{HubConfig, Network};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::server::{Behaviour, Hub};
use super::{config, files, open};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/hub/certificates").join(name)
}

fn hub() -> Hub {
    let certificate = CertificateDer::from_pem_file(path("localhost.crt")).unwrap();
    let key = PrivateKeyDer::from_pem_file(path("localhost.key")).unwrap();
    let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    Hub::serve(Behaviour { files: files(), tls: Some(Arc::new(tls)), ..Default::default() })
}

fn trusting(config: HubConfig, variable: &str, value: &str) -> HubConfig {
    let network = Network::from_variables(&|name| (name == variable).then(|| value.to_owned()));
    HubConfig { network, ..config }
}

#[test]
fn a_named_authority_is_trusted_beside_those_of_the_system() {
    let hub = hub();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(path("ca.crt"), folder.path().join("company.pem")).unwrap();
    let (file, folder) = (path("ca.crt"), folder.path());
    for (variable, value) in [
        ("SSL_CERT_FILE", file.to_str().unwrap()),
        ("SSL_CERT_DIR", folder.to_str().unwrap()),
        ("REQUESTS_CA_BUNDLE", file.to_str().unwrap()),
        ("CURL_CA_BUNDLE", file.to_str().unwrap()),
    ] {
        let home = tempfile::tempdir().unwrap();
        let config = trusting(config(&hub.endpoint, home.path(), None), variable, value);
        open(&config, &Silent).unwrap_or_else(|error| panic!("{variable}: {error:#}"));
    }
}

#[test]
fn an_unknown_authority_is_refused_with_the_way_to_trust_it() {
    let hub = hub();
    let home = tempfile::tempdir().unwrap();
    let plain = config(&hub.endpoint, home.path(), None);
    let absent = trusting(plain.clone(), "SSL_CERT_FILE", "/absent/ca.pem");
    for (config, part) in [(plain, "is not trusted"), (absent, "/absent/ca.pem")] {
        let error = open(&config, &Silent).err().expect("nobody knows that authority");
        assert!(error.to_string().contains(part), "{error}");
        assert!(error::hint(&error).unwrap().contains("`SSL_CERT_FILE`"), "{error}");
    }
}
