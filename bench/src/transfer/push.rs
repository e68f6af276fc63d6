//! Our transports under the hand-off as it serves: a message is a ticket of one layer, pushed, checked, committed and
//! answered.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use crossbeam_channel::Select;
use kvtransfer::{
    BlockSink, KvTicket, Receiver, ReceiverEvent, ReceiverOptions, Reservation, Sender, SenderEvent,
    TicketId, TransferError, TransferId,
};
use model::{ExecutionFingerprint, KvFormat, KvLayout, Numerics, TokenId};
use prost::Message as _;

use super::ends::{self, Credentials};
use super::peer::{Peer, Questions, Setup, answer};
use super::plan::{Outcome, Plan, cpu_time};
use super::pool::{Pool, destination, message};
use super::{Mode, Shape};

/// Looks again after this long, whatever has happened: a dial that fails rings no bell.
const TURN_MAX: Duration = Duration::from_millis(5);
/// Without any answer.
const STALLED: Duration = Duration::from_secs(20);

/// One layer, whose piece of a block is what the plan calls a block.
fn layout(block_bytes: usize) -> anyhow::Result<KvLayout> {
    // V3's row in FP8, V3's row without scales and padding as the peers' harness has it, then whatever divides.
    let rows = [(KvFormat::Fp8, 512, 64), (KvFormat::Bf16, 224, 64), (KvFormat::Bf16, 192, 64)];
    rows.into_iter()
        .map(|(format, latent, rope)| KvLayout { format, layers: 1, latent, rope, block_tokens: 1 })
        .find(|layout| block_bytes.is_multiple_of(layout.row_bytes()))
        .map(|layout| KvLayout { block_tokens: block_bytes / layout.row_bytes(), ..layout })
        .context("--block must be a multiple of 512, 576 or 656 bytes")
}

/// Sends all messages and times them.
pub(crate) fn run(mode: Mode, plan: &Plan, shape: &Shape) -> anyhow::Result<Outcome> {
    let source = Pool::filled(plan.block_bytes)?;
    let [ours, theirs] = Credentials::pair()?;
    let setup = Setup { mode, plan: *plan, shape: shape.clone(), credentials: Some(theirs) };
    let (mut peer, ready) = Peer::start(&setup)?;
    let tickets = decode_tickets(&ready)?;
    let fabric = ends::open("prefill-0", mode, shape, &Some(ours))?;
    let mut sender = Sender::new(fabric.clone());
    let block_tokens = u32::try_from(layout(plan.block_bytes)?.block_tokens)?;

    let mut outcome =
        Outcome { messages: plan.messages, message_bytes: plan.message_bytes(), ..Outcome::default() };
    let mut waiting: VecDeque<KvTicket> = tickets.into();
    let mut under_way: HashMap<TransferId, Instant> = HashMap::new();
    let mut unsent: Option<(TransferId, usize)> = None;
    let (mut begun, mut done) = (0, 0);
    let (mut start, mut cpu_before, mut last_answer) = (Instant::now(), cpu_time(), Instant::now());
    while done < plan.total() {
        for event in sender.poll(Instant::now()) {
            let SenderEvent::Committed { id } = event else { bail!("{event:?}") };
            let begun_at = under_way.remove(&id).context("an answer to nothing")?;
            outcome.latencies.push(begun_at.elapsed());
            (done, last_answer) = (done + 1, Instant::now());
        }
        // What is timed starts with nothing on its way.
        if done == plan.warm && begun == plan.warm {
            peer.begin()?;
            outcome.latencies.clear();
            (start, cpu_before) = (Instant::now(), cpu_time());
        }
        let until = if done < plan.warm { plan.warm } else { plan.total() };
        while unsent.is_some() || (begun < until && under_way.len() < plan.inflight) {
            if unsent.is_none() {
                let ticket = waiting.pop_front().context("too few tickets")?;
                let id = sender.begin(ticket, Instant::now())?;
                under_way.insert(id, Instant::now());
                unsent = Some((id, begun));
                begun += 1;
            }
            let Some((id, number)) = unsent else { break };
            let pieces: Vec<&[u8]> =
                message(number, plan.per_message, source.blocks()).map(|block| source.get(block)).collect();
            let pushed = sender.push_blocks(id, 0, 0, &pieces, block_tokens);
            match pushed.and_then(|()| sender.finish(id, TokenId(1))) {
                Ok(()) => unsent = None,
                Err(TransferError::Full) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(last_answer.elapsed() < STALLED, "no answer for {STALLED:?}");
        if done < plan.total() {
            wait(|select| sender.wait_on(select));
        }
    }
    outcome.elapsed = start.elapsed();
    outcome.cpu_send = cpu_time() - cpu_before;
    outcome.cpu_recv = peer.stop()?;
    let stats = fabric.stats();
    (outcome.lost, outcome.mtu) = (stats.packets_lost, stats.mtu_bytes_min);
    let (shared, rdma) = (u64::from(mode == Mode::Shm), u64::from(mode == Mode::Rdma));
    ensure!((stats.peers_shared, stats.peers_rdma) == (shared, rdma), "not over {}: {stats:?}", mode.name());
    outcome.verified = peer.verify()?;
    ensure!(outcome.verified.1 == 0, "{} blocks are wrong", outcome.verified.1);
    Ok(outcome)
}

/// Waits for an event without taking it.
fn wait<'a>(on: impl FnOnce(&mut Select<'a>)) {
    let mut select = Select::new();
    on(&mut select);
    // Early returns are as good: the caller looks again.
    let _ = select.ready_timeout(TURN_MAX);
}

