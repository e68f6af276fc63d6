//! A connection's attachment to shared memory, where the peer is of this host: made in the handshake, read by the I/O
//! thread (the KV channel) and by the consumer itself (the experts'), ended with the connection.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use quinn::Connection;
use rustix::net::SendFlags;
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::connection::loss_reason;
use super::endpoint::Io;
use super::hello::Hello;
use super::outbox::Outbox;
use crate::arrivals::Ring;
use crate::body::Body;
use crate::event::{LossReason, PeerId};
use crate::frame::{Channel, ProtocolError};
use crate::shared::{self, Attached, Consumer, Door, Expected, Offer, Producer, Side};

/// Said on the socket before it is closed on purpose. Without it the kernel has closed it: the process is gone.
const GOODBYE: &[u8] = b"G";
/// From a goodbye on the socket until the connection, which knows the reason, is closed as well.
pub(super) const REASON_MAX: Duration = Duration::from_millis(500);

/// Opens the door for peers of this host, on the I/O thread's runtime. `None`: frames go over the network.
pub(super) fn open_door() -> Option<(Arc<Door>, String)> {
    let host = shared::host_id()?;
    match Door::open() {
        Ok((door, listener)) => {
            tokio::spawn(Arc::clone(&door).serve(listener));
            Some((door, host))
        }
        Err(error) => {
            tracing::warn!(%error, "no shared memory with peers of this host");
            None
        }
    }
}

/// Our hello for one connection, and who may come to the door for it.
pub(super) fn offer(io: &Io) -> (Hello, Option<Expected>) {
    let mut hello = io.hello.clone();
    hello.rdma = io.rdma.is_some();
    let Some((door, host)) = &io.door else { return (hello, None) };
    let (token, expected) = door.expect();
    hello.local = Some(Offer { host: host.clone(), door: door.name.clone(), token });
    (hello, Some(expected))
}

/// Memory shared with a peer that has no name yet.
pub(super) struct Shared {
    outboxes: [Outbox; 2],
    pub ring: Ring,
    pub attachment: Attachment,
}

/// What a connection's life has to do with its attachment.
pub(super) struct Attachment {
    kv: Consumer,
    bell: AsyncFd<OwnedFd>,
    socket: UnixStream,
    /// The experts' consumer has found that the peer breaks the protocol.
    broken: oneshot::Receiver<ProtocolError>,
}

/// Attaches to the peer if both ends are of this host and want it. Both come to the same answer: the side that
/// dialled knocks, and is attached when the other has let it in.
pub(super) async fn attach(
    io: &Io,
    theirs: Option<Offer>,
    dialled: bool,
    expected: Option<Expected>,
) -> Option<Shared> {
    let ((_, host), theirs) = (io.door.as_ref()?, theirs?);
    if *host != theirs.host {
        return None;
    }
    match try_attach(io, theirs, dialled, expected?).await {
        Ok(shared) => Some(shared),
        Err(error) => {
            tracing::info!(%error, "no shared memory with a peer of this host, which may be in another container");
            None
        }
    }
}

async fn try_attach(io: &Io, theirs: Offer, dialled: bool, expected: Expected) -> io::Result<Shared> {
    let rings = io.rings.as_ref().ok_or(io::ErrorKind::Unsupported)?;
    let bell = shared::new_bell()?;
    let side = Side::new(&io.limits, [bell.try_clone()?, rings.bell().try_clone()?])?;
    let attached = if dialled {
        blocking(move || side.visit(&theirs.door, &theirs.token)).await?
    } else {
        let visitor = expected.arrival().await.ok_or(io::ErrorKind::TimedOut)?;
        blocking(move || side.welcome(visitor)).await?
    };
    let Attached { ours, theirs, their_layout, their_bells, socket } = attached;
    let [kv_bell, experts_bell] = their_bells;
    let producer = |channel, bell| {
        let (ours, theirs) = (Arc::clone(&ours), Arc::clone(&theirs));
        Outbox::Shared(Mutex::new(Producer::new(ours, theirs, channel, bell, &io.limits)))
    };
    let consumer =
        |channel| Consumer::new(Arc::clone(&ours), Arc::clone(&theirs), their_layout, channel, &io.limits);
    let (say_broken, broken) = oneshot::channel();
    Ok(Shared {
        outboxes: [producer(Channel::Kv, kv_bell), producer(Channel::Experts, experts_bell)],
        ring: Ring {
            consumer: consumer(Channel::Experts),
            // Nobody listens when the connection has ended: then there is nothing to end.
            broken: Box::new(move |error| drop(say_broken.send(error))),
        },
        attachment: Attachment {
            kv: consumer(Channel::Kv),
            bell: shared::listen(bell)?,
            socket: UnixStream::from_std(socket)?,
            broken,
        },
    })
}

