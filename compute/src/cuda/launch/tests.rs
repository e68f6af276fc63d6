use super::IN_TURN;
use crate::cuda::SOURCES;

/// A kernel that does not wait for the one before it must be started when that one is done.
#[test]
fn who_does_not_wait_is_started_in_turn() {
    let own = |text: &'static str| text.rsplit("\n#line 1 ").next().unwrap_or(text);
    for source in SOURCES {
        let waits = own(source.text).contains("previous_done();");
        let in_turn = IN_TURN.iter().any(|name| own(source.text).contains(&format!("{name}(")));
        assert_eq!(waits, !in_turn, "{}.cu", source.name);
    }
}
