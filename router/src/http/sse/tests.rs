use proptest::prelude::*;
use serde_json::{Value, json};

use super::frame;

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[\r\n:{}\u{2028}d a]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((any::<String>(), inner), 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Reads events as the standard says: lines end at CR, LF or CRLF, an empty line ends an event.
fn read(stream: &str) -> Vec<String> {
    let mut events = Vec::new();
    let mut data = Vec::new();
    for line in stream.replace("\r\n", "\n").replace('\r', "\n").split('\n') {
        if let Some(payload) = line.strip_prefix("data:") {
            data.push(payload.strip_prefix(' ').unwrap_or(payload).to_owned());
        } else if line.is_empty() && !data.is_empty() {
            events.push(std::mem::take(&mut data).join("\n"));
        }
    }
    events
}

proptest! {
    /// Whatever text a payload holds, a reader gets exactly the payloads back.
    #[test]
    fn frames_hold_their_payloads(payloads in prop::collection::vec(any_json(), 0..6)) {
        let stream: Vec<u8> = payloads.iter().flat_map(|payload| frame(payload).to_vec()).collect();
        let stream = String::from_utf8(stream).expect("UTF-8");
        let events: Vec<Value> =
            read(&stream).iter().map(|event| serde_json::from_str(event).expect("JSON")).collect();
        prop_assert_eq!(events, payloads);
    }
}

#[test]
fn a_frame_is_one_data_line() {
    assert_eq!(frame(&json!({ "a": "x\n\ny" })), "data: {\"a\":\"x\\n\\ny\"}\n\n");
}
