//! Several rails to one decode worker, one of which fails in the middle of hand-offs and comes back.

use std::time::Instant;

use kvtransfer::{KvTicket, ReceiverEvent, Reservation, SenderEvent, TransferError, TransferId};

use crate::pair::{PATIENCE, Pair, Result, TOKEN, layout, piece};
use crate::relay::Relay;

const PROMPT_TOKENS: usize = 130;

/// A hand-off as its caller sees it.
struct Push {
    id: TransferId,
    ticket: KvTicket,
    /// Layers to offer, and the next of them.
    layers: u32,
    next: u32,
    finished: bool,
    committed: bool,
}

impl Push {
    /// A ticket whose first rail is behind `relay`, and its transfer. One layer is offered at first.
    fn begin(pair: &mut Pair, relay: &Relay) -> Result<Self> {
        let reservation = Reservation { first_block: 0, prompt_tokens: PROMPT_TOKENS };
        let ticket = pair.receiver.issue(reservation, Instant::now())?;
        assert_eq!(ticket.fabric_address, pair.decode[0].address());
        assert_eq!(ticket.fabric_rails, [pair.decode[1].address()]);
        let ticket = KvTicket { fabric_address: relay.address(), ..ticket };
        let id = pair.sender.begin(ticket.clone(), Instant::now())?;
        Ok(Self { id, ticket, layers: 1, next: 0, finished: false, committed: false })
    }

    fn offer(&mut self, pair: &mut Pair) -> std::result::Result<(), TransferError> {
        let blocks = self.ticket.blocks as usize;
        let last_rows = PROMPT_TOKENS - (blocks - 1) * layout().block_tokens;
        while self.next < self.layers {
            let bytes: Vec<_> = (0..blocks).map(|block| piece(&self.ticket, self.next, block)).collect();
            let pieces: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
            pair.sender.push_blocks(self.id, self.next, 0, &pieces, last_rows as u32)?;
            self.next += 1;
        }
        if self.layers == self.ticket.layers && !self.finished {
            pair.sender.finish(self.id, TOKEN)?;
            self.finished = true;
        }
        Ok(())
    }

    fn hear(&mut self, event: &SenderEvent) {
        match event {
            SenderEvent::Committed { id } if *id == self.id => self.committed = true,
            SenderEvent::Resumed { id, .. } if *id == self.id => (self.next, self.finished) = (0, false),
            _ => {}
        }
    }
}

/// Offers what there is, until something holds.
fn until(pair: &mut Pair, pushes: &mut [Push], done: impl Fn(&Pair, &[Push]) -> bool) -> Result {
    let started = Instant::now();
    while !done(pair, pushes) {
        for push in pushes.iter_mut().filter(|push| !push.committed) {
            match push.offer(pair) {
                Ok(()) | Err(TransferError::Full | TransferError::Ended(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        pair.turn();
        for event in std::mem::take(&mut pair.sent) {
            assert!(!matches!(event, SenderEvent::Lost { .. } | SenderEvent::Refused { .. }), "{event:?}");
            pushes.iter_mut().for_each(|push| push.hear(&event));
        }
        assert!(started.elapsed() < PATIENCE, "received {:?}", pair.received);
    }
    Ok(())
}

#[test]
fn a_rail_that_fails_is_taken_over_by_the_other_and_comes_back() -> Result {
    let mut pair = Pair::quic_rails(false, 2)?;
    let relay = Relay::to(&pair.decode[0].address())?;
    let peers = |pair: &Pair| [0, 1].map(|rail| pair.decode[rail].stats().peers);

    // Hand-offs on either rail, in the middle of them: the second one finds both, or the third.
    let (mut pushes, blocks) = (Vec::new(), layout().blocks_for(PROMPT_TOKENS));
    let used = |pair: &Pair, rail: usize| pair.decode[rail].stats().frames_received > 0;
    while !(used(&pair, 0) && used(&pair, 1)) {
        pushes.push(Push::begin(&mut pair, &relay)?);
        let landed = blocks * pushes.len();
        until(&mut pair, &mut pushes, |pair, _| peers(pair) == [1, 1] && pair.pool.0.len() == landed)?;
    }

    relay.set_cut(true);
    pushes.iter_mut().for_each(|push| push.layers = push.ticket.layers);
    until(&mut pair, &mut pushes, |_, pushes| pushes.iter().all(|push| push.committed))?;
    let broken = pair.sender.stats().broken;
    assert_eq!(pair.receiver.stats().resumed, broken);
    assert!((1..pushes.len() as u64).contains(&broken), "{broken} were on the rail that was cut");
    let committed = |event: &ReceiverEvent| matches!(event, ReceiverEvent::Committed { .. });
    assert!(
        pair.received.len() == pushes.len() && pair.received.iter().all(committed),
        "{:?}",
        pair.received
    );
    pushes.iter().for_each(|push| pair.check(&push.ticket));
    pushes.iter().for_each(|push| drop(pair.receiver.revoke(push.ticket.ticket_id)));
    until(&mut pair, &mut [], |pair, _| peers(pair) == [0, 1])?;

    // A third goes over the rail that is left, while the other one is probed; which then takes its share again.
    let mut pushes = vec![Push::begin(&mut pair, &relay)?];
    until(&mut pair, &mut pushes, |pair, _| pair.pool.0.len() == blocks)?;
    relay.set_cut(false);
    until(&mut pair, &mut pushes, |pair, _| peers(pair) == [1, 1])?;
    let before = pair.decode[0].stats().frames_received;
    while pair.decode[0].stats().frames_received == before {
        pushes.push(Push::begin(&mut pair, &relay)?);
        let landed = blocks * pushes.len();
        until(&mut pair, &mut pushes, |pair, _| pair.pool.0.len() == landed)?;
    }
    pushes.iter_mut().for_each(|push| push.layers = push.ticket.layers);
    until(&mut pair, &mut pushes, |_, pushes| pushes.iter().all(|push| push.committed))?;
    pushes.iter().for_each(|push| pair.check(&push.ticket));
    Ok(())
}
