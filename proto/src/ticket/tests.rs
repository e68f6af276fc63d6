use std::time::Duration;

use model::{ExecutionFingerprint, Numerics};

use super::{KvTicket, TicketId};
use crate::{fingerprint, v1};

fn ticket() -> KvTicket {
    KvTicket {
        worker_id: "decode-0".to_owned(),
        incarnation: 5,
        ticket_id: TicketId(6),
        fabric_address: "quic://127.0.0.1:4433".to_owned(),
        fingerprint: ExecutionFingerprint {
            weights: [1; 16],
            numerics: Numerics::Reference,
            kv_layout_digest: 2,
            backend: "cpu/portable".to_owned(),
            arithmetic_revision: 3,
        },
        first_block: 1,
        blocks: 2,
        prompt_tokens: 150,
        bytes_per_layer: 56_416,
        layers: 61,
        lease: Duration::from_secs(10),
        reserve: Duration::from_secs(60),
        generation: 1,
        fabric_rails: vec!["quic://127.0.0.1:4434".to_owned()],
    }
}

#[test]
fn round_trips() {
    assert_eq!(KvTicket::from_wire(&ticket().to_wire()), Ok(ticket()));
}

fn refused(field: &str, break_it: impl FnOnce(&mut v1::KvTicket)) {
    let mut wire = ticket().to_wire();
    break_it(&mut wire);
    let error = KvTicket::from_wire(&wire).expect_err(field);
    assert_eq!(error.field, field, "{error}");
}

#[test]
fn errors_name_the_field() {
    refused("worker_id", |wire| wire.worker_id.clear());
    refused("fabric_address", |wire| wire.fabric_address = "x".repeat(257));
    refused("fingerprint", |wire| wire.fingerprint = None);
    refused("prompt_tokens", |wire| wire.prompt_tokens = 0);
    refused("layers", |wire| wire.layers = 0);
    refused("blocks", |wire| wire.blocks = u32::MAX);
    refused("blocks", |wire| wire.first_block = u32::MAX);
    refused("bytes_per_layer", |wire| wire.bytes_per_layer = 0);
    refused("bytes_per_layer", |wire| wire.blocks = 0);
    refused("lease_ms", |wire| wire.lease_ms = 0);
    refused("lease_ms", |wire| wire.lease_ms = 300_001);
    refused("reserve_ms", |wire| wire.reserve_ms = 300_001);
    refused("fabric_rails", |wire| wire.fabric_rails = vec!["quic://a:1".to_owned(); 9]);
    refused("fabric_rails", |wire| wire.fabric_rails = vec![String::new()]);
}

#[test]
fn a_different_fingerprint_is_named_with_both_values() {
    let ours = ticket().fingerprint;
    let theirs = ExecutionFingerprint { backend: "cpu/avx512".to_owned(), ..ours.clone() };
    assert_eq!(fingerprint::require_equal(&ours, Some(&fingerprint::to_wire(&ours))), Ok(()));

    let error = fingerprint::require_equal(&ours, Some(&fingerprint::to_wire(&theirs))).expect_err("differs");
    assert_eq!(error.field, "fingerprint.backend");
    let text = error.to_string();
    assert!(text.contains("cpu/avx512") && text.contains("cpu/portable"), "{text}");

    assert!(fingerprint::require_equal(&ours, None).is_err());
}

#[test]
fn a_ticket_of_minor_0_is_read_as_one_that_cannot_resume() {
    let wire = v1::KvTicket { reserve_ms: 0, generation: 0, fabric_rails: Vec::new(), ..ticket().to_wire() };
    let read = KvTicket::from_wire(&wire).expect("older peers have not sent these fields");
    assert_eq!((read.reserve, read.generation), (read.lease, 0));
}
