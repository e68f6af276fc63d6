use std::time::Duration;

use model::{KvFormat, Numerics, SamplingParams, Stopping};
use proto::control::Consequence;
use proto::ticket::TicketId;
use proto::trace::TraceContext;
use tonic::Status;

use super::*;

const PROMPT_TOKENS: usize = 130;

fn config() -> ModelConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/v3_fp8_aligned/config.json");
    let text = std::fs::read_to_string(path).expect("the fixture lies in the repository");
    ModelConfig::from_json(&text).expect("a configuration")
}

fn layout() -> KvLayout {
    KvLayout::for_model(&config(), KvFormat::Fp8, 0)
}

fn fingerprint() -> ExecutionFingerprint {
    ExecutionFingerprint {
        weights: [7; 16],
        numerics: Numerics::Fp8,
        kv_layout_digest: layout().digest(),
        backend: "cpu-avx2".to_owned(),
        arithmetic_revision: 1,
    }
}

fn request() -> v1::PrefillRequest {
    let sequence = Sequence {
        request_id: "request-1".to_owned(),
        trace: TraceContext::root(),
        prompt: vec![TokenId(5); PROMPT_TOKENS],
        sampling: SamplingParams::greedy(),
        stopping: Stopping {
            max_tokens: 4,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: vec![TokenId(9)],
        },
        choice: 0,
        deadline: Some(Duration::from_secs(3)),
        fingerprint: fingerprint(),
        cache_salt: 0,
        share: proto::share::Share::default(),
    };
    let ticket = KvTicket {
        worker_id: "decode-0".to_owned(),
        incarnation: 1,
        ticket_id: TicketId(2),
        fabric_address: "inproc://decode-0".to_owned(),
        fingerprint: fingerprint(),
        first_block: 0,
        blocks: 3,
        prompt_tokens: PROMPT_TOKENS as u32,
        bytes_per_layer: (PROMPT_TOKENS * layout().row_bytes()) as u64,
        layers: layout().layers as u32,
        lease: Duration::from_secs(2),
        reserve: Duration::from_secs(2),
        generation: 1,
        fabric_rails: Vec::new(),
    };
    v1::PrefillRequest {
        sequence: Some(sequence.to_wire()),
        ticket: Some(ticket.to_wire()),
        prompt_logprobs: None,
    }
}

fn check(change: impl FnOnce(&mut v1::SequenceRequest, &mut v1::KvTicket)) -> Result<Checked, Refusal> {
    let mut request = request();
    let (Some(sequence), Some(ticket)) = (&mut request.sequence, &mut request.ticket) else {
        panic!("both are there");
    };
    change(sequence, ticket);
    Intake::new(&config(), fingerprint(), &layout()).check(request, Instant::now())
}

#[test]
fn a_request_that_fits_passes() {
    let checked = check(|_, _| {}).expect("it fits");
    assert_eq!(&*checked.request_id, "request-1");
    assert_eq!(checked.sequence.prompt.len(), PROMPT_TOKENS);
    assert!(checked.deadline.is_some_and(|deadline| deadline > Instant::now()));
    assert_eq!(checked.suppressed, []);
}

#[test]
fn a_prefix_that_decode_has_needs_no_blocks() {
    check(|_, ticket| {
        (ticket.first_block, ticket.blocks) = (2, 1);
        ticket.bytes_per_layer = (2 * layout().row_bytes()) as u64;
    })
    .expect("two of three blocks are there");
}

#[test]
fn what_would_end_it_is_suppressed_below_min_tokens() {
    let suppressed = |ignore_eos| {
        let checked = check(|sequence, _| {
            let stopping = sequence.stopping.as_mut().expect("set");
            (stopping.min_tokens, stopping.ignore_eos) = (1, ignore_eos);
        });
        checked.expect("it fits").suppressed
    };
    assert_eq!(suppressed(true), [TokenId(9)]);
    assert_eq!(suppressed(false), [vec![TokenId(9)], config().eos_token_ids].concat());
}

#[test]
fn a_refusal_names_the_field() {
    type Change = fn(&mut v1::SequenceRequest, &mut v1::KvTicket);
    let check = |change: Change, expect: &str| {
        let status = Status::from(check(change).expect_err(expect));
        assert_eq!(Consequence::of(&status), Consequence::Rejected, "{expect}: {status:?}");
        assert!(status.message().contains(expect), "{:?} does not name {expect:?}", status.message());
    };
    check(|sequence, _| sequence.fingerprint = None, "fingerprint");
    check(|sequence, _| backend(&mut sequence.fingerprint), "fingerprint.backend");
    check(|_, ticket| ticket.fingerprint = None, "ticket.fingerprint");
    check(|_, ticket| backend(&mut ticket.fingerprint), "ticket.fingerprint.backend");
    check(|sequence, _| sequence.prompt[17] = u32::MAX, "prompt[17]");
    check(|sequence, _| sequence.sampling = None, "sampling");
    check(|_, ticket| ticket.fabric_address.clear(), "ticket.fabric_address");
    check(|_, ticket| ticket.prompt_tokens += 1, "ticket.prompt_tokens");
    check(|_, ticket| ticket.layers += 1, "ticket.layers");
    check(|_, ticket| ticket.blocks -= 1, "ticket.blocks");
    check(|_, ticket| ticket.first_block += 1, "ticket.blocks");
    check(|_, ticket| ticket.bytes_per_layer += 1, "ticket.bytes_per_layer");
}

fn backend(fingerprint: &mut Option<v1::Fingerprint>) {
    if let Some(fingerprint) = fingerprint {
        fingerprint.backend = "cpu-avx512".to_owned();
    }
}

#[test]
fn an_empty_message_is_a_refusal() {
    let intake = Intake::new(&config(), fingerprint(), &layout());
    assert!(intake.check(v1::PrefillRequest::default(), Instant::now()).is_err());
}
