//! The role through its real service: what arrives on decode, and that nothing stays behind whatever happens.
//!
//! That blocks come back is shown without looking inside: the pool holds six, so a prompt of six blocks completes only
//! if none is missing.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::{ExpertBatch, Experts, ExpertsError};
use prefill::Config;
use proto::control::Consequence;
use proto::v1;
use proto::v1::registry_server::{Registry, RegistryServer};
use support::{FlakyExperts, KV_BLOCKS, Scene, engine_with, sequence};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const BLOCK_TOKENS: usize = 64;
const WHOLE_POOL: usize = KV_BLOCKS * BLOCK_TOKENS;

fn chunks_of(step_tokens_max: usize) -> Config {
    Config { step_tokens_max, ..Config::default() }
}

/// A prompt as large as the pool goes through: no block is held by anything else.
async fn assert_pool_is_free(scene: &mut Scene) {
    let whole = sequence(&scene.oracle, 99, WHOLE_POOL);
    scene.complete(&[whole]).await;
}

#[tokio::test]
async fn decode_gets_the_same_bytes_whatever_the_chunks_and_the_company() {
    for step_tokens_max in [7, 64, 100, 256] {
        let mut scene = Scene::new(chunks_of(step_tokens_max)).await;
        let lengths = [1, 63, 64, 65, 200];
        let sequences: Vec<_> =
            (0u64..).zip(lengths).map(|(seed, length)| sequence(&scene.oracle, seed, length)).collect();
        let tokens = scene.complete(&sequences).await;
        for (nth, (sequence, token)) in sequences.iter().zip(tokens).enumerate() {
            let (rows, first) = scene.expected(sequence);
            let case = format!("chunks of {step_tokens_max}, prompt of {}", sequence.prompt.len());
            assert!(scene.decode.rows(nth) == &rows, "{case}: other KV");
            assert_eq!(scene.decode.first_token(nth), first.token, "{case}");
            assert_eq!(token.token_id, first.token.0, "{case}");
            assert_eq!(token.logprob.map(f32::to_bits), Some(first.logprob.to_bits()), "{case}");
            assert_eq!(token.top.len(), 2, "{case}");
        }
        assert_pool_is_free(&mut scene).await;
    }
}

/// What prefill knows it does not compute; what decode has it does not push; what is missing there is pushed, computed
/// now or before.
#[tokio::test]
async fn a_cached_prefix_is_pushed_where_it_is_missing_and_nowhere_else() {
    for (prompt_tokens, step_tokens_max) in [(200, 64), (200, 7), (192, 256), (65, 30)] {
        let mut scene = Scene::new(chunks_of(step_tokens_max)).await;
        let sequence = sequence(&scene.oracle, 3, prompt_tokens);
        let (rows, expected) = scene.expected(&sequence);
        let blocks = prompt_tokens.div_ceil(BLOCK_TOKENS);
        // Cold; decode without anything, with some of it, and with every full block.
        let full = prompt_tokens / BLOCK_TOKENS;
        for (nth, first_block) in [0, 0, 1, full].into_iter().enumerate() {
            let case =
                format!("prompt of {prompt_tokens} in chunks of {step_tokens_max}, decode has {first_block}");
            let first = scene.complete_from(&sequence, first_block).await;
            let cached = if nth == 0 { 0 } else { (prompt_tokens - 1) / BLOCK_TOKENS * BLOCK_TOKENS };
            assert_eq!(first.cached_tokens as usize, cached, "{case}");
            let token = first.token.expect("a token");
            assert_eq!(token.token_id, expected.token.0, "{case}");
            assert_eq!(token.logprob.map(f32::to_bits), Some(expected.logprob.to_bits()), "{case}");
            let wanted = |(&(block, layer), row): (&(u32, u32), &Vec<u8>)| {
                (block as usize >= first_block).then(|| ((block, layer), row.clone()))
            };
            let wanted: support::Rows = rows.iter().filter_map(wanted).collect();
            assert!(first_block < blocks || wanted.is_empty());
            assert!(scene.decode.rows(nth) == &wanted, "{case}: other KV");
        }
        let mut stranger = sequence.clone();
        stranger.cache_salt = 1;
        assert_eq!(scene.complete_from(&stranger, 0).await.cached_tokens, 0, "another tenant's");
        assert_pool_is_free(&mut scene).await;
        let text = scene.handle.metrics_text();
        assert!(text.lines().any(|line| line.starts_with("prefill_kv_evictions_total ")), "{text}");
    }
}

