use super::IN_TURN;
use crate::cuda::SOURCES;

/// A kernel that does not wait for the one before it must be started when that one is done.
#[test]
fn who_does_not_wait_is_started_in_turn() {
    let own = |text: &'static str| text.rsplit("\n#line 1 ").next().unwrap_or(text);
    for source in SOURCES {
        // Itself, or what it hands the waiting to.
        let waits =
            ["previous_done();", ", previous_done);"].iter().any(|call| own(source.text).contains(call));
        let in_turn = IN_TURN.iter().any(|name| own(source.text).contains(&format!("{name}(")));
        assert_eq!(waits, !in_turn, "{}.cu", source.name);
    }
}
