use tonic::{Code, Status};

use super::Consequence;

#[test]
fn a_consequence_survives_whatever_code_carries_it() {
    for consequence in [Consequence::Rejected, Consequence::Unavailable, Consequence::Lost] {
        assert_eq!(Consequence::of(&consequence.status("why")), consequence);
        for code in (0..17).map(Code::from) {
            let status = consequence.status_with_code(code, "why");
            assert_eq!(Consequence::of(&status), consequence, "{code:?}");
            assert_eq!(status.code(), code);
        }
    }
}

#[test]
fn a_transports_own_status_is_read_by_its_code() {
    let cases = [
        (Code::InvalidArgument, Consequence::Rejected),
        (Code::DeadlineExceeded, Consequence::Rejected),
        (Code::Unimplemented, Consequence::Rejected),
        (Code::Unavailable, Consequence::Unavailable),
        (Code::ResourceExhausted, Consequence::Unavailable),
        (Code::Unknown, Consequence::Lost),
        (Code::Cancelled, Consequence::Lost),
        (Code::Internal, Consequence::Lost),
    ];
    for (code, expected) in cases {
        assert_eq!(Consequence::of(&Status::new(code, "")), expected, "{code:?}");
    }
}

#[test]
fn an_unknown_consequence_from_a_newer_peer_falls_back_to_the_code() {
    let mut status = Status::unavailable("");
    status.metadata_mut().insert(super::METADATA_KEY, "postponed".parse().expect("ascii"));
    assert_eq!(Consequence::of(&status), Consequence::Unavailable);
}
