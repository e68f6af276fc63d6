//! The worker's control plane, and what it refuses to start with.

mod support;

use compute::Cpu;
use engine::ExpertBank;
use expert::{Config, Error, Node, Placement};
use model::{ExecutionFingerprint, ExpertId, KvFormat, KvLayout, Numerics};
use support::{Network, checkpoint, identity, placement};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// A node of rank `rank` that holds what rank 0 of two should.
fn node(placement: Placement, rank: usize) -> Node {
    let checkpoint = checkpoint("v2_lite");
    let numerics = Numerics::Reference;
    let held = support::placement(&checkpoint, 2).share(0);
    Node {
        worker_id: "expert-0".to_owned(),
        incarnation: 1,
        identity: identity(),
        routers: Vec::new(),
        fabric: Network::in_process().join("expert-0", 1),
        bank: ExpertBank::load(&checkpoint, &held, numerics, &mut |_, _| {}).expect("experts"),
        placement,
        rank,
        cpu: Cpu::new(1),
        fingerprint: ExecutionFingerprint {
            weights: checkpoint.weights_hash(),
            numerics,
            kv_layout_digest: KvLayout::for_model(checkpoint.config(), KvFormat::F32, 0).digest(),
            backend: "cpu".to_owned(),
            arithmetic_revision: 1,
        },
    }
}

#[tokio::test]
async fn health_says_serving_strangers_are_not_answered_and_shutdown_ends_it_all() {
    let node = node(placement(&checkpoint("v2_lite"), 2), 0);
    let identity = node.identity.clone();
    let handle = expert::start(Config::default(), node).await.expect("a worker");
    let address = handle.control_address().to_string();
    let channel = identity.endpoint(&address).expect("an address").connect().await.expect("connected");
    let mut health = HealthClient::new(channel);
    let watch = health.watch(HealthCheckRequest::default()).await.expect("a stream");
    let mut statuses = watch.into_inner();
    loop {
        let status = statuses.message().await.expect("a status").expect("not the end").status;
        if status == i32::from(ServingStatus::Serving) {
            break;
        }
    }
    let stranger = support::identity().endpoint(&address).expect("an address").connect().await;
    let answered = match stranger {
        Ok(channel) => HealthClient::new(channel).check(HealthCheckRequest::default()).await.is_ok(),
        Err(_) => false,
    };
    assert!(!answered, "another authority's certificate is refused");
    // The health stream above is still open: it must not hold the end up for ever.
    handle.shutdown().await;
}

#[tokio::test]
async fn a_bank_that_lacks_an_expert_is_found_at_start() {
    let checkpoint = checkpoint("v2_lite");
    let whole = placement(&checkpoint, 1);
    match expert::start(Config::default(), node(whole.clone(), 0)).await {
        Err(Error::NotLoaded { expert, rank: 0, .. }) => {
            let first_missing = checkpoint.config().n_routed_experts / 2;
            assert_eq!(expert, ExpertId(first_missing as u16));
        }
        other => panic!("{:?}", other.map(|handle| handle.control_address())),
    }
    match expert::start(Config::default(), node(whole, 1)).await {
        Err(Error::Rank { rank: 1, workers: 1 }) => {}
        other => panic!("{:?}", other.map(|handle| handle.control_address())),
    }
}

#[tokio::test]
async fn a_setting_out_of_range_binds_no_port() {
    let config = Config { dispatch_tokens_max: 0, ..Config::default() };
    match expert::start(config, node(placement(&checkpoint("v2_lite"), 2), 0)).await {
        Err(Error::Config(error)) => assert_eq!(error.field, "dispatch_tokens_max"),
        other => panic!("{:?}", other.map(|handle| handle.control_address())),
    }
}
