use proptest::prelude::*;
use proto::v1::{self, decode_event, prefill_event};

use super::{End, Merge};
use crate::session::event::FinishReason;

fn token(id: u32) -> v1::GeneratedToken {
    v1::GeneratedToken { token_id: id, ..Default::default() }
}

fn first(id: u32) -> v1::PrefillEvent {
    let first = v1::FirstToken {
        token: Some(token(id)),
        queue_us: 1,
        compute_us: 2,
        cached_tokens: 3,
        prompt: Vec::new(),
    };
    v1::PrefillEvent { event: Some(prefill_event::Event::FirstToken(first)) }
}

fn done() -> v1::PrefillEvent {
    v1::PrefillEvent { event: Some(prefill_event::Event::Done(v1::PrefillDone { handoff_us: 4 })) }
}

fn decode(event: decode_event::Event) -> v1::DecodeEvent {
    v1::DecodeEvent { event: Some(event) }
}

fn handoff() -> v1::DecodeEvent {
    decode(decode_event::Event::Handoff(v1::HandoffDone { handoff_us: 9 }))
}

fn tokens(ids: &[u32]) -> v1::DecodeEvent {
    let tokens = ids.iter().copied().map(token).collect();
    decode(decode_event::Event::Tokens(v1::DecodedTokens { tokens, ..v1::DecodedTokens::default() }))
}

fn finished(reason: v1::FinishReason) -> v1::DecodeEvent {
    let finished = v1::DecodeFinished { reason: reason.into(), decode_us: 6, ..Default::default() };
    decode(decode_event::Event::Finished(finished))
}

#[test]
fn breaches_of_the_protocol_are_named() {
    let mut merge = Merge::new(2);
    assert!(merge.prefill(v1::PrefillEvent { event: None }).is_err());
    assert!(merge.decode(v1::DecodeEvent { event: None }).is_err());
    assert!(merge.decode(decode(decode_event::Event::Ticket(Default::default()))).is_err());
    assert!(merge.decode(finished(v1::FinishReason::Unspecified)).is_err());
    assert!(merge.decode(finished(v1::FinishReason::Cancelled)).is_err());
    assert!(merge.prefill(first(1)).is_ok());
    assert!(merge.prefill(first(1)).is_err());
    assert!(merge.decode(tokens(&[2])).is_ok());
    assert!(merge.decode(tokens(&[3])).is_err(), "a worker cannot make us collect without end");
}

#[test]
fn prefill_matters_until_the_hand_off_and_the_first_token() {
    let mut merge = Merge::new(9);
    assert!(merge.needs_prefill());
    merge.decode(handoff()).expect("fine");
    assert!(merge.needs_prefill(), "decode has the KV, but nobody has sent the first token");
    merge.prefill(first(1)).expect("fine");
    assert!(!merge.needs_prefill());
}

proptest! {
    /// However the two streams race, the tokens come out in order and the end comes last.
    #[test]
    fn races_do_not_matter(order in prop::collection::vec(any::<bool>(), 16), cuts in prop::collection::vec(1..4_u32, 1..4)) {
        let mut prefill = vec![first(100), done()].into_iter();
        let mut next = 100;
        let mut messages = vec![handoff()];
        for count in cuts {
            messages.push(tokens(&(next + 1..=next + count).collect::<Vec<_>>()));
            next += count;
        }
        messages.push(finished(v1::FinishReason::Length));
        let mut decode = messages.into_iter();

        let mut merge = Merge::new(64);
        let mut out = Vec::new();
        for prefill_first in order.into_iter().chain([true, true]).chain([false; 8]) {
            let ready = match prefill_first {
                true => prefill.next().map(|event| merge.prefill(event)),
                false => decode.next().map(|event| merge.decode(event)),
            };
            out.extend(ready.transpose().map_err(TestCaseError::fail)?.unwrap_or_default().iter().map(|t| t.token_id));
            if merge.end().is_some() {
                prop_assert_eq!(&out, &(100..=next).collect::<Vec<_>>());
            }
        }
        prop_assert_eq!(merge.end(), Some(End { reason: FinishReason::Length, token: None }));
        prop_assert_eq!((merge.cached_tokens(), merge.timings().decode_us), (3, 6));
        prop_assert_eq!(merge.timings().handoff_us, 4, "prefill's own measure wins");
    }
}
