//! A connection's life on the I/O thread, from its hello to its `PeerLost`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ConnectionError, ReadError, ReadExactError, RecvStream, SendStream, VarInt};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::attachment::{self, Attachment, Ended, Watched};
use super::endpoint::Io;
use super::hello::Streams;
use super::outbox::Queue;
use crate::body::Body;
use crate::event::{LossReason, PeerId};
use crate::frame::{Channel, Frame, FrameHeader, ProtocolError};
use crate::inbox::{Admission, admitted};
use crate::rdma;

/// Frames that one write takes together: many small ones share a packet, and a queue of large ones does not
/// become one long write.
const FRAMES_PER_WRITE: usize = 32;

/// Above, frames are written one by one: the room of each comes back as it leaves.
const JOINED_BYTES_MAX: usize = 64 << 10;

/// Bodies up to this are copied off the network's buffers at once.
const COPIED_BYTES_MAX: usize = 32 << 10;

/// Late enough for MTU discovery to have settled.
const MTU_CHECK_AFTER: Duration = Duration::from_secs(5);

/// Application error codes that close a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseCode {
    Goodbye = 0,
    Protocol = 1,
    Superseded = 2,
    Overloaded = 3,
}

/// Closes with a code and, for the peer's log, a text.
pub(crate) fn close(connection: &Connection, code: CloseCode, text: &str) {
    connection.close(VarInt::from_u32(code as u32), text.as_bytes());
}

/// A connection that finished its handshake.
pub(crate) struct Live {
    pub peer: PeerId,
    pub connection: Connection,
    pub streams: Streams,
    /// What waits to be sent over the network. `None`: the peer shares memory, and nothing does.
    pub queues: Option<[Queue; 2]>,
    pub attachment: Option<Attachment>,
    pub rdma: Option<rdma::Attached>,
    pub superseded: Arc<Notify>,
}

/// Runs a live connection until it ends, and says why it did. No frame of it is delivered after this returns.
pub(crate) async fn run(io: Arc<Io>, live: Live) -> LossReason {
    let Live { peer, connection, streams, queues, attachment, mut rdma, superseded } = live;
    let mut pumps = JoinSet::new();
    for (channel, stream) in Channel::ALL.into_iter().zip(streams.receive) {
        pumps.spawn(receive(Arc::clone(&io), peer, channel, stream));
    }
    let mut idle_streams = Vec::new();
    match queues {
        Some(queues) => {
            for (queue, stream) in queues.into_iter().zip(streams.send) {
                pumps.spawn(send(Arc::clone(&io), queue, stream));
            }
        }
        // Kept open to the end: a stream that ends before its connection is against the protocol.
        None => idle_streams.extend(streams.send),
    }
    let mut watched = attachment.map(|attachment| {
        let (kv, bell, watched) = attachment.split();
        pumps.spawn(attachment::receive(Arc::clone(&io), peer, kv, bell));
        watched
    });
    let mtu_check = tokio::time::sleep(MTU_CHECK_AFTER);
    tokio::pin!(mtu_check);
    let mut mtu_checked = false;

    let reason = loop {
        tokio::select! {
            error = connection.closed() => break loss_reason(error),
            () = superseded.notified() => {
                close(&connection, CloseCode::Superseded, "a newer incarnation is here");
                break LossReason::Superseded;
            }
            ended = ended(&mut watched, &connection) => match ended {
                Ended::Lost(reason) => {
                    close(&connection, CloseCode::Goodbye, "the shared memory is gone");
                    break reason;
                }
                Ended::Broken(error) => break broken(&io, &connection, error),
            },
            ended = one_sided_end(&mut rdma) => match ended {
                rdma::Ended::Failed(error) => {
                    tracing::debug!(peer = %connection.remote_address(), error, "RDMA has failed");
                    break failed(&connection).await;
                }
                rdma::Ended::Broken(error) => break broken(&io, &connection, error),
            },
            Some(ended) = pumps.join_next() => {
                // A pump that ends well ended with the connection, which then says why itself.
                if let Ok(Err(error)) = ended {
                    break broken(&io, &connection, error);
                }
            }
            () = &mut mtu_check, if !mtu_checked => {
                mtu_checked = true;
                check_mtu(&io, &connection);
            }
        }
    };
    pumps.shutdown().await;
    if let Some(rdma) = &rdma {
        rdma.stop().await;
    }
    if let Some(watched) = &watched {
        watched.say_goodbye();
    }
    drop(idle_streams);
    reason
}

/// The end of the attachment, where there is one.
async fn ended(watched: &mut Option<Watched>, connection: &Connection) -> Ended {
    match watched {
        Some(watched) => watched.ended(connection).await,
        None => std::future::pending().await,
    }
}

/// The end of the link over RDMA, where there is one.
async fn one_sided_end(rdma: &mut Option<rdma::Attached>) -> rdma::Ended {
    match rdma {
        Some(rdma) => rdma.ended().await,
        None => std::future::pending().await,
    }
}

/// A link over RDMA fails when its peer ends. A peer that meant it says so on the connection.
async fn failed(connection: &Connection) -> LossReason {
    let reason = match tokio::time::timeout(attachment::REASON_MAX, connection.closed()).await {
        Ok(error) => loss_reason(error),
        Err(_) => LossReason::Died,
    };
    close(connection, CloseCode::Goodbye, "RDMA has failed");
    reason
}

fn broken(io: &Io, connection: &Connection, error: ProtocolError) -> LossReason {
    io.peers.counters.protocol_errors.fetch_add(1, Relaxed);
    close(connection, CloseCode::Protocol, &error.to_string());
    LossReason::Protocol(error)
}

