//! Decode's device thread: a receiver and a pool, and nothing to step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use crossbeam_channel::{Receiver as Channel, Sender as Queue, bounded};
use engine::KvPool;
use fabric::Fabric;
use kvtransfer::{
    BlockSink, KvTicket, Receiver, ReceiverEvent, ReceiverOptions, Reservation, TicketId, TransferReport,
};
use model::{BlockId, KvLayout};

/// The thread goes round this often where nothing arrives.
const IDLE: Duration = Duration::from_millis(20);

/// What decode is asked for.
enum Ask {
    Ticket { prompt_tokens: usize },
    Revoke(TicketId),
}

/// The thread, and what it says.
pub(super) struct Decode {
    asks: Queue<Ask>,
    tickets: Channel<KvTicket>,
    commits: Channel<(Instant, TransferReport)>,
    landed: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<()>>,
}

/// Block i of whatever sequence is here lies in block i of the pool: there is one at a time.
struct Sink<'a>(&'a mut KvPool);

impl BlockSink for Sink<'_> {
    fn place(&mut self, _: TicketId, block: u32, layer: u32, bytes: usize) -> Option<&mut [u8]> {
        self.0.block_layer_mut(BlockId(block), layer as usize, bytes)
    }
}

impl Decode {
    pub(super) fn start(fabric: Fabric, layout: &KvLayout, blocks: usize) -> anyhow::Result<Self> {
        let options = ReceiverOptions {
            worker_id: "decode".to_owned(),
            incarnation: 2,
            fingerprint: super::fingerprint(layout),
            layout: layout.clone(),
            lease: ReceiverOptions::LEASE,
            reserve: ReceiverOptions::LEASE,
            tickets_max: 4,
        };
        let pool = KvPool::new(layout.clone(), blocks)?;
        let receiver = Receiver::new(fabric, options);
        let (asks, asked) = bounded(4);
        let (give, tickets) = bounded(4);
        let (committed, commits) = bounded(4);
        let landed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&landed);
        let thread = std::thread::Builder::new()
            .name("decode-device".to_owned())
            .spawn(move || serve(receiver, pool, &asked, &give, &committed, &counter))?;
        Ok(Self { asks, tickets, commits, landed, thread })
    }

    pub(super) fn ticket(&self, prompt_tokens: usize) -> anyhow::Result<KvTicket> {
        self.asks.send(Ask::Ticket { prompt_tokens })?;
        self.tickets.recv().context("decode has ended")
    }

    /// When the hand-over was committed, and how it went.
    pub(super) fn committed(&self) -> anyhow::Result<(Instant, TransferReport)> {
        self.commits.recv_timeout(Duration::from_secs(60)).context("no commit")
    }

    pub(super) fn revoke(&self, ticket: TicketId) -> anyhow::Result<()> {
        Ok(self.asks.send(Ask::Revoke(ticket))?)
    }

    /// Bytes that have landed in all.
    pub(super) fn landed(&self) -> u64 {
        self.landed.load(Ordering::Relaxed)
    }

    pub(super) fn stop(self) -> anyhow::Result<()> {
        drop(self.asks);
        self.thread.join().map_err(|_| anyhow::anyhow!("decode's thread panicked"))?
    }
}

fn serve(
    mut receiver: Receiver,
    mut pool: KvPool,
    asked: &Channel<Ask>,
    give: &Queue<KvTicket>,
    committed: &Queue<(Instant, TransferReport)>,
    landed: &AtomicU64,
) -> anyhow::Result<()> {
    loop {
        for event in receiver.poll(Instant::now(), &mut Sink(&mut pool)) {
            match event {
                ReceiverEvent::Committed { report, .. } => committed.send((Instant::now(), report))?,
                other => bail!("a hand-over failed: {other:?}"),
            }
        }
        landed.store(receiver.stats().bytes, Ordering::Relaxed);
        let mut select = crossbeam_channel::Select::new();
        receiver.wait_on(&mut select);
        select.recv(asked);
        let _ = select.ready_timeout(IDLE);
        match asked.try_recv() {
            Ok(Ask::Ticket { prompt_tokens }) => {
                let reservation = Reservation { first_block: 0, prompt_tokens };
                give.send(receiver.issue(reservation, Instant::now())?)?;
            }
            Ok(Ask::Revoke(ticket)) => drop(receiver.revoke(ticket)),
            Err(crossbeam_channel::TryRecvError::Empty) => {}
            Err(crossbeam_channel::TryRecvError::Disconnected) => return Ok(()),
        }
    }
}
