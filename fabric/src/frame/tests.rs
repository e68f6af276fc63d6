use super::*;

#[test]
fn header_round_trips() {
    let frame = Frame { head: Bytes::from_static(b"abc"), body: vec![Bytes::from_static(b"de"); 3] };
    let header = FrameHeader::of(&frame);
    assert_eq!(header, FrameHeader { head_bytes: 3, body_bytes: 6 });
    assert_eq!(FrameHeader::decode(header.encode(), &Limits::default()), Ok(header));
    assert_eq!(header.encode(), [3, 0, 0, 0, 6, 0, 0, 0], "the wire is little endian");
}

#[test]
fn lengths_over_the_limits_are_refused_at_the_boundary() {
    let limits = Limits { head_bytes_max: 10, body_bytes_max: 20, ..Limits::default() };
    let decode = |head_bytes, body_bytes| {
        FrameHeader::decode(FrameHeader { head_bytes, body_bytes }.encode(), &limits)
            .map(|h| h.payload_bytes())
    };
    assert_eq!(decode(10, 20), Ok(30));
    assert_eq!(decode(11, 0), Err(ProtocolError::HeadTooLong { got: 11, max: 10 }));
    assert_eq!(decode(0, 21), Err(ProtocolError::BodyTooLong { got: 21, max: 20 }));
    assert_eq!(decode(u32::MAX, u32::MAX), Err(ProtocolError::HeadTooLong { got: u32::MAX, max: 10 }));
}
