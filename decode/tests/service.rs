//! The decode role as a router sees it: gRPC over mutual TLS, a prefill side on an in-process fabric.

use std::time::Duration;

use decode::{Config, Handle, Node, start};
use fabric::{Fabric, Hub};
use kvtransfer::{KvTicket, SenderEvent};
use proto::control::Consequence;
use proto::security::{Identity, SERVER_NAME};
use proto::sequence::Sequence;
use proto::v1;
use proto::v1::decode_client::DecodeClient;
use proto::v1::decode_event::Event;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use support::{KV_BLOCKS, Prefill, engine, engine_without_mtp, request, single_run};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

mod support;

struct Cluster {
    handle: Handle,
    prefill: Prefill,
    identity: Identity,
    client: DecodeClient<Channel>,
}

impl Cluster {
    async fn start(lease: Duration) -> Self {
        let engine = engine();
        let hub = Hub::new();
        let end = |worker: &str, incarnation| {
            Fabric::in_process(&hub, worker, incarnation, fabric::Limits::default()).expect("a free name")
        };
        let fabric = end("decode-0", 7);
        let identity = identity();
        let node = Node {
            worker_id: "decode-0".to_owned(),
            incarnation: 7,
            identity: identity.clone(),
            routers: Vec::new(),
            fabric_address: fabric.address(),
            receiver: support::receiver(fabric, &engine, lease),
            engine,
            tier: engine::KvTier::none(),
            prefill_beside: false,
        };
        let handle = start(Config::default(), node).await.expect("a decode worker");
        let endpoint = identity.endpoint(&handle.control_address().to_string()).expect("an address");
        let client = DecodeClient::new(endpoint.connect().await.expect("a connection"));
        Self { handle, prefill: Prefill::new(end("prefill-0", 8)), identity, client }
    }

    async fn generate(&mut self, sequence: &Sequence) -> Result<Streaming<v1::DecodeEvent>, Status> {
        let request = v1::DecodeRequest { sequence: Some(sequence.to_wire()), prefill_here: false };
        self.client.generate(request).await.map(tonic::Response::into_inner)
    }

    /// Asks until there is room: blocks come back at once, but not before the worker hears of the end.
    async fn generate_when_room(&mut self, sequence: &Sequence) -> Streaming<v1::DecodeEvent> {
        loop {
            match self.generate(sequence).await {
                Ok(stream) => return stream,
                Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
            }
        }
    }

    /// A request that needs every block there is.
    fn largest(&self) -> Sequence {
        request(&self.prefill.engine, 99, 100, (KV_BLOCKS * 64 - 100) as u32)
    }
}

/// An authority of its own, and one certificate for both ends.
fn identity() -> Identity {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).expect("an authority").pem();
    let key = KeyPair::generate().expect("a key");
    let node = CertificateParams::new(vec![SERVER_NAME.to_owned()]).expect("a name");
    let cert_pem = node.signed_by(&key, &Issuer::new(ca, ca_key)).expect("a certificate").pem();
    Identity { ca_pem, cert_pem, key_pem: key.serialize_pem() }
}

async fn next(stream: &mut Streaming<v1::DecodeEvent>) -> Result<Event, Status> {
    Ok(stream.message().await?.expect("a stream ends with its sequence").event.expect("an event"))
}

async fn ticket(stream: &mut Streaming<v1::DecodeEvent>) -> KvTicket {
    match next(stream).await.expect("a ticket") {
        Event::Ticket(ticket) => KvTicket::from_wire(&ticket).expect("a sound ticket"),
        other => panic!("{other:?} instead of a ticket"),
    }
}

#[tokio::test]
async fn a_real_prompt_gives_the_bits_of_a_single_run() {
    let mut cluster = Cluster::start(Duration::from_secs(60)).await;
    let sequence = request(&cluster.prefill.engine, 1, 150, 50);
    let mut stream = cluster.generate(&sequence).await.expect("a stream");
    let ticket = ticket(&mut stream).await;
    let first = cluster.prefill.push(&sequence, ticket);
    assert!(matches!(next(&mut stream).await, Ok(Event::Handoff(_))));
    assert!(
        matches!(cluster.prefill.events(1)[..], [SenderEvent::Committed { .. }]),
        "prefill may free its blocks"
    );
    let mut tokens = vec![(first.token.0, Some(first.logprob.to_bits()))];
    let finished = loop {
        match next(&mut stream).await.expect("tokens") {
            Event::Tokens(decoded) => {
                tokens.extend(
                    decoded.tokens.iter().map(|token| (token.token_id, token.logprob.map(f32::to_bits))),
                );
            }
            Event::Finished(finished) => break finished,
            other => panic!("{other:?} among tokens"),
        }
    };
    assert_eq!(finished.reason(), v1::FinishReason::Length);
    let expect = single_run(&mut engine(), &sequence);
    let expect: Vec<_> = expect.iter().map(|token| (token.token.0, Some(token.logprob.to_bits()))).collect();
    assert_eq!(tokens, expect);
    assert!(stream.message().await.expect("a clean end").is_none());
    assert!(cluster.handle.metrics_text().contains("decode_finished_total 1"));
}