#[tokio::test]
async fn a_dropped_stream_gives_its_blocks_back() {
    let mut scene = Scene::new(chunks_of(16)).await;
    // Each would fill the pool: dropped while it waits, while it is computed, and while it is handed off.
    for seed in 0..6 {
        let sequence = sequence(&scene.oracle, seed, WHOLE_POOL);
        let request = scene.request(&sequence);
        let mut stream = scene.send(request).await.expect("queued");
        if seed % 3 == 2 {
            scene.first_token(&mut stream).await;
        }
    }
    assert_pool_is_free(&mut scene).await;
    assert!(!scene.decode.aborted.is_empty(), "decode is told");
}

/// A cancel of what waits and of what is computed: decode hears the end of both, and nothing of what waited is computed. The time
/// is printed, not asserted; what is computed may be through before the cancel is.
#[tokio::test]
async fn a_cancel_reaches_what_waits_and_what_runs_and_frees_both_ends() {
    let mut scene = Scene::new(chunks_of(16)).await;
    let runs = sequence(&scene.oracle, 1, WHOLE_POOL);
    let request = scene.request(&runs);
    let running = scene.send(request).await.expect("queued");
    let waits = sequence(&scene.oracle, 2, WHOLE_POOL);
    let request = scene.request(&waits);
    let waiting = scene.send(request).await.expect("queued");
    while scene.decode.rows(0).is_empty() {
        scene.decode.turn().await;
    }
    let cancelled = Instant::now();
    drop(waiting);
    drop(running);
    while scene.decode.aborted.len() + scene.decode.committed.len() < 2 {
        scene.decode.turn().await;
    }
    println!("from the dropped streams to decode's end of both: {:?}", cancelled.elapsed());
    assert!(!scene.decode.aborted.is_empty(), "the one that waited");
    assert!(scene.decode.rows(1).is_empty(), "which was not computed");
    assert_pool_is_free(&mut scene).await;
}

#[tokio::test]
async fn a_failed_step_ends_its_requests_and_not_the_worker() {
    let failing = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&failing);
    let engine = engine_with(|experts| Box::new(FlakyExperts { experts, failing: switch }));
    let mut scene = Scene::with_engine(Config::default(), engine).await;
    let sequence = sequence(&scene.oracle, 1, 100);
    let request = scene.request(&sequence);
    let mut stream = scene.send(request).await.expect("queued");
    let status = scene.next(&mut stream).await.expect_err("no experts");
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(Consequence::of(&status), Consequence::Unavailable);
    assert!(status.message().contains("expert-1"), "{}", status.message());
    failing.store(false, Ordering::Relaxed);
    assert_pool_is_free(&mut scene).await;
}

/// Experts whose device has failed.
struct BrokenExperts;

impl Experts for BrokenExperts {
    fn dispatch(&mut self, _: &compute::Cpu, _: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        let detail = "it fell off the bus".to_owned();
        Err(ExpertsError::Device(compute::cuda::CudaError::NoDriver { detail }))
    }

    fn combine(&mut self, _: &compute::Cpu, _: &mut [f32]) -> Result<(), ExpertsError> {
        unreachable!("nothing was dispatched")
    }
}

