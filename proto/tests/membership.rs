//! Announcements over real sockets and mutual TLS, against a registry that the test plays.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::membership::{announce, check_info};
use proto::security::Identity;
use proto::v1::registry_server::{Registry, RegistryServer};
use proto::v1::{Fingerprint, Role, RouterReport, WorkerInfo, WorkerReport};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// A certificate authority that exists for one test.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    fn identity(&self) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![proto::security::SERVER_NAME.to_owned()])?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { ca_pem: self.pem.clone(), cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }
}

/// One announce stream, as the test's registry sees it.
struct Stream {
    reports: Streaming<WorkerReport>,
    answers: mpsc::Sender<std::result::Result<RouterReport, Status>>,
}

/// Hands every announce stream to the test, which answers by hand.
struct TestRegistry(mpsc::Sender<Stream>);

#[tonic::async_trait]
impl Registry for TestRegistry {
    type AnnounceStream = ReceiverStream<std::result::Result<RouterReport, Status>>;

    async fn announce(
        &self,
        request: Request<Streaming<WorkerReport>>,
    ) -> std::result::Result<Response<Self::AnnounceStream>, Status> {
        let (answers, stream) = mpsc::channel(4);
        let opened = Stream { reports: request.into_inner(), answers };
        self.0.send(opened).await.map_err(|_| Status::cancelled("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// A registry on a free port; its address and the streams that are opened there.
async fn registry(identity: &Identity) -> Result<(String, mpsc::Receiver<Stream>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let (opened, streams) = mpsc::channel(4);
    let server = Server::builder()
        .tls_config(identity.server_tls())?
        .add_service(RegistryServer::new(TestRegistry(opened)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    Ok((address, streams))
}

fn info() -> WorkerInfo {
    WorkerInfo {
        worker_id: "decode-0".to_owned(),
        role: Role::Decode.into(),
        incarnation: 7,
        control_address: "127.0.0.1:1".to_owned(),
        fabric_address: "quic://127.0.0.1:2".to_owned(),
        fingerprint: Some(Fingerprint {
            weights: vec![0; 16],
            numerics: "fp8".to_owned(),
            kv_layout_digest: 1,
            backend: "cpu/avx2".to_owned(),
            arithmetic_revision: 1,
        }),
        wire_major: proto::WIRE_MAJOR,
        wire_minor: proto::WIRE_MINOR,
        kv_blocks_max: 8,
        kv_block_tokens: 64,
        placement_version: 0,
        kv_tier_blocks: 0,
    }
}

/// Counts its reports in `steps_total`.
fn source() -> impl Fn() -> WorkerReport + Send + Sync + 'static {
    let steps = AtomicU64::new(0);
    move || WorkerReport {
        info: Some(info()),
        incarnation: 7,
        steps_total: steps.fetch_add(1, Ordering::Relaxed),
        ..WorkerReport::default()
    }
}

#[tokio::test]
async fn reports_flow_workers_come_back_and_a_broken_stream_is_opened_again() -> Result {
    let authority = Authority::new()?;
    let (address, mut streams) = registry(&authority.identity()?).await?;
    let announcement = announce(vec![address], authority.identity()?, source());

    let mut stream = streams.recv().await.ok_or("no stream")?;
    for expected in 0..2 {
        let report = stream.reports.message().await?.ok_or("no report")?;
        assert_eq!((report.steps_total, report.info), (expected, Some(info())));
    }
    let mut workers = announcement.workers();
    let answer = RouterReport { refused: String::new(), workers: vec![info()] };
    stream.answers.send(Ok(answer)).await?;
    workers.changed().await?;
    assert_eq!(*workers.borrow(), vec![info()]);

    drop(stream);
    let mut again = streams.recv().await.ok_or("no second stream")?;
    assert_eq!(again.reports.message().await?.and_then(|report| report.info), Some(info()));
    Ok(())
}

#[tokio::test]
async fn a_refused_worker_tries_again() -> Result {
    let authority = Authority::new()?;
    let (address, mut streams) = registry(&authority.identity()?).await?;
    let _announcement = announce(vec![address], authority.identity()?, source());

    let stream = streams.recv().await.ok_or("no stream")?;
    let answer = RouterReport { refused: "fingerprint.backend".to_owned(), workers: Vec::new() };
    stream.answers.send(Ok(answer)).await?;
    streams.recv().await.ok_or("no second stream")?;
    Ok(())
}

#[tokio::test]
async fn dropping_the_announcement_ends_the_lease() -> Result {
    let authority = Authority::new()?;
    let (address, mut streams) = registry(&authority.identity()?).await?;
    let announcement = announce(vec![address], authority.identity()?, source());

    let mut stream = streams.recv().await.ok_or("no stream")?;
    stream.reports.message().await?.ok_or("no report")?;
    drop(announcement);
    // Reports in flight may still arrive; then the stream ends, by close or by reset.
    while let Ok(Some(_)) = stream.reports.message().await {}
    Ok(())
}

#[tokio::test]
async fn a_stranger_is_not_served() -> Result {
    let ours = Authority::new()?;
    let theirs = Authority::new()?;
    let (address, _streams) = registry(&ours.identity()?).await?;

    // Trusts our authority, but its own certificate is of another.
    let stranger = Identity { ca_pem: ours.identity()?.ca_pem, ..theirs.identity()? };
    let channel = stranger.endpoint(&address)?.connect_lazy();
    let mut client = proto::v1::registry_client::RegistryClient::new(channel);
    let status = client.announce(tokio_stream::empty()).await.expect_err("served a stranger");
    assert_ne!(status.code(), tonic::Code::Ok);

    // And a worker does not talk to a router of another cluster.
    let refused = theirs.identity()?.endpoint(&address)?.connect().await;
    assert!(refused.is_err());
    Ok(())
}

#[test]
fn worker_info_is_checked_field_by_field() {
    assert_eq!(check_info(&info()), Ok(()));
    type Break = fn(&mut WorkerInfo);
    let cases: [(&str, Break); 7] = [
        ("wire_major", |info| info.wire_major = 2),
        ("worker_id", |info| info.worker_id.clear()),
        ("role", |info| info.role = 9),
        ("control_address", |info| info.control_address.clear()),
        ("fabric_address", |info| info.fabric_address = "x".repeat(1000)),
        ("fingerprint", |info| info.fingerprint = None),
        ("kv_blocks_max and kv_block_tokens", |info| info.kv_blocks_max = 0),
    ];
    for (field, break_it) in cases {
        let mut wrong = info();
        break_it(&mut wrong);
        assert_eq!(check_info(&wrong).map_err(|error| error.field.into_owned()), Err(field.to_owned()));
    }
}

#[test]
fn a_private_key_is_never_printed() -> Result {
    let identity = Authority::new()?.identity()?;
    assert!(!format!("{identity:?}").contains("PRIVATE"));
    Ok(())
}
