use bytes::Bytes;
use model::TokenId;
use proptest::prelude::*;
use proto::ticket::TicketId;

use super::{
    Push, Reply, Run, TEXT_BYTES_MAX, TicketKey, decode_push, decode_reply, encode_push, encode_reply, gather,
};

const KEY: TicketKey = TicketKey { incarnation: u64::MAX, ticket_id: TicketId(3) };

#[test]
fn pushes_round_trip() {
    let run = Run { layer: 1, first_block: 2, blocks: 2, last_rows: 3, checksums: vec![4, u64::MAX] };
    for push in [
        Push::Blocks(run),
        Push::Finish(TokenId(7)),
        Push::Abort("why".to_owned()),
        Push::Resume,
        Push::Renew,
    ] {
        let frame = encode_push(KEY, 9, push.clone(), Bytes::from_static(b"body"));
        assert_eq!(decode_push(&frame.head).expect("our own"), (KEY, 9, push));
        assert_eq!(frame.body, [Bytes::from_static(b"body")]);
    }
}

#[test]
fn replies_round_trip() {
    for reply in [
        Reply::Committed,
        Reply::Stale("old".to_owned()),
        Reply::Refused("wrong".to_owned()),
        Reply::Held { generation: 2, landed: vec![1, u64::MAX] },
    ] {
        let frame = encode_reply(KEY, reply.clone());
        assert_eq!(decode_reply(&frame.head).expect("our own"), (KEY, reply));
        assert!(frame.body.is_empty());
    }
}

#[test]
fn texts_are_cut_at_a_character() {
    let text = "é".repeat(TEXT_BYTES_MAX);
    let frame = encode_reply(KEY, Reply::Stale(text.clone()));
    match decode_reply(&frame.head).expect("our own").1 {
        Reply::Stale(cut) => assert_eq!(cut, text[..TEXT_BYTES_MAX]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_gathered_body_is_its_pieces_with_a_checksum_each() {
    let (body, checksums) = gather(&[b"one", b"", b"three"]);
    assert_eq!(&body[..], b"onethree");
    assert_eq!(checksums, [fabric::checksum(b"one"), fabric::checksum(b""), fabric::checksum(b"three")]);
}

proptest! {
    #[test]
    fn hostile_heads_are_values_or_errors(head in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode_push(&head);
        let _ = decode_reply(&head);
    }
}