#[tokio::test]
async fn a_failed_device_ends_the_worker() {
    let mut scene = Scene::with_engine(Config::default(), engine_with(|_| Box::new(BrokenExperts))).await;
    let sequence = sequence(&scene.oracle, 1, 100);
    let request = scene.request(&sequence);
    let mut stream = scene.send(request).await.expect("queued");
    let status = scene.next(&mut stream).await.expect_err("no device");
    // Another worker may answer; this one is gone, so that it is started anew or left out.
    assert_eq!(Consequence::of(&status), Consequence::Unavailable);
    scene.handle.wait().await;
}

#[tokio::test]
async fn a_dead_decode_loses_its_own_requests_alone() {
    let mut scene = Scene::new(chunks_of(16)).await;
    let sequence = sequence(&scene.oracle, 1, WHOLE_POOL);
    let request = scene.request(&sequence);
    let mut stream = scene.send(request).await.expect("queued");
    // Decode is not polled: blocks reach its end of the fabric, and are not looked at.
    stream.message().await.expect("an event").expect("the first token");
    scene.restart_decode(2);
    let status = stream.message().await.expect_err("decode is gone");
    assert_eq!(Consequence::of(&status), Consequence::Lost, "{status:?}");
    assert_pool_is_free(&mut scene).await;
}

