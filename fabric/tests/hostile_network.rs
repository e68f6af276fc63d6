//! What only a network can do to an end: silence, strangers, garbage, and peers that break the protocol.

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use fabric::{Channel, DialError, Fabric, FabricError, Limits, LossReason, ProtocolError};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use support::certificates::Authority;
use support::relay::Relay;
use support::{Net, PATIENCE, eventually, frame, lost, next, options, pair, pattern, received, send, up};

fn authority(net: &Net) -> &Authority {
    match net {
        Net::Quic(authority) | Net::Shared(authority) | Net::Rdma(authority, _) => authority,
        Net::InProcess(_) => unreachable!("these tests are about the network"),
    }
}

#[test]
fn a_silent_peer_is_lost_on_both_sides() {
    let net = Net::quic();
    let (a, b) = (net.open("a"), net.open("b"));
    let relay = Relay::to(&b.address());
    let b_at_a = a.connect(&relay.address(), PATIENCE).expect("a connection through the relay");
    let (a_events, b_events) = (a.receiver(Channel::Kv), b.receiver(Channel::Kv));
    let (a_at_b, _) = up(&b_events);
    assert_eq!(up(&a_events).0, b_at_a);
    send(&a, b_at_a, Channel::Kv, frame(b"through", b""));
    assert_eq!(&*received(&b_events).1, b"through");

    relay.cut();
    assert_eq!(lost(&a_events), (b_at_a, LossReason::Silent));
    assert_eq!(lost(&b_events), (a_at_b, LossReason::Silent));
    // The address is free to be dialled again: no memory of the dead connection.
    let direct = a.connect(&b.address(), PATIENCE).expect("a new connection");
    assert_ne!(direct, b_at_a);
}

#[test]
fn a_new_incarnation_ends_the_old_one_at_once() {
    let net = Net::quic();
    let a = net.open("a");
    let events = a.receiver(Channel::Kv);
    let old = net.open_with("b", 1, Limits::default());
    // Behind a cut relay the old process cannot say goodbye: only its successor's hello tells.
    let relay = Relay::to(&a.address());
    old.connect(&relay.address(), PATIENCE).expect("a connection");
    let (old_peer, _) = up(&events);
    relay.cut();
    let new = net.open_with("b", 2, Limits::default());
    new.connect(&a.address(), PATIENCE).expect("a connection");
    let (new_peer, info) = up(&events);
    assert_eq!(info.incarnation, 2);
    assert_eq!(lost(&events), (old_peer, LossReason::Superseded));
    assert!(a.peer(new_peer).is_some());
}

#[test]
fn a_process_that_was_killed_and_restarted_disowns_its_connections() {
    let net = Net::quic();
    let ca = authority(&net);
    let credentials = ca.issue();
    let b = |incarnation| {
        let options = options(&ca.pem(), credentials.clone(), "b", incarnation, Limits::default());
        Fabric::quic(options).expect("an end")
    };
    let (a, killed) = (net.open("a"), b(1));
    let relay = Relay::to(&killed.address());
    let old_peer = a.connect(&relay.address(), PATIENCE).expect("a connection");
    let events = a.receiver(Channel::Kv);
    up(&events);

    // The same address and private key, but none of the old process' memory.
    let restarted = b(2);
    relay.retarget(&restarted.address());
    assert_eq!(lost(&events), (old_peer, LossReason::Restarted));
    let new_peer = a.connect(&relay.address(), PATIENCE).expect("a connection to the new process");
    assert_eq!(up(&events).1.incarnation, 2);
    assert_ne!(new_peer, old_peer);
}

#[test]
fn another_authority_is_refused_in_either_direction() {
    let (ours, theirs) = (Net::quic(), Net::quic());
    let us = ours.open("us");
    refused(&us, &theirs.open("stranger"));
    // Knows our CA, but its own certificate is of another one.
    let half = options(&authority(&ours).pem(), authority(&theirs).issue(), "impostor", 1, Limits::default());
    refused(&us, &Fabric::quic(half).expect("an end"));
}

#[test]
fn an_expired_certificate_is_refused_in_either_direction() {
    let net = Net::quic();
    let ca = authority(&net);
    let expired = options(&ca.pem(), ca.issue_expired(), "old", 1, Limits::default());
    refused(&net.open("us"), &Fabric::quic(expired).expect("an end"));
}

/// Neither side gets a connection to the other, both count it, and both go on serving their own kind.
fn refused(us: &Fabric, stranger: &Fabric) {
    for (from, to) in [(stranger, us), (us, stranger)] {
        let before = to.stats().handshakes_failed;
        match from.connect(&to.address(), PATIENCE) {
            Err(FabricError::Unreachable { source: DialError::Handshake { .. }, .. }) => (),
            other => panic!("expected a failed handshake, got {other:?}"),
        }
        eventually("the refusal is counted", || to.stats().handshakes_failed > before);
    }
    assert_eq!(us.stats().peers_up, 0);
    assert!(us.receiver(Channel::Kv).is_empty(), "a refused stranger is no event");
}

