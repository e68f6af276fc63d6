//! Hand-offs over the real fabric, in process and QUIC: the shells around the state machines.

use std::error::Error;
use std::time::{Duration, Instant};

use crossbeam_channel::Select;
use fabric::{Fabric, Hub, Limits, QuicOptions};
use kvtransfer::{
    BlockSink, KvTicket, Receiver, ReceiverEvent, ReceiverOptions, Reservation, Sender, SenderEvent,
    TicketId, TransferError,
};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const TOKEN: TokenId = TokenId(42);
/// Far more than any of this takes; a test that gets there has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rows of 656 bytes, as V3's in FP8.
fn layout() -> KvLayout {
    KvLayout { format: KvFormat::Fp8, layers: 5, latent: 512, rope: 64, block_tokens: 64 }
}

/// Both ends of a hand-off.
struct Pair {
    prefill: Fabric,
    decode: Fabric,
    sender: Sender,
    receiver: Receiver,
    pool: Pool,
    sent: Vec<SenderEvent>,
    received: Vec<ReceiverEvent>,
}

/// What has landed, by layer and block.
#[derive(Default)]
struct Pool(std::collections::BTreeMap<(u32, u32), Vec<u8>>);

impl BlockSink for Pool {
    fn place(&mut self, _: TicketId, block: u32, layer: u32, bytes: usize) -> Option<&mut [u8]> {
        assert!(!self.0.contains_key(&(layer, block)), "a piece was written twice");
        Some(self.0.entry((layer, block)).or_insert_with(|| vec![0; bytes]))
    }
}

impl Pair {
    fn new(prefill: Fabric, decode: Fabric) -> Self {
        let fingerprint = ExecutionFingerprint {
            weights: [1; 16],
            numerics: Numerics::Fp8,
            kv_layout_digest: layout().digest(),
            backend: "cpu/portable".to_owned(),
            arithmetic_revision: 1,
        };
        let options = ReceiverOptions {
            worker_id: "decode-0".to_owned(),
            incarnation: 2,
            fingerprint,
            layout: layout(),
            lease: ReceiverOptions::LEASE,
            reserve: ReceiverOptions::LEASE,
            tickets_max: 8,
        };
        Self {
            sender: Sender::new(prefill.clone()),
            receiver: Receiver::new(decode.clone(), options),
            prefill,
            decode,
            pool: Pool::default(),
            sent: Vec::new(),
            received: Vec::new(),
        }
    }

    fn in_process(limits: Limits) -> Result<Self> {
        let hub = Hub::new();
        let prefill = Fabric::in_process(&hub, "prefill-0", 1, limits.clone())?;
        Ok(Self::new(prefill, Fabric::in_process(&hub, "decode-0", 2, limits)?))
    }

    fn quic(share_memory: bool) -> Result<Self> {
        let authority_key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = params.self_signed(&authority_key)?.pem();
        let authority = Issuer::new(params, authority_key);
        let end = |worker: &str, incarnation| -> Result<Fabric> {
            let key = KeyPair::generate()?;
            let certificate =
                CertificateParams::new(vec!["trireme".to_owned()])?.signed_by(&key, &authority)?;
            Ok(Fabric::quic(QuicOptions {
                bind: "127.0.0.1:0".parse()?,
                ca_pem: ca_pem.clone(),
                cert_pem: certificate.pem(),
                key_pem: key.serialize_pem(),
                worker: worker.to_owned(),
                incarnation,
                limits: Limits::default(),
                datagram_bytes: None,
                share_memory,
                rdma: Default::default(),
            })?)
        };
        Ok(Self::new(end("prefill-0", 1)?, end("decode-0", 2)?))
    }

    /// Polls both ends, then waits until there is a reason to do so again.
    fn turn(&mut self) {
        self.poll();
        let mut select = Select::new();
        self.sender.wait_on(&mut select);
        self.receiver.wait_on(&mut select);
        // A failed dial rings no bell.
        let _ = select.ready_timeout(Duration::from_millis(5));
    }

    fn poll(&mut self) {
        let now = Instant::now();
        self.received.extend(self.receiver.poll(now, &mut self.pool));
        self.sent.extend(self.sender.poll(now));
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < PATIENCE, "sent {:?}, received {:?}", self.sent, self.received);
            self.turn();
        }
    }

    /// Offers until it is taken.
    fn offer(
        &mut self,
        mut push: impl FnMut(&mut Sender) -> std::result::Result<(), TransferError>,
    ) -> Result {
        let started = Instant::now();
        loop {
            match push(&mut self.sender) {
                Err(TransferError::Full) if started.elapsed() < PATIENCE => self.turn(),
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Hands a prompt over, layer by layer, and checks what arrived.
    fn hand_over(&mut self, prompt_tokens: usize) -> Result {
        let ticket = self.receiver.issue(Reservation { first_block: 0, prompt_tokens }, Instant::now())?;
        let (id, blocks) = (self.sender.begin(ticket.clone(), Instant::now())?, ticket.blocks as usize);
        let last_rows = prompt_tokens - (blocks - 1) * layout().block_tokens;
        let piece = |layer: u32, block: usize| {
            let rows = if block + 1 == blocks { last_rows } else { layout().block_tokens };
            let stamp = layer as usize * 31 + block;
            (0..rows * layout().row_bytes()).map(|at| (stamp + at * at) as u8).collect::<Vec<u8>>()
        };
        for layer in 0..ticket.layers {
            let bytes: Vec<_> = (0..blocks).map(|block| piece(layer, block)).collect();
            let pieces: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
            self.offer(|sender| sender.push_blocks(id, layer, 0, &pieces, last_rows as u32))?;
        }
        self.offer(|sender| sender.finish(id, TOKEN))?;
        self.until(|pair| !pair.sent.is_empty());
        assert_eq!(self.sent, [SenderEvent::Committed { id }]);
        let expected = ticket.ticket_id;
        assert!(
            matches!(self.received[..], [ReceiverEvent::Committed { ticket, first_token: TOKEN, .. }] if ticket == expected)
        );
        let landed = std::mem::take(&mut self.pool.0);
        assert_eq!(landed.len(), blocks * layout().layers);
        for ((layer, block), bytes) in landed {
            assert!(bytes == piece(layer, block as usize), "layer {layer}, block {block}");
        }
        let _ = self.receiver.revoke(ticket.ticket_id);
        self.sent.clear();
        self.received.clear();
        Ok(())
    }
}

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
                pair.decode.close();
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
        pair.decode.close();
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
    let mut pair = Pair::new(end("prefill-0", 1)?, end("decode-0", 2)?);
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
