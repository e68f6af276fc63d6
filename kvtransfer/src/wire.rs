//! Frames of the KV channel: typed on our side, `KvFrameHead` and `KvReplyHead` with raw bodies on the wire.
//!
//! Decoding checks shape alone; what a frame means is for the state machine that it is given to.

use bytes::Bytes;
use fabric::Frame;
use model::TokenId;
use prost::Message;
use proto::ticket::TicketId;
use proto::v1;
use proto::v1::kv_frame_head::Frame as HeadFrame;
use proto::v1::kv_reply_head::Outcome;

/// Names a ticket across restarts of its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketKey {
    /// Process start of the decode worker that issued it.
    pub incarnation: u64,
    /// Its name there.
    pub ticket_id: TicketId,
}

/// Prefill to decode.
#[derive(Debug, Clone, PartialEq)]
pub enum Push {
    /// Blocks of one layer; the frame's body holds them.
    Blocks(Run),
    /// Everything is sent; decode starts from this token.
    Finish(TokenId),
    /// Nothing more will come.
    Abort(String),
    /// What has landed? Raises the generation.
    Resume,
    /// The transfer goes on.
    Renew,
}

/// Consecutive blocks of one layer. Fields as in `fabric.proto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The layer.
    pub layer: u32,
    /// Counted from the sequence's start.
    pub first_block: u32,
    /// At least one.
    pub blocks: u32,
    /// Rows in the last of them.
    pub last_rows: u32,
    /// xxh3-64 of each block's bytes.
    pub checksums: Vec<u64>,
}

/// Decode to prefill. All but [`Reply::Held`] end the transfer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reply {
    /// Every block is in decode's pool and belongs to the sequence.
    Committed,
    /// The ticket is dead, or of another process; why.
    Stale(String),
    /// A frame was not what its ticket permits; why.
    Refused(String),
    /// The resume of this generation holds, and this is what has landed: a bit for each piece.
    Held {
        /// The resume's.
        generation: u32,
        /// In the order layer, block.
        landed: Vec<u64>,
    },
}

/// A head that is no message of this channel.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Not even protobuf.
    #[error("the head does not decode")]
    Decode(#[from] prost::DecodeError),
    /// A field that must be there is not, or has an unknown value.
    #[error("the head has no {0}")]
    Missing(&'static str),
}

/// Longest text in a frame, bytes: it ends in log lines of another process.
const TEXT_BYTES_MAX: usize = 256;

/// Copies `pieces` into the one body that travels, with each piece's checksum.
pub(crate) fn gather(pieces: &[&[u8]]) -> (Bytes, Vec<u64>) {
    (pieces.concat().into(), pieces.iter().map(|piece| fabric::checksum(piece)).collect())
}

/// A frame for decode. `body` is empty but for [`Push::Blocks`].
pub fn encode_push(key: TicketKey, generation: u32, push: Push, body: Bytes) -> Frame {
    let body = if body.is_empty() { Vec::new() } else { vec![body] };
    Frame { head: encode_push_head(key, generation, push), body }
}

/// The head of a frame for decode.
pub(crate) fn encode_push_head(key: TicketKey, generation: u32, push: Push) -> Bytes {
    let frame = match push {
        Push::Blocks(run) => HeadFrame::Blocks(v1::KvBlocks {
            layer: run.layer,
            first_block: run.first_block,
            blocks: run.blocks,
            last_rows: run.last_rows,
            checksums: run.checksums,
        }),
        Push::Finish(token) => HeadFrame::Finish(v1::KvFinish {
            first_token: Some(v1::GeneratedToken { token_id: token.0, ..v1::GeneratedToken::default() }),
        }),
        Push::Abort(reason) => HeadFrame::Abort(v1::KvAbort { reason: cut(reason) }),
        Push::Resume => HeadFrame::Resume(v1::KvResume {}),
        Push::Renew => HeadFrame::Renew(v1::KvRenew {}),
    };
    let TicketKey { incarnation, ticket_id: TicketId(ticket_id) } = key;
    let head = v1::KvFrameHead { incarnation, ticket_id, generation, frame: Some(frame) };
    head.encode_to_vec().into()
}

/// Reads a frame from prefill: for which ticket, of which generation, and what.
///
/// # Errors
/// The head is none of this direction.
pub fn decode_push(head: &[u8]) -> Result<(TicketKey, u32, Push), WireError> {
    let head = v1::KvFrameHead::decode(head)?;
    let key = TicketKey { incarnation: head.incarnation, ticket_id: TicketId(head.ticket_id) };
    let push = match head.frame.ok_or(WireError::Missing("frame"))? {
        HeadFrame::Blocks(blocks) => Push::Blocks(Run {
            layer: blocks.layer,
            first_block: blocks.first_block,
            blocks: blocks.blocks,
            last_rows: blocks.last_rows,
            checksums: blocks.checksums,
        }),
        HeadFrame::Finish(finish) => {
            let token = finish.first_token.ok_or(WireError::Missing("finish.first_token"))?;
            Push::Finish(TokenId(token.token_id))
        }
        HeadFrame::Abort(abort) => Push::Abort(cut(abort.reason)),
        HeadFrame::Resume(v1::KvResume {}) => Push::Resume,
        HeadFrame::Renew(v1::KvRenew {}) => Push::Renew,
    };
    Ok((key, head.generation, push))
}

/// A frame for prefill.
pub fn encode_reply(key: TicketKey, reply: Reply) -> Frame {
    let (mut generation, mut landed) = (0, Vec::new());
    let (outcome, detail) = match reply {
        Reply::Committed => (Outcome::Committed, String::new()),
        Reply::Stale(detail) => (Outcome::Stale, detail),
        Reply::Refused(detail) => (Outcome::Refused, detail),
        Reply::Held { generation: of, landed: pieces } => {
            (generation, landed) = (of, pieces);
            (Outcome::Held, String::new())
        }
    };
    let head = v1::KvReplyHead {
        incarnation: key.incarnation,
        ticket_id: key.ticket_id.0,
        outcome: outcome.into(),
        detail: cut(detail),
        generation,
        landed,
    };
    Frame { head: head.encode_to_vec().into(), body: Vec::new() }
}

/// Reads a frame from decode.
///
/// # Errors
/// The head is none of this direction.
pub fn decode_reply(head: &[u8]) -> Result<(TicketKey, Reply), WireError> {
    let head = v1::KvReplyHead::decode(head)?;
    let key = TicketKey { incarnation: head.incarnation, ticket_id: TicketId(head.ticket_id) };
    let detail = cut(head.detail);
    let reply = match Outcome::try_from(head.outcome) {
        Ok(Outcome::Committed) => Reply::Committed,
        Ok(Outcome::Stale) => Reply::Stale(detail),
        Ok(Outcome::Refused) => Reply::Refused(detail),
        Ok(Outcome::Held) => Reply::Held { generation: head.generation, landed: head.landed },
        Ok(Outcome::Unspecified) | Err(_) => return Err(WireError::Missing("outcome")),
    };
    Ok((key, reply))
}

/// At most [`TEXT_BYTES_MAX`] bytes of a text, whole characters.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

#[cfg(test)]
mod tests;
