//! How a connection comes to use RDMA: what the handshake exchanges after the hellos, where both ends want it and no memory
//! is shared. Both always say as much as the other waits for, so that both come to the same answer.

use std::sync::Arc;
use std::time::Duration;

use quinn::{RecvStream, SendStream};

use super::endpoint::Io;
use super::hello::{HandshakeError, Streams};
use crate::frame::ProtocolError;
use crate::rdma::{self, OFFER_BYTES_MAX, Offer, Prepared};

/// To make an agent and register its memory.
const PREPARATION_MAX: Duration = Duration::from_millis(1200);

/// Attaches to the peer if each end reaches the other's memory.
pub(super) async fn attach(
    io: &Io,
    streams: &mut Streams,
) -> Result<Option<([rdma::Producer; 2], rdma::Attached)>, HandshakeError> {
    let ([send, _], [receive, _]) = (&mut streams.send, &mut streams.receive);
    let prepared = match &io.rdma {
        Some(rdma) => tokio::time::timeout(PREPARATION_MAX, prepare(io, rdma)).await.ok().flatten(),
        None => None,
    };
    let ours =
        prepared.as_ref().map(|(_, offer)| offer.encode()).filter(|ours| ours.len() <= OFFER_BYTES_MAX);
    say(send, &ours.unwrap_or_default()).await?;
    let theirs = hear(receive).await?;
    let granted = theirs.as_ref().map(|offer| (offer.arena_bytes, offer.frames_max));
    let proven = match (&prepared, theirs) {
        (Some((prepared, _)), Some(theirs)) => prepared.prove(theirs).await,
        _ => false,
    };
    send.write_all(&[u8::from(proven)]).await?;
    let mut theirs_proven = [0];
    receive.read_exact(&mut theirs_proven).await?;
    let both = proven && theirs_proven == [1];
    Ok(prepared
        .zip(granted)
        .filter(|_| both)
        .map(|((prepared, _), granted)| prepared.attach(granted, &io.limits)))
}

async fn prepare(io: &Io, rdma: &rdma::Rdma) -> Option<(Prepared, Offer)> {
    let (inboxes, counters) = (Arc::clone(&io.inboxes), Arc::clone(&io.peers.counters));
    rdma.prepare(&io.hello.info.worker, &io.limits, inboxes, counters).await
}

async fn say(stream: &mut SendStream, offer: &[u8]) -> Result<(), HandshakeError> {
    // At most `OFFER_BYTES_MAX`.
    stream.write_all(&(offer.len() as u32).to_le_bytes()).await?;
    Ok(stream.write_all(offer).await?)
}

/// `None`: the peer has none, or one that we cannot read.
async fn hear(stream: &mut RecvStream) -> Result<Option<Offer>, HandshakeError> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).await?;
    let bytes = u32::from_le_bytes(bytes) as usize;
    if bytes > OFFER_BYTES_MAX {
        return Err(ProtocolError::Notice.into());
    }
    let mut offer = vec![0; bytes];
    stream.read_exact(&mut offer).await?;
    Ok(Offer::decode(&offer))
}