#[test]
fn garbage_at_the_port_changes_nothing() {
    let net = Net::quic();
    let pair = pair(&net);
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let target = socket_address(&pair.b);
    for seed in 0..500 {
        let mut datagram = pattern(seed, (seed as usize * 37) % 2_000);
        // Half of them look like the start of a connection: long header, QUIC's version 1.
        if seed % 2 == 0 && datagram.len() > 5 {
            datagram[..5].copy_from_slice(&[0xc3, 0, 0, 0, 1]);
        }
        socket.send_to(&datagram, target).expect("a datagram");
    }
    send(&pair.a, pair.b_at_a, Channel::Kv, frame(b"still", b"here"));
    assert_eq!(&*received(&pair.b.receiver(Channel::Kv)).2, b"here");
    net.open("late").connect(&pair.b.address(), PATIENCE).expect("new peers are served");
}

/// The wire by hand: what a hello of version 1 looks like.
fn hello(version: u16, worker: &[u8]) -> Vec<u8> {
    let mut wire = b"TRFB".to_vec();
    wire.extend_from_slice(&version.to_le_bytes());
    wire.extend_from_slice(&9_u64.to_le_bytes());
    for text in [worker, b"quic://127.0.0.1:9".as_slice(), b"", b""] {
        wire.push(text.len() as u8);
        wire.extend_from_slice(text);
    }
    // No token, no RDMA.
    wire.extend_from_slice(&[0; 17]);
    wire
}

#[test]
fn a_well_formed_stranger_with_our_certificate_is_served() {
    let rogue = Rogue::new(b"trireme-fabric/1");
    let streams = [[vec![0], hello(3, b"w"), frame_bytes(4, 4, b"headbody")].concat(), vec![1]];
    let connection = rogue.say(streams);
    let events = rogue.victim.receiver(Channel::Kv);
    let (peer, info) = up(&events);
    assert_eq!((info.worker.as_str(), info.incarnation), ("w", 9));
    assert_eq!(info.address, "quic://127.0.0.1:9");
    let (from, head, body) = received(&events);
    assert_eq!((from, &*head, &*body), (peer, b"head".as_slice(), b"body".as_slice()));
    drop(connection);
}

#[test]
fn frames_over_the_limits_cost_the_connection() {
    let limits = Limits::default();
    let cases = [
        (
            frame_bytes(u32::MAX, 0, b""),
            ProtocolError::HeadTooLong { got: u32::MAX, max: limits.head_bytes_max },
        ),
        (
            frame_bytes(0, u32::MAX, b""),
            ProtocolError::BodyTooLong { got: u32::MAX, max: limits.body_bytes_max },
        ),
    ];
    for (wire, expected) in cases {
        let rogue = Rogue::new(b"trireme-fabric/1");
        let connection = rogue.say([[vec![0], hello(3, b"w")].concat(), [vec![1], wire].concat()]);
        let events = rogue.victim.receiver(Channel::Experts);
        let (peer, _) = up(&events);
        assert_eq!(lost(&events), (peer, LossReason::Protocol(expected)));
        assert_eq!(rogue.victim.stats().protocol_errors, 1);
        assert_eq!(rogue.closed_with(&connection), Some(1), "the close code for a broken protocol");
    }
}

#[test]
fn bad_openings_are_refused_and_counted() {
    let good = [vec![0], hello(3, b"w")].concat();
    let openings: [(&str, [Vec<u8>; 2]); 6] = [
        ("another wire version", [[vec![0], hello(1, b"w")].concat(), vec![1]]),
        ("no magic", [[vec![0], b"GET / HTTP/1.1\r\n\r\n".to_vec()].concat(), vec![1]]),
        ("a channel that does not exist", [good.clone(), vec![2]]),
        ("a channel twice", [good.clone(), vec![0]]),
        ("no name", [[vec![0], hello(3, b"")].concat(), vec![1]]),
        ("a name that is not UTF-8", [[vec![0], hello(3, b"\xff\xfe")].concat(), vec![1]]),
    ];
    for (what, streams) in openings {
        let rogue = Rogue::new(b"trireme-fabric/1");
        let connection = rogue.say(streams);
        assert_eq!(rogue.closed_with(&connection), Some(1), "{what}");
        eventually(what, || rogue.victim.stats().handshakes_failed == 1);
        assert_eq!(rogue.victim.stats().protocol_errors, 1, "{what}");
        assert!(rogue.victim.receiver(Channel::Kv).is_empty(), "{what}");
    }
}

