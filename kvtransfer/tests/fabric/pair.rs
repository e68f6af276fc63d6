//! Both ends of a hand-off, and what has landed.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use crossbeam_channel::Select;
use fabric::{Fabric, Hub, Limits, QuicOptions};
use kvtransfer::{
    BlockSink, KvTicket, Rails, Receiver, ReceiverEvent, ReceiverOptions, Reservation, Sender, SenderEvent,
    TicketId, TransferError,
};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

pub const TOKEN: TokenId = TokenId(42);
/// Far more than any of this takes; a test that gets there has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Rows of 656 bytes, as V3's in FP8.
pub fn layout() -> KvLayout {
    KvLayout { format: KvFormat::Fp8, layers: 5, latent: 512, rope: 64, block_tokens: 64 }
}

/// Both ends of a hand-off.
pub struct Pair {
    pub prefill: Fabric,
    /// By rail.
    pub decode: Vec<Fabric>,
    pub sender: Sender,
    pub receiver: Receiver,
    pub pool: Pool,
    pub sent: Vec<SenderEvent>,
    pub received: Vec<ReceiverEvent>,
}

/// What has landed, by ticket, layer and block.
#[derive(Default)]
pub struct Pool(pub BTreeMap<(u64, u32, u32), Vec<u8>>);

impl BlockSink for Pool {
    fn place(&mut self, ticket: TicketId, block: u32, layer: u32, bytes: usize) -> Option<&mut [u8]> {
        let piece = (ticket.0, layer, block);
        assert!(!self.0.contains_key(&piece), "a piece was written twice");
        Some(self.0.entry(piece).or_insert_with(|| vec![0; bytes]))
    }
}

impl Pair {
    pub fn new(prefill: Fabric, decode: Vec<Fabric>) -> Self {
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
        let rails = Rails::new(decode[0].clone(), decode[1..].to_vec());
        Self {
            sender: Sender::new(prefill.clone()),
            receiver: Receiver::new(rails, options),
            prefill,
            decode,
            pool: Pool::default(),
            sent: Vec::new(),
            received: Vec::new(),
        }
    }

    pub fn in_process(limits: Limits) -> Result<Self> {
        let hub = Hub::new();
        let prefill = Fabric::in_process(&hub, "prefill-0", 1, limits.clone())?;
        Ok(Self::new(prefill, vec![Fabric::in_process(&hub, "decode-0", 2, limits)?]))
    }

    pub fn quic(share_memory: bool) -> Result<Self> {
        Self::quic_rails(share_memory, 1)
    }

    /// Over QUIC, with decode's end on several rails.
    pub fn quic_rails(share_memory: bool, rails: usize) -> Result<Self> {
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
        let decode = (0..rails).map(|_| end("decode-0", 2)).collect::<Result<_>>()?;
        Ok(Self::new(end("prefill-0", 1)?, decode))
    }

    /// Polls both ends, then waits until there is a reason to do so again.
    pub fn turn(&mut self) {
        self.poll();
        let mut select = Select::new();
        self.sender.wait_on(&mut select);
        self.receiver.wait_on(&mut select);
        // A failed dial rings no bell.
        let _ = select.ready_timeout(Duration::from_millis(5));
    }

    pub fn poll(&mut self) {
        let now = Instant::now();
        self.received.extend(self.receiver.poll(now, &mut self.pool));
        self.sent.extend(self.sender.poll(now));
    }

    pub fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < PATIENCE, "sent {:?}, received {:?}", self.sent, self.received);
            self.turn();
        }
    }

    /// Offers until it is taken.
    pub fn offer(
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

    /// Whether a ticket's pieces have landed, all of them.
    pub fn check(&mut self, ticket: &KvTicket) {
        let landed: Vec<_> = self.pool.0.extract_if(.., |(of, ..), _| *of == ticket.ticket_id.0).collect();
        assert_eq!(landed.len(), ticket.blocks as usize * layout().layers);
        for ((_, layer, block), bytes) in landed {
            assert!(bytes == piece(ticket, layer, block as usize), "layer {layer}, block {block}");
        }
    }

    /// Hands a prompt over, layer by layer, and checks what arrived.
    pub fn hand_over(&mut self, prompt_tokens: usize) -> Result {
        let ticket = self.receiver.issue(Reservation { first_block: 0, prompt_tokens }, Instant::now())?;
        let (id, blocks) = (self.sender.begin(ticket.clone(), Instant::now())?, ticket.blocks as usize);
        let last_rows = prompt_tokens - (blocks - 1) * layout().block_tokens;
        for layer in 0..ticket.layers {
            let bytes: Vec<_> = (0..blocks).map(|block| piece(&ticket, layer, block)).collect();
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
        self.check(&ticket);
        let _ = self.receiver.revoke(ticket.ticket_id);
        self.sent.clear();
        self.received.clear();
        Ok(())
    }
}

/// What a piece holds: its place.
pub fn piece(ticket: &KvTicket, layer: u32, block: usize) -> Vec<u8> {
    let before = block * layout().block_tokens;
    let rows = (ticket.prompt_tokens as usize - before).min(layout().block_tokens);
    let stamp = (ticket.ticket_id.0 as usize).wrapping_add(layer as usize * 31 + block);
    (0..rows * layout().row_bytes()).map(|at| stamp.wrapping_add(at * at) as u8).collect()
}