impl Shared {
    pub fn split(self) -> ([Outbox; 2], Ring, Attachment) {
        (self.outboxes, self.ring, self.attachment)
    }
}

/// The attachment while its connection lives.
pub(super) struct Watched {
    socket: UnixStream,
    broken: oneshot::Receiver<ProtocolError>,
}

/// How an attachment ended.
pub(super) enum Ended {
    /// With its peer, or by its will.
    Lost(LossReason),
    /// By our judgement.
    Broken(ProtocolError),
}

impl Attachment {
    /// Tells a peer that is not let in after all.
    pub fn say_goodbye(&self) {
        say_goodbye(&self.socket);
    }

    /// What reads the KV channel, and what is watched beside it.
    pub fn split(self) -> (Consumer, AsyncFd<OwnedFd>, Watched) {
        (self.kv, self.bell, Watched { socket: self.socket, broken: self.broken })
    }
}

impl Watched {
    /// Waits until the peer is gone or has been found to break the protocol.
    pub async fn ended(&mut self, connection: &Connection) -> Ended {
        let mut word = [0; GOODBYE.len()];
        let goodbye = tokio::select! {
            Ok(error) = &mut self.broken => return Ended::Broken(error),
            read = self.socket.read(&mut word) => matches!(read, Ok(1..)),
        };
        if let Some(reason) = connection.close_reason() {
            return Ended::Lost(loss_reason(reason));
        }
        if !goodbye {
            return Ended::Lost(LossReason::Died);
        }
        let closed = tokio::time::timeout(REASON_MAX, connection.closed()).await;
        Ended::Lost(closed.map_or(LossReason::Closed, loss_reason))
    }

    /// Tells the peer that the end is meant.
    pub fn say_goodbye(&self) {
        say_goodbye(&self.socket);
    }
}

fn say_goodbye(socket: &UnixStream) {
    // Past the reactor, which does not yet know of a fresh socket that it can be written to. A peer that is gone need not
    // hear it, and one that is there has room: nothing else is ever sent here.
    let _ = rustix::net::send(socket, GOODBYE, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Reads the KV channel's frames into its inbox. Reads nothing while the inbox is full: the peer's arena fills up then.
pub(super) async fn receive(
    io: Arc<Io>,
    peer: PeerId,
    mut consumer: Consumer,
    bell: AsyncFd<OwnedFd>,
) -> Result<(), ProtocolError> {
    let inbox = &io.inboxes[Channel::Kv.index()];
    loop {
        while let Some(header) = consumer.peek()? {
            let Some(admission) = inbox.admit(header.payload_bytes()).await else { return Ok(()) };
            let Some((head, body)) = consumer.take()? else { break };
            io.peers.counters.received(head.len() + body.len());
            inbox.deliver(peer, head, Body::shared(body, Some(admission)));
        }
        consumer.set_sleeping(true);
        if !consumer.is_ready() {
            // Fails only with the runtime.
            let Ok(mut rung) = bell.readable().await else { return Ok(()) };
            shared::silence_bell(bell.get_ref());
            rung.clear_ready();
        }
        consumer.set_sleeping(false);
    }
}

async fn blocking(step: impl FnOnce() -> io::Result<Attached> + Send + 'static) -> io::Result<Attached> {
    tokio::task::spawn_blocking(step).await.map_err(io::Error::other)?
}
