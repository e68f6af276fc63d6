//! Whatever bytes arrive, decoding and converting them ends in a value or an error, never in a panic.

use proptest::prelude::*;
use prost::Message;
use proto::sequence::{Sequence, SequenceLimits};
use proto::ticket::KvTicket;
use proto::{fingerprint, membership, v1};

const LIMITS: SequenceLimits = SequenceLimits { vocab_size: 1000, context_tokens_max: 64 };

/// Runs every conversion on every message type that `bytes` happen to decode as.
fn decode_and_convert(bytes: &[u8]) {
    if let Ok(wire) = v1::SequenceRequest::decode(bytes)
        && let Ok(sequence) = Sequence::from_wire(&wire, LIMITS)
    {
        // What was accepted must survive the way back.
        assert_eq!(Sequence::from_wire(&sequence.to_wire(), LIMITS).as_ref(), Ok(&sequence));
    }
    if let Ok(wire) = v1::KvTicket::decode(bytes)
        && let Ok(ticket) = KvTicket::from_wire(&wire)
    {
        assert!(ticket.end_block() <= ticket.prompt_tokens);
        assert_eq!(KvTicket::from_wire(&ticket.to_wire()).as_ref(), Ok(&ticket));
    }
    if let Ok(wire) = v1::Fingerprint::decode(bytes) {
        let _ = fingerprint::from_wire(&wire);
    }
    if let Ok(wire) = v1::WorkerInfo::decode(bytes) {
        let _ = membership::check_info(&wire);
    }
    let _ = v1::WorkerReport::decode(bytes);
    let _ = v1::PrefillRequest::decode(bytes);
    let _ = v1::PrefillEvent::decode(bytes);
    let _ = v1::DecodeRequest::decode(bytes);
    let _ = v1::DecodeEvent::decode(bytes);
    let _ = v1::GenerateRequest::decode(bytes);
    let _ = v1::KvFrameHead::decode(bytes);
    let _ = v1::KvReplyHead::decode(bytes);
    let _ = v1::DispatchHead::decode(bytes);
    let _ = v1::CombineHead::decode(bytes);
}

prop_compose! {
    fn any_fingerprint()(
        weights in prop::collection::vec(any::<u8>(), 15..18),
        numerics in "fp8|reference|x",
    ) -> v1::Fingerprint {
        v1::Fingerprint { weights, numerics, backend: "cpu".to_owned(), ..v1::Fingerprint::default() }
    }
}

prop_compose! {
    /// Random numbers in a well-formed message get past the decoder and into the bounds checks.
    fn any_sequence()(
        request_id in ".{0,140}",
        traceparent in ".{0,60}",
        prompt in prop::collection::vec(0_u32..1100, 0..80),
        floats in prop::array::uniform6(prop::option::of(any::<f32>())),
        top_k in any::<Option<u32>>(),
        seed in any::<Option<u64>>(),
        logprobs in any::<Option<u32>>(),
        bias in any::<Option<(u32, f32)>>(),
        max_tokens in prop::option::of(0_u32..80),
        min_tokens in 0_u32..80,
        choice in 0_u32..20,
        deadline_ms in any::<u64>(),
        fingerprint in any_fingerprint(),
    ) -> v1::SequenceRequest {
        let [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty] = floats;
        v1::SequenceRequest {
            request_id,
            traceparent,
            prompt,
            choice,
            deadline_ms,
            sampling: Some(v1::Sampling {
                temperature,
                top_p,
                top_k,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias: bias.into_iter().collect(),
                seed,
                logprobs,
            }),
            stopping: Some(v1::Stopping { max_tokens, min_tokens, ..v1::Stopping::default() }),
            fingerprint: Some(fingerprint),
            cache_salt: deadline_ms.rotate_left(7),
            share: None,
        }
    }
}

prop_compose! {
    fn any_ticket()(
        worker_id in ".{0,4}",
        fabric_address in ".{0,4}",
        first_block in any::<u32>(),
        blocks in any::<u32>(),
        small in any::<bool>(),
        prompt_tokens in any::<u32>(),
        bytes_per_layer in any::<u64>(),
        layers in any::<u32>(),
        lease_ms in any::<u32>(),
        reserve_ms in any::<u32>(),
        fabric_rails in prop::collection::vec(".{0,4}", 0..10),
        fingerprint in any_fingerprint(),
    ) -> v1::KvTicket {
        let scale = if small { 1 << 24 } else { 1 };
        v1::KvTicket {
            worker_id,
            incarnation: 1,
            ticket_id: 2,
            fabric_address,
            first_block: first_block / scale,
            blocks: blocks / scale,
            prompt_tokens,
            bytes_per_layer,
            layers,
            lease_ms: lease_ms / scale,
            reserve_ms: reserve_ms / scale,
            generation: 1,
            fabric_rails,
            fingerprint: Some(fingerprint),
        }
    }
}

proptest! {
    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        decode_and_convert(&bytes);
    }

    #[test]
    fn random_sequences(wire in any_sequence()) {
        decode_and_convert(&wire.encode_to_vec());
    }

    #[test]
    fn random_tickets(wire in any_ticket()) {
        decode_and_convert(&wire.encode_to_vec());
    }

    #[test]
    fn damaged_messages(wire in any_sequence(), position in any::<prop::sample::Index>(), flip in 1_u8..) {
        let mut bytes = wire.encode_to_vec();
        prop_assume!(!bytes.is_empty());
        let position = position.index(bytes.len());
        bytes[position] ^= flip;
        decode_and_convert(&bytes);
        decode_and_convert(&bytes[..position]);
    }
}
