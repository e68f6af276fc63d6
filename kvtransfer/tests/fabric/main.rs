//! Hand-offs over the real fabric, in process and QUIC: the shells around the state machines.

mod pair;
mod rails;
mod relay;

use std::time::Instant;

use fabric::{Fabric, Hub, Limits};
use kvtransfer::{KvTicket, ReceiverEvent, Reservation, Sender, SenderEvent, TicketId};

use pair::{PATIENCE, Pair, Result, TOKEN, layout};

#[test]
fn prompts_are_handed_over_in_process() -> Result {
    let mut pair = Pair::in_process(Limits::default())?;
    for prompt_tokens in [1, 64, 65, 1000] {
        pair.hand_over(prompt_tokens)?;
    }
    Ok(())
}

#[test]
fn prompts_are_handed_over_by_quic() -> Result {
    let mut pair = Pair::quic(false)?;
    for prompt_tokens in [1, 64, 65, 1000] {
        pair.hand_over(prompt_tokens)?;
    }
    Ok(())
}

#[test]
fn a_receiver_without_room_slows_the_sender_and_loses_nothing() -> Result {
    // A layer of this prompt takes 197 kB: one frame fits, two do not.
    let limits = Limits {
        head_bytes_max: 4 << 10,
        body_bytes_max: 256 << 10,
        receive_bytes_max: 300 << 10,
        ..Limits::default()
    };
    let mut pair = Pair::in_process(limits)?;
    pair.hand_over(300)?;
    assert!(pair.sender.stats().full > 0, "there was always room");
    Ok(())
}

#[test]
fn in_process_a_push_needs_no_second_try() -> Result {
    let mut pair = Pair::in_process(Limits::default())?;
    let reservation = Reservation { first_block: 0, prompt_tokens: 1 };
    let ticket = pair.receiver.issue(reservation, Instant::now())?;
    let id = pair.sender.begin(ticket, Instant::now())?;
    pair.sender.finish(id, TOKEN)?;
    Ok(())
}

#[test]
fn a_revoked_ticket_writes_nothing_and_the_sender_hears_of_it() -> Result {
    for mut pair in [Pair::in_process(Limits::default())?, Pair::quic(false)?, Pair::quic(true)?] {
        let reservation = Reservation { first_block: 0, prompt_tokens: 64 };
        let ticket = pair.receiver.issue(reservation, Instant::now())?;
        let id = pair.sender.begin(ticket.clone(), Instant::now())?;
        let _ = pair.receiver.revoke(ticket.ticket_id);
        let rows = vec![7; layout().layer_stride()];
        pair.offer(|sender| sender.push_blocks(id, 0, 0, &[&rows], 64))?;
        pair.until(|pair| !pair.sent.is_empty());
        assert!(
            matches!(&pair.sent[..], [SenderEvent::Refused { detail, .. }] if detail.contains("revoked"))
        );
        assert!(pair.pool.0.is_empty());
        assert_eq!(pair.received, []);
    }
    Ok(())
}

#[test]
fn a_worker_that_goes_away_ends_the_hand_off_at_the_other() -> Result {
    for decode_dies in [true, false] {
        for mut pair in [Pair::in_process(Limits::default())?, Pair::quic(false)?, Pair::quic(true)?] {
            let reservation = Reservation { first_block: 0, prompt_tokens: 64 };
            let ticket = pair.receiver.issue(reservation, Instant::now())?;
            let id = pair.sender.begin(ticket.clone(), Instant::now())?;
            let rows = vec![7; layout().layer_stride()];
            pair.offer(|sender| sender.push_blocks(id, 0, 0, &[&rows], 64))?;
            pair.until(|pair| !pair.pool.0.is_empty());
            if decode_dies {
                pair.decode[0].close();
                pair.until(|pair| !pair.sent.is_empty());
                assert_eq!(pair.sent, [SenderEvent::Lost { id }]);
            } else {
                pair.prefill.close();
                pair.until(|pair| !pair.received.is_empty());
                assert!(matches!(pair.received[..], [ReceiverEvent::Aborted { .. }]));
            }
        }
    }
    Ok(())
}

#[test]
fn nobody_at_the_tickets_address_is_a_loss_and_not_a_wait() -> Result {
    for mut pair in [Pair::in_process(Limits::default())?, Pair::quic(false)?, Pair::quic(true)?] {
        let reservation = Reservation { first_block: 0, prompt_tokens: 64 };
        let ticket = pair.receiver.issue(reservation, Instant::now())?;
        pair.decode[0].close();
        let id = pair.sender.begin(ticket, Instant::now())?;
        pair.until(|pair| !pair.sent.is_empty());
        assert_eq!(pair.sent, [SenderEvent::Lost { id }]);
    }
    Ok(())
}

#[test]
fn a_forged_and_a_replayed_ticket_are_refused_and_counted() -> Result {
    let hub = Hub::new();
    let end = |worker: &str, incarnation| Fabric::in_process(&hub, worker, incarnation, Limits::default());
    let mut pair = Pair::new(end("prefill-0", 1)?, vec![end("decode-0", 2)?]);
    let mut other = Sender::new(end("prefill-1", 3)?);
    let reservation = Reservation { first_block: 0, prompt_tokens: 64 };
    let ticket = pair.receiver.issue(reservation, Instant::now())?;
    let rows = vec![7; layout().layer_stride()];

    let forged = KvTicket { ticket_id: TicketId(ticket.ticket_id.0 ^ 1), ..ticket.clone() };
    let id = pair.sender.begin(forged, Instant::now())?;
    pair.sender.push_blocks(id, 0, 0, &[&rows], 64)?;
    pair.until(|pair| !pair.sent.is_empty());
    assert!(matches!(&pair.sent[..], [SenderEvent::Refused { detail, .. }] if detail.contains("unknown")));
    assert_eq!((pair.receiver.stats().stale, pair.pool.0.len()), (1, 0));

    // The first worker that uses it is its owner; to another one it is worth nothing, then and afterwards.
    let id = pair.sender.begin(ticket.clone(), Instant::now())?;
    pair.sender.push_blocks(id, 0, 0, &[&rows], 64)?;
    pair.until(|pair| pair.pool.0.len() == 1);
    let replay = |other: &mut Sender, pair: &mut Pair| -> Result<Vec<SenderEvent>> {
        let id = other.begin(ticket.clone(), Instant::now())?;
        other.push_blocks(id, 1, 0, &[&rows], 64)?;
        let started = Instant::now();
        loop {
            pair.poll();
            let events = other.poll(Instant::now());
            if !events.is_empty() {
                return Ok(events);
            }
            assert!(started.elapsed() < PATIENCE, "nobody answers a replay");
        }
    };
    let events = replay(&mut other, &mut pair)?;
    assert!(
        matches!(&events[..], [SenderEvent::Refused { detail, .. }] if detail.contains("another worker"))
    );
    assert_eq!((pair.receiver.stats().violations, pair.pool.0.len()), (1, 1));
    let _ = pair.receiver.revoke(ticket.ticket_id);
    let events = replay(&mut other, &mut pair)?;
    assert!(matches!(&events[..], [SenderEvent::Refused { detail, .. }] if detail.contains("revoked")));
    assert_eq!((pair.receiver.stats().stale, pair.pool.0.len()), (2, 1));
    Ok(())
}
