//! Mutual TLS on the control plane: who may speak at all.
//!
//! A cluster has one certificate authority of its own, and every process a certificate signed by it, for
//! the one name [`SERVER_NAME`]: a worker's identity is its id and incarnation, not the host it runs on.
//! Both ends present a certificate; public authorities are never consulted.

use std::fmt;
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, ServerTlsConfig};

/// The name in all certificates of a cluster.
pub const SERVER_NAME: &str = "trireme";

/// A peer on the local network answers in milliseconds or is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Keep-alive of idle connections; with the answer's time limit a silent peer is found within 1.5 s.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Unread bytes of one stream, and of all streams of a connection: a thousand readers that stall cannot keep
/// the connection's other streams from moving.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// What a process proves itself with and checks others by. PEM text.
#[derive(Clone)]
pub struct Identity {
    /// The cluster's certificate authority.
    pub ca_pem: String,
    /// This process' certificate, signed by that authority.
    pub cert_pem: String,
    /// The certificate's private key.
    pub key_pem: String,
}

/// An address that no endpoint can be made of, or PEM that rustls does not take.
#[derive(Debug, thiserror::Error)]
#[error("control address {address}: {source}")]
pub struct EndpointError {
    /// The address as given.
    pub address: String,
    /// What tonic says.
    #[source]
    pub source: tonic::transport::Error,
}

impl Identity {
    /// What a client presents and demands; `domain` is the server's name in its certificate,
    /// [`SERVER_NAME`] in our own.
    pub fn client_tls(&self, domain: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .domain_name(domain)
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .identity(self.tonic_identity())
    }

    /// What a server presents and demands: a client without a certificate of our authority is refused.
    pub fn server_tls(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(self.tonic_identity())
            .client_ca_root(Certificate::from_pem(&self.ca_pem))
            .client_auth_optional(false)
    }

    /// An endpoint for the gRPC service at `address` (host:port): mutual TLS, bounded connect, and
    /// keep-alives that find a dead peer under an open stream.
    ///
    /// # Errors
    /// The address is no host:port, or the PEM is malformed.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, EndpointError> {
        let failed = |source| EndpointError { address: address.to_owned(), source };
        Endpoint::from_shared(format!("https://{address}"))
            .map_err(failed)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .tls_config(self.client_tls(SERVER_NAME))
            .map_err(failed)
    }

    fn tonic_identity(&self) -> tonic::transport::Identity {
        tonic::transport::Identity::from_pem(&self.cert_pem, &self.key_pem)
    }
}

/// The private key stays out of every log.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("key_pem", &"<hidden>").finish_non_exhaustive()
    }
}
