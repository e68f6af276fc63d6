//! The first bytes of a connection: who we are, in both directions at once.
//!
//! Each side opens its two streams without waiting for the other. A stream starts with its channel's tag; the one of
//! [`Channel::Kv`] goes on with a hello: magic, wire version, incarnation, worker and address; then, for a peer that may be
//! of the same host, the host, the door to knock at and this connection's token for it (empty: no memory is shared); last,
//! whether RDMA may be tried.

use quinn::{Connection, ConnectionError, ReadExactError, RecvStream, SendStream, WriteError};

use super::path::IDLE;
use crate::error::{DialError, FabricError};
use crate::event::PeerInfo;
use crate::frame::{Channel, ProtocolError};
use crate::shared::Offer;

/// The version of framing and hello; what the frames mean is versioned by those who make them.
const WIRE_VERSION: u16 = 3;
const MAGIC: [u8; 4] = *b"TRFB";
/// Bytes of a worker's name or address.
const TEXT_BYTES_MAX: usize = 255;
/// Magic, version, incarnation.
const FIXED_BYTES: usize = 4 + 2 + 8;

/// What a side says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub info: PeerInfo,
    /// How a peer of this host attaches to our memory.
    pub local: Option<Offer>,
    /// Whether it would try RDMA where no memory is shared.
    pub rdma: bool,
}

/// The streams of a connection, by [`Channel::index`].
pub(crate) struct Streams {
    pub send: [SendStream; 2],
    pub receive: [RecvStream; 2],
}

impl Hello {
    pub fn new(worker: String, incarnation: u64, address: String) -> Result<Self, FabricError> {
        if worker.is_empty() || worker.len() > TEXT_BYTES_MAX {
            return Err(FabricError::WorkerName { got: worker.len(), max: TEXT_BYTES_MAX });
        }
        Ok(Self { info: PeerInfo { worker, incarnation, address }, local: None, rdma: false })
    }

    fn encode(&self) -> Vec<u8> {
        let mut wire = Vec::with_capacity(512);
        wire.extend_from_slice(&MAGIC);
        wire.extend_from_slice(&WIRE_VERSION.to_le_bytes());
        wire.extend_from_slice(&self.info.incarnation.to_le_bytes());
        let (host, door, token) = match &self.local {
            Some(Offer { host, door, token }) => (host.as_str(), door.as_str(), *token),
            None => ("", "", [0; 16]),
        };
        for text in [&self.info.worker, &self.info.address, host, door] {
            // At most 255 bytes: `new` checks the name, an address is an IP with a port, a host and its door are short.
            wire.push(text.len() as u8);
            wire.extend_from_slice(text.as_bytes());
        }
        wire.extend_from_slice(&token);
        wire.push(u8::from(self.rdma));
        wire
    }

    async fn read(stream: &mut RecvStream) -> Result<Self, HandshakeError> {
        let mut fixed = [0; FIXED_BYTES];
        stream.read_exact(&mut fixed).await?;
        let [m0, m1, m2, m3, v0, v1, incarnation @ ..] = fixed;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(ProtocolError::HelloMagic.into());
        }
        let theirs = u16::from_le_bytes([v0, v1]);
        if theirs != WIRE_VERSION {
            return Err(ProtocolError::WireVersion { ours: WIRE_VERSION, theirs }.into());
        }
        let worker = read_text(stream, "worker").await?;
        let address = read_text(stream, "address").await?;
        let host = read_any_text(stream, "host").await?;
        let door = read_any_text(stream, "door").await?;
        let mut token = [0; 16];
        stream.read_exact(&mut token).await?;
        let mut rdma = [0];
        stream.read_exact(&mut rdma).await?;
        let local = (!host.is_empty() && !door.is_empty()).then_some(Offer { host, door, token });
        let info = PeerInfo { worker, incarnation: u64::from_le_bytes(incarnation), address };
        Ok(Self { info, local, rdma: rdma[0] != 0 })
    }
}

/// Exchanges hellos and opens all streams. The same on both sides.
pub(crate) async fn exchange(
    connection: &Connection,
    ours: &Hello,
) -> Result<(Hello, Streams), HandshakeError> {
    let (send, (theirs, receive)) = tokio::try_join!(open(connection, ours), accept(connection))?;
    Ok((theirs, Streams { send, receive }))
}

async fn open(connection: &Connection, ours: &Hello) -> Result<[SendStream; 2], HandshakeError> {
    let mut kv = connection.open_uni().await?;
    kv.write_all(&[Channel::Kv.index() as u8]).await?;
    kv.write_all(&ours.encode()).await?;
    let mut experts = connection.open_uni().await?;
    experts.write_all(&[Channel::Experts.index() as u8]).await?;
    // Small frames that a decode step waits for go ahead of KV blocks.
    experts.set_priority(1).map_err(|_| ProtocolError::StreamEnded)?;
    Ok([kv, experts])
}

async fn accept(connection: &Connection) -> Result<(Hello, [RecvStream; 2]), HandshakeError> {
    let mut streams = [None, None];
    for _ in Channel::ALL {
        let mut stream = connection.accept_uni().await?;
        let mut tag = [0];
        stream.read_exact(&mut tag).await?;
        match streams.get_mut(usize::from(tag[0])) {
            Some(slot @ None) => *slot = Some(stream),
            _ => return Err(ProtocolError::Channel { tag: tag[0] }.into()),
        }
    }
    let [Some(mut kv), Some(experts)] = streams else { return Err(ProtocolError::StreamEnded.into()) };
    let hello = Hello::read(&mut kv).await?;
    Ok((hello, [kv, experts]))
}

async fn read_text(stream: &mut RecvStream, field: &'static str) -> Result<String, HandshakeError> {
    let text = read_any_text(stream, field).await?;
    if text.is_empty() { Err(ProtocolError::HelloText { field }.into()) } else { Ok(text) }
}

async fn read_any_text(stream: &mut RecvStream, field: &'static str) -> Result<String, HandshakeError> {
    let mut length = [0];
    stream.read_exact(&mut length).await?;
    let mut text = vec![0; usize::from(length[0])];
    stream.read_exact(&mut text).await?;
    String::from_utf8(text).map_err(|_| ProtocolError::HelloText { field }.into())
}

/// The connection ended, or the peer said something else than a hello.
#[derive(Debug)]
pub(crate) enum HandshakeError {
    Connection(ConnectionError),
    Protocol(ProtocolError),
}

impl From<HandshakeError> for DialError {
    fn from(error: HandshakeError) -> Self {
        match error {
            HandshakeError::Connection(ConnectionError::TimedOut) => DialError::TimedOut(IDLE),
            HandshakeError::Connection(error) => DialError::Handshake { detail: error.to_string() },
            HandshakeError::Protocol(error) => DialError::Protocol(error),
        }
    }
}

impl From<ProtocolError> for HandshakeError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

impl From<ConnectionError> for HandshakeError {
    fn from(error: ConnectionError) -> Self {
        Self::Connection(error)
    }
}

impl From<ReadExactError> for HandshakeError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => Self::Connection(error),
            _ => Self::Protocol(ProtocolError::StreamEnded),
        }
    }
}

impl From<WriteError> for HandshakeError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::Connection(error),
            _ => Self::Protocol(ProtocolError::StreamEnded),
        }
    }
}
