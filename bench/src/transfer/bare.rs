//! Our shared memory without the fence: no ticket, no check, no checksum, no commit. It is what the fence is held against,
//! and nothing that serves works like it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use fabric::{Arrivals, Channel, Event, Frame, PeerId, SendError};

use super::ends::{self, Credentials};
use super::peer::{Peer, Questions, Setup, answer};
use super::plan::{Outcome, Plan, cpu_time};
use super::pool::{Pool, destination, message};
use super::{Mode, Shape};

const MODE: Mode = Mode::ShmBare;
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends all messages and times them.
pub(crate) fn run(plan: &Plan, shape: &Shape) -> anyhow::Result<Outcome> {
    let [ours, theirs] = Credentials::pair()?;
    let setup = Setup { mode: MODE, plan: *plan, shape: shape.clone(), credentials: Some(theirs) };
    let (mut peer, address) = Peer::start(&setup)?;
    let fabric = ends::open("prefill-0", MODE, shape, &Some(ours))?;
    let to = fabric.connect(&address, PATIENCE)?;
    let events = fabric.receiver(Channel::Kv);
    ensure!(fabric.stats().peers_shared == 1, "the processes share no memory");

    let source = Pool::filled(plan.block_bytes)?;
    let blocks = source.blocks();
    let pool: Bytes = source.into_bytes();
    let mut outcome =
        Outcome { messages: plan.messages, message_bytes: plan.message_bytes(), ..Outcome::default() };
    let mut under_way = VecDeque::new();
    let (mut start, mut cpu_before) = (Instant::now(), cpu_time());
    for number in 0..plan.total() {
        if number == plan.warm {
            while !under_way.is_empty() {
                outcome.latencies.extend(answers(&events, &mut under_way)?);
            }
            peer.begin()?;
            outcome.latencies.clear();
            (start, cpu_before) = (Instant::now(), cpu_time());
        }
        while under_way.len() >= plan.inflight {
            outcome.latencies.extend(answers(&events, &mut under_way)?);
        }
        under_way.push_back(Instant::now());
        let piece = |block: usize| pool.slice(block * plan.block_bytes..(block + 1) * plan.block_bytes);
        let body = message(number, plan.per_message, blocks).map(piece).collect();
        send(&fabric, to, Frame { head: Bytes::copy_from_slice(&number.to_le_bytes()), body })?;
    }
    while !under_way.is_empty() {
        outcome.latencies.extend(answers(&events, &mut under_way)?);
    }
    outcome.elapsed = start.elapsed();
    outcome.cpu_send = cpu_time() - cpu_before;
    outcome.cpu_recv = peer.stop()?;
    outcome.verified = peer.verify()?;
    ensure!(outcome.verified.1 == 0, "{} blocks are wrong", outcome.verified.1);
    Ok(outcome)
}

/// Waits for an answer: the oldest message's, as messages keep their order.
fn answers(events: &Arrivals, under_way: &mut VecDeque<Instant>) -> anyhow::Result<Option<Duration>> {
    match events.recv_timeout(PATIENCE)? {
        Event::Frame { .. } => Ok(Some(under_way.pop_front().context("an answer to nothing")?.elapsed())),
        Event::PeerUp { .. } => Ok(None),
        Event::PeerLost { reason, .. } => bail!("the receiving process is lost: {reason}"),
    }
}

fn send(fabric: &fabric::Fabric, to: PeerId, mut frame: Frame) -> anyhow::Result<()> {
    loop {
        match fabric.try_send(to, Channel::Kv, frame) {
            Ok(()) => return Ok(()),
            Err(SendError::Full(back)) => frame = back,
            Err(error) => return Err(error.into()),
        }
        std::thread::yield_now();
    }
}

/// Copies every frame to its blocks and answers it.
pub(crate) fn receive(setup: &Setup, questions: Questions) -> anyhow::Result<String> {
    let plan = setup.plan;
    let fabric = ends::open("decode-0", MODE, &setup.shape, &setup.credentials)?;
    let address = fabric.address();
    let events = fabric.receiver(Channel::Kv);
    let mut pool = Pool::empty(plan.block_bytes)?;
    std::thread::Builder::new().name("decode".to_owned()).spawn(move || {
        loop {
            answer(&questions, &pool);
            let Ok(Event::Frame { peer, head, body }) = events.recv_timeout(Duration::from_millis(5)) else {
                continue;
            };
            let number = head.as_ref().try_into().map_or(0, usize::from_le_bytes);
            let blocks = pool.blocks();
            for (at, source) in message(number, plan.per_message, blocks).enumerate() {
                let into = pool.get_mut(destination(source, blocks));
                if let Err(error) = body.copy(at * plan.block_bytes, into) {
                    eprintln!("{error}");
                }
            }
            drop(body);
            if let Err(error) = send(&fabric, peer, Frame { head, body: Vec::new() }) {
                eprintln!("{error}");
            }
        }
    })?;
    Ok(address)
}