#[test]
fn a_finished_channel_costs_the_connection() {
    let rogue = Rogue::new(b"trireme-fabric/1");
    let connection = rogue.say([[vec![0], hello(3, b"w")].concat(), vec![1]]);
    let events = rogue.victim.receiver(Channel::Kv);
    up(&events);
    rogue.finish_streams();
    match next(&events) {
        fabric::Event::PeerLost { reason, .. } => {
            assert_eq!(reason, LossReason::Protocol(ProtocolError::StreamEnded));
        }
        other => panic!("expected a loss, got {other:?}"),
    }
    drop(connection);
}

#[test]
fn another_protocol_is_refused() {
    let rogue = Rogue::new(b"trireme-kv/1");
    assert!(rogue.dial().is_err(), "the ALPN must match");
    eventually("counted", || rogue.victim.stats().handshakes_failed == 1);
}

#[test]
fn credentials_that_cannot_work_name_the_field() {
    let net = Net::quic();
    let ca = authority(&net);
    let good = || options(&ca.pem(), ca.issue(), "w", 1, Limits::default());
    let message = |options| {
        let error = Fabric::quic(options).expect_err("unusable");
        std::error::Error::source(&error).expect("a source").to_string()
    };
    assert!(message(fabric::QuicOptions { ca_pem: String::new(), ..good() }).contains("ca_pem"));
    assert!(message(fabric::QuicOptions { cert_pem: "x".into(), ..good() }).contains("cert_pem"));
    assert!(message(fabric::QuicOptions { key_pem: "x".into(), ..good() }).contains("key_pem"));
    let other_key = ca.issue().key_pem;
    message(fabric::QuicOptions { key_pem: other_key, ..good() });
}

fn frame_bytes(head_bytes: u32, body_bytes: u32, payload: &[u8]) -> Vec<u8> {
    [&head_bytes.to_le_bytes()[..], &body_bytes.to_le_bytes(), payload].concat()
}

fn socket_address(end: &Fabric) -> SocketAddr {
    end.address().strip_prefix("quic://").expect("a QUIC end").parse().expect("an address")
}

/// A peer with good credentials and bad manners, on bare quinn.
struct Rogue {
    victim: Fabric,
    runtime: tokio::runtime::Runtime,
    endpoint: quinn::Endpoint,
    client: quinn::ClientConfig,
    streams: std::sync::Mutex<Vec<quinn::SendStream>>,
}

impl Rogue {
    fn new(alpn: &[u8]) -> Self {
        let net = Net::quic();
        let ca = authority(&net);
        let credentials = ca.issue();
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(ca.pem().as_bytes()) {
            roots.add(ca.expect("PEM")).expect("a CA");
        }
        let chain = CertificateDer::pem_slice_iter(credentials.cert_pem.as_bytes())
            .map(|cert| cert.expect("PEM"))
            .collect();
        let key = PrivateKeyDer::from_pem_slice(credentials.key_pem.as_bytes()).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("credentials");
        tls.alpn_protocols = vec![alpn.to_vec()];
        let client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("a suite")));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let endpoint = {
            let _inside = runtime.enter();
            quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port")
        };
        Self { victim: net.open("victim"), runtime, endpoint, client, streams: Default::default() }
    }

    fn dial(&self) -> Result<quinn::Connection, quinn::ConnectionError> {
        let address = socket_address(&self.victim);
        self.runtime.block_on(async {
            let connecting = self.endpoint.connect_with(self.client.clone(), address, "trireme");
            connecting.expect("a valid configuration").await
        })
    }

    /// Dials and writes the given bytes on two streams.
    fn say(&self, streams: [Vec<u8>; 2]) -> quinn::Connection {
        let connection = self.dial().expect("a handshake");
        self.runtime.block_on(async {
            for bytes in streams {
                let mut stream = connection.open_uni().await.expect("a stream");
                // The victim may close before all is written; what it says then is asserted elsewhere.
                drop(stream.write_all(&bytes).await);
                self.streams.lock().expect("not poisoned").push(stream);
            }
        });
        connection
    }

    fn finish_streams(&self) {
        for stream in self.streams.lock().expect("not poisoned").iter_mut() {
            stream.finish().expect("an open stream");
        }
    }

    /// The application code with which the victim closed.
    fn closed_with(&self, connection: &quinn::Connection) -> Option<u64> {
        let closed =
            self.runtime.block_on(async { tokio::time::timeout(PATIENCE, connection.closed()).await });
        match closed.expect("the victim closes") {
            quinn::ConnectionError::ApplicationClosed(closed) => Some(closed.error_code.into_inner()),
            _ => None,
        }
    }
}
