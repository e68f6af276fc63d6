//! Mutual TLS: both sides show a certificate of our CA, and nothing else is trusted.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use ring::hmac;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};

use super::QuicOptions;
use crate::error::CredentialError;

/// The protocol and its major version.
const ALPN: &[u8] = b"trireme-fabric/1";
/// The name in every certificate of a cluster: workers are told apart by their hello, not by DNS.
pub(crate) const SERVER_NAME: &str = "trireme";

/// Bytes of a chain, or of the CAs. The handshake carries them in packets that may not reach 16 KiB (see `path`).
const CERTIFICATES_BYTES_MAX: usize = 12 << 10;

/// What dials, what answers, and what disowns.
pub(crate) struct Configs {
    pub client: Arc<QuicClientConfig>,
    pub server: Arc<QuicServerConfig>,
    pub reset_key: hmac::Key,
}

pub(crate) fn configs(options: &QuicOptions) -> Result<Configs, CredentialError> {
    let provider = Arc::new(provider());
    let chain = certificates("cert_pem", &options.cert_pem)?;
    let mut roots = RootCertStore::empty();
    for ca in certificates("ca_pem", &options.ca_pem)? {
        roots.add(ca)?;
    }
    let roots = Arc::new(roots);

    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(Arc::clone(&roots))
        .with_client_auth_cert(chain.clone(), private_key(options)?)?;
    client.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would not look at certificates again, and one could outlive its validity.
    client.resumption = Resumption::disabled();

    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, private_key(options)?)?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;

    let no_suite = |_| rustls::Error::General("the provider lacks AES-128-GCM for QUIC".into());
    Ok(Configs {
        client: Arc::new(QuicClientConfig::try_from(client).map_err(no_suite)?),
        server: Arc::new(QuicServerConfig::try_from(server).map_err(no_suite)?),
        reset_key: reset_key(&options.key_pem),
    })
}

/// ring with AES-128-GCM alone: rustls would offer AES-256 first, which costs a quarter of the throughput.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// The key of QUIC's stateless reset, with which an end disowns a connection of its predecessor on the same port: the
/// peer learns of the restart with its next packet instead of after 1.5 s of silence. Made from the private key, because
/// it must be the same in the next process and secret to everybody else.
fn reset_key(key_pem: &str) -> hmac::Key {
    let secret = hmac::Key::new(hmac::HMAC_SHA256, key_pem.trim().as_bytes());
    let derived = hmac::sign(&secret, b"trireme-fabric stateless reset");
    hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref())
}

fn certificates(field: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, CredentialError> {
    let found = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| CredentialError::Pem { field, source })?;
    let bytes = found.iter().map(|certificate| certificate.len()).sum();
    match bytes {
        0 => Err(CredentialError::Empty { field }),
        1..=CERTIFICATES_BYTES_MAX => Ok(found),
        _ => Err(CredentialError::TooLong { field, bytes, max: CERTIFICATES_BYTES_MAX }),
    }
}

fn private_key(options: &QuicOptions) -> Result<PrivateKeyDer<'static>, CredentialError> {
    PrivateKeyDer::from_pem_slice(options.key_pem.as_bytes())
        .map_err(|source| CredentialError::Pem { field: "key_pem", source })
}
