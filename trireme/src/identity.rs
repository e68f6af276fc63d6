//! Certificates for a cluster that nobody configured: one authority and one node certificate, made at start.
//!
//! Every process of a cluster proves membership with a certificate of the same authority. `up` makes
//! both fresh in its state directory, so two clusters on one machine never trust each other. Elsewhere the
//! operator names the three files in `[security]`; nothing here is then used but [`load`].

use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use proto::security::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};

/// The name in every node certificate: membership is proven by the authority, not by host names.
pub const SERVER_NAME: &str = "trireme";

/// Where the PEM files of `[security]` lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The authority that signed every node's certificate.
    pub ca: PathBuf,
    /// This node's certificate, for server and client use, with the DNS name `trireme`.
    pub cert: PathBuf,
    /// The private key of `cert`.
    pub key: PathBuf,
}

/// Why an identity could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of `[security]` could not be read or written.
    #[error("security.{field}: {path}: {source}", path = path.display())]
    File {
        /// Which of `ca`, `cert`, `key`.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The certificate library refused.
    #[error("making the cluster's certificates: {0}")]
    Generate(#[from] rcgen::Error),
}

/// Makes an authority and one node certificate that is valid as server and as client.
pub fn generate() -> Result<Identity, IdentityError> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "Trireme cluster authority");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(ca, ca_key);

    let node_key = KeyPair::generate()?;
    let mut node = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    node.distinguished_name.push(DnType::CommonName, SERVER_NAME);
    node.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    node.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert_pem = node.signed_by(&node_key, &issuer)?.pem();
    Ok(Identity { ca_pem, cert_pem, key_pem: node_key.serialize_pem() })
}

/// Writes `identity` into `directory` (the key readable by its owner only) and returns where.
pub fn store(identity: &Identity, directory: &Path) -> Result<Config, IdentityError> {
    let files = Config {
        ca: directory.join("ca.pem"),
        cert: directory.join("node.pem"),
        key: directory.join("node.key"),
    };
    write("ca", &files.ca, &identity.ca_pem)?;
    write("cert", &files.cert, &identity.cert_pem)?;
    write("key", &files.key, &identity.key_pem)?;
    Ok(files)
}

/// Reads the three files.
pub fn load(config: &Config) -> Result<Identity, IdentityError> {
    Ok(Identity {
        ca_pem: read("ca", &config.ca)?,
        cert_pem: read("cert", &config.cert)?,
        key_pem: read("key", &config.key)?,
    })
}

fn write(field: &'static str, path: &Path, text: &str) -> Result<(), IdentityError> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| IdentityError::File { field, path: path.to_owned(), source })
}

fn read(field: &'static str, path: &Path) -> Result<String, IdentityError> {
    fs::read_to_string(path).map_err(|source| IdentityError::File { field, path: path.to_owned(), source })
}