/// Reads a channel's frames into its inbox. Reads nothing while the inbox is full: QUIC's flow control then stops
/// the sender.
async fn receive(
    io: Arc<Io>,
    peer: PeerId,
    channel: Channel,
    mut stream: RecvStream,
) -> Result<(), ProtocolError> {
    let inbox = &io.inboxes[channel.index()];
    loop {
        let mut header = [0; FrameHeader::BYTES];
        match stream.read_exact(&mut header).await {
            Ok(()) => (),
            Err(ReadExactError::ReadError(error)) => return ended_by(error),
            Err(ReadExactError::FinishedEarly(_)) => return Err(ProtocolError::StreamEnded),
        }
        let header = FrameHeader::decode(header, &io.limits)?;
        let Some(admission) = inbox.admit(header.payload_bytes()).await else { return Ok(()) };
        let mut head = vec![0; header.head_bytes as usize];
        match stream.read_exact(&mut head).await {
            Ok(()) => (),
            Err(ReadExactError::ReadError(error)) => return ended_by(error),
            Err(ReadExactError::FinishedEarly(_)) => return Err(ProtocolError::StreamEnded),
        }
        let mut pieces = Vec::new();
        let mut missing = header.body_bytes as usize;
        while missing > 0 {
            match stream.read_chunk(missing, true).await {
                Ok(Some(chunk)) => {
                    missing -= chunk.bytes.len();
                    pieces.push(chunk.bytes);
                }
                Ok(None) => return Err(ProtocolError::StreamEnded),
                Err(error) => return ended_by(error),
            }
        }
        io.peers.counters.received(header.payload_bytes());
        inbox.deliver(peer, head.into(), body(pieces, admission));
    }
}

/// A frame's body out of what came in. A chunk holds on to the datagrams that it came with, up to 64 KiB: a small body
/// is copied, which costs less than that memory; a large one stays in its pieces.
fn body(pieces: Vec<Bytes>, admission: Admission) -> Body {
    let bytes: usize = pieces.iter().map(Bytes::len).sum();
    if bytes <= COPIED_BYTES_MAX {
        admitted(pieces.concat(), admission).into()
    } else {
        Body::pieces(pieces, admission)
    }
}

/// Writes a channel's queued frames, without copying their bodies.
async fn send(io: Arc<Io>, mut queue: Queue, mut stream: SendStream) -> Result<(), ProtocolError> {
    let mut frames = Vec::with_capacity(FRAMES_PER_WRITE);
    let mut pieces: Vec<Bytes> = Vec::with_capacity(4 * FRAMES_PER_WRITE);
    while queue.take(&mut frames, FRAMES_PER_WRITE).await {
        let (mut bytes, mut count, last) = (0, 0, frames.len() - 1);
        for (nth, frame) in frames.drain(..).enumerate() {
            (bytes, count) = (bytes + frame.bytes(), count + 1);
            append(&mut pieces, frame);
            if bytes < JOINED_BYTES_MAX && nth < last {
                continue;
            }
            if stream.write_all_chunks(&mut pieces).await.is_err() {
                // The connection is lost, which `run` learns from itself; or the peer stopped a stream that it must keep.
                return if stream_stopped(&mut stream).await {
                    Err(ProtocolError::StreamEnded)
                } else {
                    Ok(())
                };
            }
            pieces.clear();
            queue.written(bytes);
            io.peers.counters.frames_sent.fetch_add(count, Relaxed);
            io.peers.counters.bytes_sent.fetch_add(bytes as u64, Relaxed);
            (bytes, count) = (0, 0);
        }
    }
    Ok(())
}

/// Header and head travel as one small piece, the body's pieces as they are.
fn append(pieces: &mut Vec<Bytes>, frame: Frame) {
    let mut start = BytesMut::with_capacity(FrameHeader::BYTES + frame.head.len());
    start.extend_from_slice(&FrameHeader::of(&frame).encode());
    start.extend_from_slice(&frame.head);
    pieces.push(start.freeze());
    pieces.extend(frame.body.into_iter().filter(|piece| !piece.is_empty()));
}

/// Whether a failed write is the peer's doing, the connection being alive.
async fn stream_stopped(stream: &mut SendStream) -> bool {
    matches!(stream.stopped().await, Ok(Some(_)))
}

/// A stream's end: with the connection that is none of the pump's business, otherwise against the protocol.
fn ended_by(error: ReadError) -> Result<(), ProtocolError> {
    match error {
        ReadError::ConnectionLost(_) => Ok(()),
        _ => Err(ProtocolError::StreamEnded),
    }
}

pub(super) fn loss_reason(error: ConnectionError) -> LossReason {
    match error {
        ConnectionError::TimedOut => LossReason::Silent,
        ConnectionError::Reset => LossReason::Restarted,
        // Ours: only a closing end closes a connection that `run` still watches.
        ConnectionError::LocallyClosed => LossReason::Closed,
        ConnectionError::ApplicationClosed(closed) => {
            let detail = || String::from_utf8_lossy(&closed.reason).into_owned();
            match closed.error_code.into_inner() {
                code if code == CloseCode::Goodbye as u64 => LossReason::Closed,
                code if code == CloseCode::Superseded as u64 => LossReason::Superseded,
                _ => LossReason::Refused { detail: detail() },
            }
        }
        other => LossReason::Failed { detail: other.to_string() },
    }
}

/// A datagram size below the configured one costs up to four fifths of the throughput: say so.
fn check_mtu(io: &Io, connection: &Connection) {
    let current = connection.stats().path.current_mtu;
    if current < io.path.mtu_bytes {
        tracing::warn!(
            peer = %connection.remote_address(),
            current,
            configured = io.path.mtu_bytes,
            "small datagrams on this path: expect low throughput"
        );
    }
}