#[tokio::test]
async fn a_refused_ticket_is_a_loss() {
    let mut scene = Scene::new(Config::default()).await;
    let sequence = sequence(&scene.oracle, 1, 100);
    let mut request = scene.request(&sequence);
    if let Some(ticket) = &mut request.ticket {
        ticket.ticket_id ^= 1;
    }
    let mut stream = scene.send(request).await.expect("queued");
    let status = loop {
        match scene.next(&mut stream).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(Consequence::of(&status), Consequence::Lost, "{status:?}");
    assert_pool_is_free(&mut scene).await;
}

#[tokio::test]
async fn an_overdue_request_is_told_so() {
    let mut scene = Scene::new(chunks_of(1)).await;
    let mut sequence = sequence(&scene.oracle, 1, WHOLE_POOL);
    // Some hundred steps take longer on any machine.
    sequence.deadline = Some(Duration::from_millis(20));
    let request = scene.request(&sequence);
    let status = match scene.send(request).await {
        Ok(mut stream) => scene.next(&mut stream).await.expect_err("it is overdue"),
        Err(status) => status,
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert_pool_is_free(&mut scene).await;
}

#[tokio::test]
async fn refusals_are_statuses_of_the_call() {
    let mut scene = Scene::new(Config::default()).await;
    let fitting = sequence(&scene.oracle, 1, 100);

    let mut request = scene.request(&fitting);
    if let Some(sequence) = &mut request.sequence
        && let Some(fingerprint) = &mut sequence.fingerprint
    {
        fingerprint.numerics = "reference".to_owned();
    }
    let status = scene.send(request).await.expect_err("another numerics");
    assert_eq!(Consequence::of(&status), Consequence::Rejected);
    assert!(status.message().contains("fingerprint.numerics"), "{}", status.message());

    let mut request = scene.request(&fitting);
    if let Some(ticket) = &mut request.ticket {
        ticket.layers += 1;
    }
    let status = scene.send(request).await.expect_err("another layout");
    assert!(status.message().contains("ticket.layers"), "{}", status.message());

    let too_long = sequence(&scene.oracle, 2, WHOLE_POOL + 1);
    let request = scene.request(&too_long);
    let status = scene.send(request).await.expect_err("more than the pool");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_pool_is_free(&mut scene).await;
}

#[tokio::test]
async fn a_full_queue_refuses_and_recovers() {
    let config = Config { queue_requests_max: 1, active_max: 1, ..chunks_of(16) };
    let mut scene = Scene::new(config).await;
    let mut streams = Vec::new();
    let status = loop {
        let sequence = sequence(&scene.oracle, streams.len() as u64, WHOLE_POOL);
        let request = scene.request(&sequence);
        match scene.send(request).await {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
        assert!(streams.len() < 16, "one active, one waiting, and what was done meanwhile");
    };
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(Consequence::of(&status), Consequence::Unavailable);
    for mut stream in streams {
        scene.first_token(&mut stream).await;
        scene.done(&mut stream).await;
    }
    assert_pool_is_free(&mut scene).await;
}

#[tokio::test]
async fn shutdown_lets_queued_requests_end() {
    let mut scene = Scene::new(chunks_of(64)).await;
    let sequence = sequence(&scene.oracle, 1, 300);
    let request = scene.request(&sequence);
    let mut stream = scene.send(request).await.expect("queued");
    let Scene { handle, mut decode, client: _client, .. } = scene;
    let end = async {
        let first = stream.message().await.expect("a first token");
        let done = stream.message().await.expect("done");
        assert!(first.is_some() && done.is_some());
    };
    let poll = async {
        loop {
            decode.turn().await;
        }
    };
    tokio::select! {
        _ = async { tokio::join!(handle.shutdown(), end) } => {}
        () = poll => {}
    }
}

#[tokio::test]
async fn health_says_serving_and_strangers_are_not_answered() {
    let scene = Scene::new(Config::default()).await;
    let address = scene.handle.control_address().to_string();
    let channel = scene.identity.endpoint(&address).expect("an address").connect().await.expect("connected");
    let mut health = HealthClient::new(channel);
    let watch = health.watch(HealthCheckRequest { service: "trireme.v1.Prefill".to_owned() });
    let mut statuses = watch.await.expect("a stream").into_inner();
    loop {
        let status = statuses.message().await.expect("a status").expect("not the end").status;
        if status == i32::from(ServingStatus::Serving) {
            break;
        }
    }
    let stranger = support::identity();
    let connected = stranger.endpoint(&address).expect("an address").connect().await;
    let answered = match connected {
        Ok(channel) => HealthClient::new(channel).check(HealthCheckRequest::default()).await.is_ok(),
        Err(_) => false,
    };
    assert!(!answered, "another authority's certificate is refused");
}

/// A router that notes what it is told and refuses nobody.
struct Router(tokio::sync::mpsc::Sender<v1::WorkerReport>);

#[tonic::async_trait]
impl Registry for Router {
    type AnnounceStream = tokio_stream::Pending<Result<v1::RouterReport, Status>>;

    async fn announce(
        &self,
        request: Request<Streaming<v1::WorkerReport>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        let mut reports = request.into_inner();
        let told = self.0.clone();
        tokio::spawn(async move {
            while let Ok(Some(report)) = reports.message().await {
                if told.send(report).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(tokio_stream::pending()))
    }
}

#[tokio::test]
async fn routers_are_told_who_this_is_and_what_it_does() {
    let identity = support::identity();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let (told, mut reports) = tokio::sync::mpsc::channel(8);
    let mut router = Server::builder().tls_config(identity.server_tls()).expect("certificates");
    let router = router.add_service(RegistryServer::new(Router(told)));
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    let mut scene = Scene::announced_to(Config::default(), support::engine(), identity, vec![address]).await;

    let report = reports.recv().await.expect("a report");
    let info = report.info.expect("the first report says who");
    assert_eq!((info.worker_id.as_str(), info.role()), ("prefill-0", v1::Role::Prefill));
    assert_eq!(info.control_address, scene.handle.control_address().to_string());
    assert_eq!(info.fabric_address, "inproc://prefill-0");
    assert_eq!((info.kv_blocks_max, info.kv_block_tokens), (KV_BLOCKS as u32, BLOCK_TOKENS as u32));
    assert!(info.fingerprint.is_some());
    assert_eq!((report.steps_total, report.kv_blocks_free), (0, KV_BLOCKS as u32));

    assert_pool_is_free(&mut scene).await;
    while reports.recv().await.expect("a report").steps_total < 2 {}
}
