//! How long a hand-off may wait for what: every duration of both ends, from the one that is promised.
//!
//! A fault is noticed at once or by silence; then another path is looked for, and each answer that does not come is asked for
//! again. No wait grows with what went wrong before, so whatever a fault does, [`BASELINE_MAX`] later the hand-offs that
//! it met have ended at both ends, or go on.

use std::time::Duration;

/// From a fault until both ends are at their baseline.
pub const BASELINE_MAX: Duration = Duration::from_secs(2);

/// Device threads that look between two steps, answers on their way, and the router's word to the other end.
const ROUNDS_MAX: Duration = Duration::from_millis(100);

/// What is left of the promise for a path that was silent: how long both ends wait for another one.
pub const RESUME_MAX: Duration = BASELINE_MAX.saturating_sub(fabric::SILENCE_MAX).saturating_sub(ROUNDS_MAX);

/// Until a dial is given up: as long as a connection may be silent.
pub(crate) const DIAL_MAX: Duration = fabric::SILENCE_MAX;

/// From the ticket to a path: longer than a dial takes, and than a dead process is found, whose successor issued the ticket.
pub(crate) const CONNECTING_MAX: Duration = fabric::SILENCE_MAX.saturating_add(RESUME_MAX);

/// From the first token, or a question, to the answer: longer than most decode steps. Then it is asked again, and always after
/// the same time.
pub(crate) const ANSWER_MAX: Duration = Duration::from_millis(500);

const _: () = {
    let after_silence = fabric::SILENCE_MAX.saturating_add(RESUME_MAX).saturating_add(ROUNDS_MAX);
    assert!(after_silence.as_millis() <= BASELINE_MAX.as_millis(), "a silent path outlasts the promise");
    assert!(RESUME_MAX.as_millis() >= 300, "no time for a dial and its handshake");
    // Of three frames in a row two may be lost, and the transfer still goes on in time.
    let third = ANSWER_MAX.saturating_mul(3).saturating_add(ROUNDS_MAX);
    assert!(third.as_millis() <= BASELINE_MAX.as_millis(), "questions outlast the promise");
    let unconnected = CONNECTING_MAX.saturating_add(ROUNDS_MAX);
    assert!(
        unconnected.as_millis() <= BASELINE_MAX.as_millis(),
        "a transfer without a path outlasts the promise"
    );
};
