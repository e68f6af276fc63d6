//! An end of quinn's, set up for loopback as ours is (`fabric/src/quic/path.rs` says why each setting is as it is).

use std::any::Any;
use std::io::{self, IoSliceMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll};
use std::time::Instant;

use anyhow::Context;
use quinn::congestion::{Controller, ControllerFactory};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime,
    TransportConfig, UdpPoller, VarInt,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, RootCertStore};
use socket2::{Domain, Protocol, Socket, Type};

use super::super::ends::Credentials;

pub(super) const SERVER_NAME: &str = "trireme";
const UDP_PAYLOAD_BYTES_MAX: u16 = 65_507;
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
const SEND_WINDOW_BYTES: u64 = 3 << 20;

/// An end on loopback that dials and answers. To be called on its runtime.
pub(super) fn endpoint(mtu: Option<u16>, credentials: &Credentials) -> anyhow::Result<Endpoint> {
    let mtu = mtu.unwrap_or(UDP_PAYLOAD_BYTES_MAX);
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    let socket = Capped {
        inner: TokioRuntime.wrap_udp_socket(socket.into())?,
        segments: usize::from(UDP_PAYLOAD_BYTES_MAX / mtu).max(1),
    };
    let (client, server) = tls(credentials)?;
    let transport = transport(mtu);
    let mut server = ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(Arc::clone(&transport));
    let mut client = ClientConfig::new(Arc::new(client));
    client.transport_config(transport);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(mtu)?;
    let mut endpoint =
        Endpoint::new_with_abstract_socket(config, Some(server), Arc::new(socket), Arc::new(TokioRuntime))?;
    endpoint.set_default_client_config(client);
    Ok(endpoint)
}

fn transport(mtu: u16) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .congestion_controller_factory(Arc::new(Uncontrolled))
        .initial_mtu(mtu)
        // Above, a handshake packet would be longer than its length field can say.
        .min_mtu(mtu.min(16_000))
        .mtu_discovery_config(None)
        .send_window(SEND_WINDOW_BYTES)
        .stream_receive_window(VarInt::from_u32(16 << 20))
        .receive_window(VarInt::from_u32(64 << 20));
    Arc::new(transport)
}

fn tls(credentials: &Credentials) -> anyhow::Result<(QuicClientConfig, QuicServerConfig)> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256);
    let provider = Arc::new(provider);
    let certificates =
        |pem: &str| CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let key = || PrivateKeyDer::from_pem_slice(credentials.key_pem.as_bytes());
    let mut roots = RootCertStore::empty();
    for ca in certificates(&credentials.ca_pem)? {
        roots.add(ca)?;
    }
    let roots = Arc::new(roots);
    let chain = certificates(&credentials.cert_pem)?;
    let client = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(Arc::clone(&roots))
        .with_client_auth_cert(chain.clone(), key()?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key()?)?;
    let client = client.try_into().ok().context("no AES-128-GCM for QUIC")?;
    let server = server.try_into().ok().context("no AES-128-GCM for QUIC")?;
    Ok((client, server))
}

/// Joined datagrams within one UDP payload: without it 8,972-byte datagrams fall to 1,200.
#[derive(Debug)]
struct Capped {
    inner: Arc<dyn AsyncUdpSocket>,
    segments: usize,
}

impl AsyncUdpSocket for Capped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        task: &mut Task<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(task, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<std::net::SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// No congestion control: what is in flight is bounded by the send window.
#[derive(Clone)]
struct Uncontrolled;

impl ControllerFactory for Uncontrolled {
    fn build(self: Arc<Self>, _: Instant, _: u16) -> Box<dyn Controller> {
        Box::new(Self)
    }
}

impl Controller for Uncontrolled {
    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, _: u16) {}

    fn window(&self) -> u64 {
        1 << 33
    }

    fn initial_window(&self) -> u64 {
        1 << 33
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
