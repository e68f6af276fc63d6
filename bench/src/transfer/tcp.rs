//! The baseline over a network: one TCP connection under tokio, gathered writes, reads straight into the places, an answer
//! of eight bytes for each message. Nothing is encrypted, nothing is checked.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::time::Instant;

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use super::peer::{Peer, Questions, Setup, answer};
use super::plan::{Outcome, Plan, cpu_time};
use super::pool::{Pool, destination, message};
use super::{Mode, Shape};

/// As many pieces as one system call takes.
const PIECES_MAX: usize = 1024;

/// Sends all messages and times them.
pub(crate) fn run(plan: &Plan, shape: &Shape) -> anyhow::Result<Outcome> {
    let setup = Setup { mode: Mode::Tcp, plan: *plan, shape: shape.clone(), credentials: None };
    let (mut peer, address) = Peer::start(&setup)?;
    let source = Pool::filled(plan.block_bytes)?;
    let mut outcome =
        Outcome { messages: plan.messages, message_bytes: plan.message_bytes(), ..Outcome::default() };
    runtime()?.block_on(async {
        let stream = TcpStream::connect(&address).await?;
        stream.set_nodelay(true)?;
        let (mut read, mut write) = stream.into_split();
        // The warm-up, then what is timed.
        exchange(plan, 0..plan.warm, &source, &mut read, &mut write).await?;
        peer.begin()?;
        let (start, cpu_before) = (Instant::now(), cpu_time());
        outcome.latencies = exchange(plan, plan.warm..plan.total(), &source, &mut read, &mut write).await?;
        outcome.elapsed = start.elapsed();
        outcome.cpu_send = cpu_time() - cpu_before;
        anyhow::Ok(())
    })?;
    outcome.cpu_recv = peer.stop()?;
    outcome.verified = peer.verify()?;
    ensure!(outcome.verified.1 == 0, "{} blocks are wrong", outcome.verified.1);
    Ok(outcome)
}

async fn exchange(
    plan: &Plan,
    numbers: std::ops::Range<usize>,
    source: &Pool,
    read: &mut OwnedReadHalf,
    write: &mut OwnedWriteHalf,
) -> anyhow::Result<Vec<std::time::Duration>> {
    let room = Semaphore::new(plan.inflight);
    let begun = std::sync::Mutex::new(VecDeque::new());
    let locked = || begun.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let count = numbers.len();
    let sending = async {
        for number in numbers {
            room.acquire().await?.forget();
            locked().push_back(Instant::now());
            let header = (number as u64).to_le_bytes();
            let blocks: Vec<&[u8]> = std::iter::once(header.as_slice())
                .chain(message(number, plan.per_message, source.blocks()).map(|block| source.get(block)))
                .collect();
            let mut slices: Vec<IoSlice<'_>> = blocks.into_iter().map(IoSlice::new).collect();
            let mut left = slices.as_mut_slice();
            while !left.is_empty() {
                let some = left.len().min(PIECES_MAX);
                let written = write.write_vectored(&left[..some]).await?;
                ensure!(written > 0, "the connection is closed");
                IoSlice::advance_slices(&mut left, written);
            }
        }
        anyhow::Ok(())
    };
    let answered = async {
        let mut latencies = Vec::with_capacity(count);
        for _ in 0..count {
            read.read_u64_le().await?;
            latencies.push(locked().pop_front().context("an answer to nothing")?.elapsed());
            room.add_permits(1);
        }
        anyhow::Ok(latencies)
    };
    let ((), latencies) = tokio::try_join!(sending, answered)?;
    Ok(latencies)
}

/// Reads every message into its blocks and answers it.
pub(crate) fn receive(setup: &Setup, questions: Questions) -> anyhow::Result<String> {
    let plan = setup.plan;
    let runtime = runtime()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?.to_string();
    let mut pool = Pool::empty(plan.block_bytes)?;
    std::thread::Builder::new().name("decode".to_owned()).spawn(move || {
        let served = runtime.block_on(async {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            take(&plan, &mut pool, stream).await
        });
        // The other end has closed it, or will ask now.
        if let Err(error) = served {
            eprintln!("{error:#}");
        }
        loop {
            answer(&questions, &pool);
            std::thread::park_timeout(std::time::Duration::from_millis(1));
        }
    })?;
    Ok(address)
}

async fn take(plan: &Plan, pool: &mut Pool, mut stream: TcpStream) -> anyhow::Result<()> {
    let blocks = pool.blocks();
    for _ in 0..plan.total() {
        let number = usize::try_from(stream.read_u64_le().await?)?;
        let places: Vec<usize> =
            message(number, plan.per_message, blocks).map(|source| destination(source, blocks)).collect();
        let mut slices = pool.get_many(&places).context("a place twice in one message")?;
        let mut left: Vec<IoSliceMut<'_>> = slices.iter_mut().map(|place| IoSliceMut::new(place)).collect();
        let mut left = left.as_mut_slice();
        while !left.is_empty() {
            stream.readable().await?;
            let some = left.len().min(PIECES_MAX);
            match stream.try_read_vectored(&mut left[..some]) {
                Ok(0) => anyhow::bail!("the connection was closed in a message"),
                Ok(read) => IoSliceMut::advance_slices(&mut left, read),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        stream.write_u64_le(number as u64).await?;
    }
    Ok(())
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_io().build()?)
}