#[tokio::test]
async fn another_fingerprint_is_refused_by_its_field() {
    let mut cluster = Cluster::start(Duration::from_secs(60)).await;
    let mut sequence = request(&cluster.prefill.engine, 1, 10, 5);
    sequence.fingerprint.arithmetic_revision += 1;
    let status = cluster.generate(&sequence).await.expect_err("another fingerprint");
    assert_eq!((status.code(), Consequence::of(&status)), (Code::InvalidArgument, Consequence::Rejected));
    assert!(status.message().contains("fingerprint.arithmetic_revision"), "{}", status.message());
}

/// A worker that keeps no MTP cache has another layout of blocks: neither could use the other's.
#[tokio::test]
async fn a_fingerprint_without_the_mtp_module_is_refused_by_its_field() {
    let mut cluster = Cluster::start(Duration::from_secs(60)).await;
    let sequence = request(&engine_without_mtp(), 1, 10, 5);
    let status = cluster.generate(&sequence).await.expect_err("another layout");
    assert_eq!((status.code(), Consequence::of(&status)), (Code::InvalidArgument, Consequence::Rejected));
    assert!(status.message().contains("fingerprint.kv_layout_digest"), "{}", status.message());
}

#[tokio::test]
async fn malformed_requests_name_their_field_and_harm_nobody() {
    let mut cluster = Cluster::start(Duration::from_secs(60)).await;
    let sound = request(&cluster.prefill.engine, 1, 10, 5);
    type Spoil = fn(&mut v1::SequenceRequest);
    let check: [(Spoil, &str); 5] = [
        (|wire| wire.prompt.clear(), "prompt"),
        (|wire| wire.prompt[3] = u32::MAX, "prompt[3]"),
        (|wire| wire.sampling = None, "sampling"),
        (|wire| wire.stopping = None, "stopping"),
        (|wire| wire.fingerprint = None, "fingerprint"),
    ];
    for (spoil, field) in check {
        let mut wire = sound.to_wire();
        spoil(&mut wire);
        let answer =
            cluster.client.generate(v1::DecodeRequest { sequence: Some(wire), prefill_here: false }).await;
        let status = answer.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
        assert!(status.message().contains(field), "{field}: {status}");
    }
    let status = cluster.client.generate(v1::DecodeRequest::default()).await.expect_err("no sequence");
    assert!(status.message().contains("sequence"), "{status}");
    ticket(&mut cluster.generate(&sound).await.expect("served all the same")).await;
}

#[tokio::test]
async fn a_dropped_stream_gives_its_blocks_back() {
    let mut cluster = Cluster::start(Duration::from_secs(60)).await;
    let largest = cluster.largest();
    let holding = cluster.generate(&largest).await.expect("an empty pool");
    // The next one waits for what the first one holds, and gets it.
    drop(holding);
    let mut running = cluster.generate_when_room(&largest).await;
    let ticket = ticket(&mut running).await;
    cluster.prefill.push(&largest, ticket);
    assert!(matches!(next(&mut running).await, Ok(Event::Handoff(_))));
    assert!(matches!(next(&mut running).await, Ok(Event::Tokens(_))));
    drop(running);
    drop(cluster.generate_when_room(&largest).await);
}

#[tokio::test]
async fn a_ticket_that_nobody_uses_expires() {
    let mut cluster = Cluster::start(Duration::from_millis(50)).await;
    let largest = cluster.largest();
    let mut stream = cluster.generate(&largest).await.expect("a stream");
    ticket(&mut stream).await;
    let status = next(&mut stream).await.expect_err("the lease ran out");
    assert_eq!((status.code(), Consequence::of(&status)), (Code::Aborted, Consequence::Lost), "{status}");
    cluster.generate(&largest).await.expect("its blocks were free before it was told");
}

#[tokio::test]
async fn strangers_are_not_served() {
    let cluster = Cluster::start(Duration::from_secs(60)).await;
    let stranger = Identity { ca_pem: cluster.identity.ca_pem.clone(), ..identity() };
    let endpoint = stranger.endpoint(&cluster.handle.control_address().to_string()).expect("an address");
    // With TLS 1.3 a client hears of its refusal with the first answer, not with the handshake.
    if let Ok(channel) = endpoint.connect().await {
        let answer = DecodeClient::new(channel).generate(v1::DecodeRequest::default()).await;
        assert_ne!(
            answer.expect_err("a stranger").code(),
            Code::InvalidArgument,
            "its request was looked at"
        );
    }
}

#[tokio::test]
async fn health_is_told_and_shutdown_ends_it() {
    let cluster = Cluster::start(Duration::from_secs(60)).await;
    let endpoint =
        cluster.identity.endpoint(&cluster.handle.control_address().to_string()).expect("an address");
    let mut health = HealthClient::new(endpoint.connect().await.expect("a connection"));
    let request = HealthCheckRequest { service: "trireme.v1.Decode".to_owned() };
    let answer = health.check(request).await.expect("an answer").into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    drop(health);
    drop(cluster.client);
    cluster.handle.shutdown().await;
}
