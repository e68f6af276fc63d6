use std::sync::Arc;
use std::time::Instant;

use model::TokenId;
use proto::security::Identity;
use proto::v1;
use rcgen::{CertificateParams, KeyPair};

use super::{Refusal, Registry};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::placement::{Need, Prefixes};

fn registry(workers_max: usize) -> Registry {
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(vec!["trireme".to_owned()]).expect("name");
    let pem = params.self_signed(&key).expect("certificate").pem();
    let identity = Identity { ca_pem: pem.clone(), cert_pem: pem, key_pem: key.serialize_pem() };
    Registry::new(&Config { workers_max, ..Config::default() }, identity, Arc::new(Metrics::new()))
}

fn report(id: &str, role: v1::Role, incarnation: u64) -> v1::WorkerReport {
    let fingerprint = v1::Fingerprint {
        weights: vec![1; 16],
        numerics: "fp8".to_owned(),
        kv_layout_digest: 1,
        backend: "cpu/test".to_owned(),
        arithmetic_revision: 1,
    };
    let info = v1::WorkerInfo {
        worker_id: id.to_owned(),
        role: role.into(),
        incarnation,
        control_address: "127.0.0.1:9".to_owned(),
        fabric_address: "inproc://x".to_owned(),
        fingerprint: Some(fingerprint),
        wire_major: proto::WIRE_MAJOR,
        wire_minor: 0,
        kv_blocks_max: 10,
        kv_block_tokens: 64,
        placement_version: 0,
        kv_tier_blocks: 0,
    };
    v1::WorkerReport { info: Some(info), incarnation, kv_blocks_free: 10, ..Default::default() }
}

#[tokio::test]
async fn one_incarnation_at_a_time_and_never_back() {
    let registry = registry(8);
    let now = Instant::now();
    let (old, connection) = registry.admit(report("d", v1::Role::Decode, 1), now).expect("admitted");
    let (new, _) = registry.admit(report("d", v1::Role::Decode, 2), now).expect("replaces");
    old.gone().await;
    assert!(matches!(registry.admit(report("d", v1::Role::Decode, 1), now), Err(Refusal::Replaced(_))));
    // The end of the old one's stream takes nothing from the new one.
    registry.release(&old, connection, "silent");
    assert_eq!(registry.workers().len(), 1);
    assert_eq!(registry.workers()[0].key, new.key);
}

#[tokio::test]
async fn a_new_connection_of_the_same_process_keeps_its_sequences() {
    let registry = registry(8);
    let now = Instant::now();
    let (first, old) = registry.admit(report("d", v1::Role::Decode, 1), now).expect("admitted");
    let (second, new) = registry.admit(report("d", v1::Role::Decode, 1), now).expect("connects anew");
    assert!(Arc::ptr_eq(&first, &second));
    registry.release(&first, old, "connection lost");
    assert_eq!(registry.workers().len(), 1);
    registry.release(&second, new, "connection lost");
    first.gone().await;
    assert!(registry.workers().is_empty());
    registry.admit(report("d", v1::Role::Decode, 1), now).expect("it was not replaced: it may come back");
}

#[tokio::test]
async fn the_table_is_bounded() {
    let registry = registry(1);
    let now = Instant::now();
    registry.admit(report("a", v1::Role::Decode, 1), now).expect("admitted");
    assert!(matches!(registry.admit(report("b", v1::Role::Decode, 1), now), Err(Refusal::Full(1))));
    registry.admit(report("a", v1::Role::Decode, 2), now).expect("takes the place of its predecessor");
}

#[tokio::test]
async fn placing_counts_at_once_and_turns_of_a_conversation_stay_together() {
    let registry = registry(8);
    let now = Instant::now();
    registry.admit(report("p", v1::Role::Prefill, 1), now).expect("admitted");
    for id in ["d0", "d1"] {
        registry.admit(report(id, v1::Role::Decode, 1), now).expect("admitted");
    }
    let need = Need { prompt_tokens: 64, lifetime_tokens: 6 * 64, only_prefill: false, excluded: &[] };
    let prompt = |first: u32| (first..first + 64).map(TokenId).collect::<Vec<_>>();
    let place = |tokens: &[TokenId]| registry.place(&need, &mut Prefixes::new(0, tokens)).expect("room");
    let (one, two) = (prompt(0), prompt(1000));
    let first = place(&one);
    let second = place(&two);
    assert_eq!([&*first.decode.worker().key.id, &*second.decode.worker().key.id], ["d0", "d1"]);
    drop((first, second));
    // Both are idle again; each conversation goes back to where it was.
    let decode = |tokens| place(tokens).decode.worker().key.id.to_string();
    assert_eq!([decode(&two), decode(&one)], ["d1", "d0"]);
    // A process that has started anew holds nothing: ties go to the smaller id.
    registry.admit(report("d1", v1::Role::Decode, 2), now).expect("replaces");
    assert_eq!(decode(&two), "d0");
}
