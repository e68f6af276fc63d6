use std::time::Duration;

use model::{ExecutionFingerprint, Numerics, SamplingParams, Stopping, TokenId};

use super::{Sequence, SequenceLimits, sampling_from_wire};
use crate::share::{Priority, Share};
use crate::trace::TraceContext;
use crate::v1;

const LIMITS: SequenceLimits = SequenceLimits { vocab_size: 100, context_tokens_max: 16 };

fn sequence() -> Sequence {
    Sequence {
        request_id: "request-1".to_owned(),
        trace: TraceContext::root(),
        prompt: vec![TokenId(1), TokenId(99), TokenId(0)],
        sampling: SamplingParams {
            logit_bias: vec![(TokenId(3), -1.5), (TokenId(7), 2.0)],
            seed: u64::MAX,
            logprobs: Some(5),
            ..SamplingParams::greedy()
        },
        stopping: Stopping {
            max_tokens: 13,
            min_tokens: 2,
            ignore_eos: true,
            stop_token_ids: vec![TokenId(5)],
        },
        choice: 3,
        deadline: Some(Duration::from_millis(1500)),
        fingerprint: ExecutionFingerprint {
            weights: [7; 16],
            numerics: Numerics::Fp8,
            kv_layout_digest: 11,
            backend: "cpu/avx2".to_owned(),
            arithmetic_revision: 1,
        },
        cache_salt: 1 << 63,
        share: Share { tenant: 5, weight: 2, priority: Priority::Batch },
    }
}

#[test]
fn round_trips() {
    let sequence = sequence();
    assert_eq!(Sequence::from_wire(&sequence.to_wire(), LIMITS), Ok(sequence));
}

#[test]
fn a_deadline_below_a_millisecond_does_not_become_none() {
    let late = Sequence { deadline: Some(Duration::from_micros(3)), ..sequence() };
    assert_eq!(late.to_wire().deadline_ms, 1);
}

/// Breaks one thing in a good message and expects the error to name it.
fn refused(field: &str, break_it: impl FnOnce(&mut v1::SequenceRequest)) {
    let mut wire = sequence().to_wire();
    break_it(&mut wire);
    let error = Sequence::from_wire(&wire, LIMITS).expect_err(field);
    assert_eq!(error.field, field, "{error}");
}

fn sampling(wire: &mut v1::SequenceRequest) -> &mut v1::Sampling {
    wire.sampling.as_mut().expect("set by to_wire")
}

fn stopping(wire: &mut v1::SequenceRequest) -> &mut v1::Stopping {
    wire.stopping.as_mut().expect("set by to_wire")
}

fn fingerprint(wire: &mut v1::SequenceRequest) -> &mut v1::Fingerprint {
    wire.fingerprint.as_mut().expect("set by to_wire")
}

#[test]
fn errors_name_the_field() {
    refused("request_id", |wire| wire.request_id.clear());
    refused("request_id", |wire| wire.request_id = "x".repeat(129));
    refused("prompt", |wire| wire.prompt.clear());
    refused("prompt", |wire| wire.prompt = vec![1; 16]);
    refused("prompt[1]", |wire| wire.prompt[1] = 100);
    refused("sampling", |wire| wire.sampling = None);
    refused("sampling.seed", |wire| sampling(wire).seed = None);
    refused("sampling.top_p", |wire| sampling(wire).top_p = None);
    refused("sampling.top_p", |wire| sampling(wire).top_p = Some(0.0));
    refused("sampling.temperature", |wire| sampling(wire).temperature = Some(f32::NAN));
    refused("sampling.temperature", |wire| sampling(wire).temperature = Some(-0.5));
    refused("sampling.logit_bias", |wire| {
        sampling(wire).logit_bias.insert(100, 1.0);
    });
    refused("sampling.logit_bias", |wire| {
        sampling(wire).logit_bias.insert(3, f32::INFINITY);
    });
    refused("stopping", |wire| wire.stopping = None);
    refused("stopping.max_tokens", |wire| stopping(wire).max_tokens = None);
    refused("stopping.max_tokens", |wire| stopping(wire).max_tokens = Some(14));
    refused("stopping.max_tokens", |wire| stopping(wire).max_tokens = Some(0));
    refused("stopping.min_tokens", |wire| stopping(wire).min_tokens = 14);
    refused("stopping.stop_token_ids", |wire| stopping(wire).stop_token_ids = vec![100]);
    refused("stopping.stop_token_ids", |wire| stopping(wire).stop_token_ids = vec![1; 257]);
    refused("choice", |wire| wire.choice = 16);
    refused("deadline_ms", |wire| wire.deadline_ms = u64::MAX);
    refused("fingerprint", |wire| wire.fingerprint = None);
    refused("fingerprint.weights", |wire| fingerprint(wire).weights.push(0));
    refused("fingerprint.numerics", |wire| fingerprint(wire).numerics = "int4".to_owned());
    refused("fingerprint.backend", |wire| fingerprint(wire).backend.clear());
}

#[test]
fn a_malformed_traceparent_starts_a_new_trace_instead_of_failing_the_request() {
    let mut wire = sequence().to_wire();
    wire.traceparent = "nonsense".to_owned();
    let read = Sequence::from_wire(&wire, LIMITS).expect("valid but for its trace");
    assert_eq!(read.trace.trace_id().len(), 32);
}

#[test]
fn absent_sampling_fields_take_the_routers_defaults() {
    let defaults = SamplingParams { temperature: 0.6, top_p: 0.95, seed: 9, ..SamplingParams::greedy() };
    let wire = v1::Sampling { top_p: Some(0.5), ..v1::Sampling::default() };
    let params = sampling_from_wire(&wire, &defaults).expect("in range");
    assert_eq!((params.temperature, params.top_p, params.seed), (0.6, 0.5, 9));
}