/// Is decode: tickets for all messages at once, then one poll after the other.
pub(crate) fn receive(setup: &Setup, questions: Questions) -> anyhow::Result<String> {
    let plan = setup.plan;
    let layout = layout(plan.block_bytes)?;
    let fabric = ends::open("decode-0", setup.mode, &setup.shape, &setup.credentials)?;
    let prompt_tokens = plan.per_message * layout.block_tokens;
    let options = ReceiverOptions {
        worker_id: "decode-0".to_owned(),
        incarnation: 1,
        fingerprint: ExecutionFingerprint {
            weights: [1; 16],
            numerics: Numerics::Fp8,
            kv_layout_digest: layout.digest(),
            backend: "bench".to_owned(),
            arithmetic_revision: 1,
        },
        layout,
        lease: Duration::from_secs(300),
        reserve: Duration::from_secs(300),
        tickets_max: plan.total(),
    };
    let mut receiver = Receiver::new(fabric, options);
    let reservation = Reservation { first_block: 0, prompt_tokens };
    let tickets: Vec<KvTicket> = (0..plan.total())
        .map(|_| receiver.issue(reservation, Instant::now()))
        .collect::<Result<_, TransferError>>()?;
    let ready = encode_tickets(&tickets)?;
    let numbers = tickets.iter().enumerate().map(|(number, ticket)| (ticket.ticket_id, number)).collect();
    let mut sink = Sink { pool: Pool::empty(plan.block_bytes)?, numbers, plan, of: None };
    std::thread::Builder::new().name("decode".to_owned()).spawn(move || {
        loop {
            for event in receiver.poll(Instant::now(), &mut sink) {
                match event {
                    ReceiverEvent::Committed { ticket, .. } => drop(receiver.revoke(ticket)),
                    other => eprintln!("{other:?}"),
                }
            }
            answer(&questions, &sink.pool);
            wait(|select| receiver.wait_on(select));
        }
    })?;
    Ok(ready)
}

/// Decode's books: which blocks of the pool a ticket is for.
struct Sink {
    pool: Pool,
    numbers: HashMap<TicketId, usize>,
    plan: Plan,
    /// The ticket that was asked for last, and its places.
    of: Option<(TicketId, Vec<usize>)>,
}

impl BlockSink for Sink {
    fn place(&mut self, ticket: TicketId, block: u32, _: u32, _: usize) -> Option<&mut [u8]> {
        if self.of.as_ref().is_none_or(|(of, _)| *of != ticket) {
            let (number, blocks) = (*self.numbers.get(&ticket)?, self.pool.blocks());
            let sources = message(number, self.plan.per_message, blocks);
            self.of = Some((ticket, sources.map(|source| destination(source, blocks)).collect()));
        }
        let (_, places) = self.of.as_ref()?;
        Some(self.pool.get_mut(*places.get(block as usize)?))
    }
}

/// All tickets are alike but for their names: the first one whole, then the names.
fn encode_tickets(tickets: &[KvTicket]) -> anyhow::Result<String> {
    let first = tickets.first().context("no tickets")?.to_wire().encode_to_vec();
    let hex: String = first.iter().map(|byte| format!("{byte:02x}")).collect();
    let names: Vec<u64> = tickets.iter().map(|ticket| ticket.ticket_id.0).collect();
    Ok(serde_json::to_string(&(hex, names))?)
}

fn decode_tickets(text: &str) -> anyhow::Result<Vec<KvTicket>> {
    let (hex, names): (String, Vec<u64>) = serde_json::from_str(text)?;
    let bytes: Vec<u8> = (0..hex.len() / 2)
        .map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2).unwrap_or_default(), 16))
        .collect::<Result<_, _>>()?;
    let first = KvTicket::from_wire(&proto::v1::KvTicket::decode(bytes.as_slice())?)?;
    let of = |name| KvTicket { ticket_id: TicketId(name), ..first.clone() };
    Ok(names.into_iter().map(of).collect())
}
