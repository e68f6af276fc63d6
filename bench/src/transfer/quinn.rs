//! The baseline of our QUIC: quinn driven directly with the same datagrams and windows, mutual TLS included. Blocks go out of the
//! pool without being gathered and are copied to their places as chunks arrive; nothing is checked.

mod open;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use futures::future::try_join_all;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use super::ends::Credentials;
use super::peer::{Peer, Questions, Setup, answer};
use super::plan::{Outcome, Plan, cpu_time};
use super::pool::{Pool, destination, message};
use super::{Mode, Shape};

/// Streams that live as long as the connection, each with a share of the messages: what gave quinn the most.
const LANES_MAX: usize = 4;

fn lanes(plan: &Plan) -> usize {
    LANES_MAX.min(plan.inflight)
}

/// Sends all messages and times them.
pub(crate) fn run(plan: &Plan, shape: &Shape) -> anyhow::Result<Outcome> {
    let [ours, theirs] = Credentials::pair()?;
    let setup = Setup { mode: Mode::Quinn, plan: *plan, shape: shape.clone(), credentials: Some(theirs) };
    let (mut peer, address) = Peer::start(&setup)?;
    let source = Pool::filled(plan.block_bytes)?;
    let (blocks, pool) = (source.blocks(), source.into_bytes());
    let mut outcome =
        Outcome { messages: plan.messages, message_bytes: plan.message_bytes(), ..Outcome::default() };
    runtime()?.block_on(async {
        let endpoint = open::endpoint(shape.mtu, &ours)?;
        let connection = endpoint.connect(address.parse()?, open::SERVER_NAME)?.await?;
        let mut streams = Vec::new();
        for _ in 0..lanes(plan) {
            streams.push(connection.open_bi().await?);
        }
        // The warm-up, then what is timed.
        exchange(plan, 0..plan.warm, &pool, blocks, &mut streams).await?;
        peer.begin()?;
        let (start, cpu_before) = (Instant::now(), cpu_time());
        outcome.latencies = exchange(plan, plan.warm..plan.total(), &pool, blocks, &mut streams).await?;
        outcome.elapsed = start.elapsed();
        outcome.cpu_send = cpu_time() - cpu_before;
        let path = connection.stats().path;
        (outcome.lost, outcome.mtu) = (path.lost_packets, path.current_mtu.into());
        outcome.cpu_recv = peer.stop()?;
        connection.close(VarInt::from_u32(0), b"done");
        endpoint.wait_idle().await;
        anyhow::Ok(())
    })?;
    outcome.verified = peer.verify()?;
    anyhow::ensure!(outcome.verified.1 == 0, "{} blocks are wrong", outcome.verified.1);
    Ok(outcome)
}

/// Message after message, in turns over the streams.
async fn exchange(
    plan: &Plan,
    numbers: std::ops::Range<usize>,
    pool: &Bytes,
    blocks: usize,
    streams: &mut [(SendStream, RecvStream)],
) -> anyhow::Result<Vec<Duration>> {
    let lanes = streams.len();
    let mut running = Vec::new();
    for (nth, stream) in streams.iter_mut().enumerate() {
        let numbers = numbers.clone().skip(nth).step_by(lanes).collect();
        running.push(lane(plan, numbers, pool, blocks, stream));
    }
    Ok(try_join_all(running).await?.concat())
}

/// One stream's messages.
async fn lane(
    plan: &Plan,
    numbers: Vec<usize>,
    pool: &Bytes,
    blocks: usize,
    (send, receive): &mut (SendStream, RecvStream),
) -> anyhow::Result<Vec<Duration>> {
    let room = Semaphore::new(plan.inflight.div_ceil(lanes(plan)));
    let begun = RefCell::new(VecDeque::new());
    let sending = async {
        for &number in &numbers {
            room.acquire().await?.forget();
            begun.borrow_mut().push_back(Instant::now());
            let header = Bytes::copy_from_slice(&(number as u64).to_le_bytes());
            let block = |at: usize| pool.slice(at * plan.block_bytes..(at + 1) * plan.block_bytes);
            let blocks = message(number, plan.per_message, blocks).map(block);
            let mut pieces: Vec<Bytes> = std::iter::once(header).chain(blocks).collect();
            send.write_all_chunks(&mut pieces).await?;
        }
        anyhow::Ok(())
    };
    let answered = async {
        let mut latencies = Vec::with_capacity(numbers.len());
        for _ in &numbers {
            receive.read_exact(&mut [0; 8]).await?;
            let begun = begun.borrow_mut().pop_front().context("an answer to nothing")?;
            latencies.push(begun.elapsed());
            room.add_permits(1);
        }
        anyhow::Ok(latencies)
    };
    Ok(tokio::try_join!(sending, answered)?.1)
}

/// Copies every message to its blocks and answers it.
pub(crate) fn receive(setup: &Setup, questions: Questions) -> anyhow::Result<String> {
    let plan = setup.plan;
    let credentials = setup.credentials.as_ref().context("no credentials")?;
    let runtime = runtime()?;
    let endpoint = runtime.block_on(async { open::endpoint(setup.shape.mtu, credentials) })?;
    let address = endpoint.local_addr()?.to_string();
    let pool = RefCell::new(Pool::empty(plan.block_bytes)?);
    std::thread::Builder::new().name("decode".to_owned()).spawn(move || {
        let served = runtime.block_on(async {
            let connection = endpoint.accept().await.context("closed")?.await?;
            serve(&plan, &pool, &connection).await
        });
        if let Err(error) = served {
            eprintln!("{error:#}");
        }
        loop {
            answer(&questions, &pool.borrow());
            std::thread::park_timeout(Duration::from_millis(1));
        }
    })?;
    Ok(address)
}

/// Until the sender closes the connection.
async fn serve(plan: &Plan, pool: &RefCell<Pool>, connection: &Connection) -> anyhow::Result<()> {
    let mut streams = Vec::new();
    for _ in 0..lanes(plan) {
        streams.push(connection.accept_bi().await?);
    }
    let lanes = streams.len();
    let lane = |(nth, (send, receive)): (usize, (SendStream, RecvStream))| {
        let messages = (0..plan.warm).skip(nth).step_by(lanes).count()
            + (plan.warm..plan.total()).skip(nth).step_by(lanes).count();
        take(plan, pool, messages, send, receive)
    };
    try_join_all(streams.into_iter().enumerate().map(lane)).await?;
    connection.closed().await;
    Ok(())
}

async fn take(
    plan: &Plan,
    pool: &RefCell<Pool>,
    messages: usize,
    mut send: SendStream,
    mut receive: RecvStream,
) -> anyhow::Result<()> {
    let blocks = pool.borrow().blocks();
    for _ in 0..messages {
        let mut header = [0; 8];
        receive.read_exact(&mut header).await?;
        let number = usize::try_from(u64::from_le_bytes(header))?;
        let places: Vec<usize> =
            message(number, plan.per_message, blocks).map(|source| destination(source, blocks)).collect();
        let mut at = 0;
        while at < plan.message_bytes() {
            let chunk = receive.read_chunk(plan.message_bytes() - at, true).await?;
            let mut bytes = &chunk.context("the stream ended in a message")?.bytes[..];
            let mut pool = pool.borrow_mut();
            while !bytes.is_empty() {
                let into = &mut pool.get_mut(places[at / plan.block_bytes])[at % plan.block_bytes..];
                let now = into.len().min(bytes.len());
                into[..now].copy_from_slice(&bytes[..now]);
                (at, bytes) = (at + now, &bytes[now..]);
            }
        }
        send.write_all(&header).await?;
    }
    Ok(())
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}
