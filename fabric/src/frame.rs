//! Frames, channels, and the frame's header on the wire.
//!
//! On a stream a frame is `head bytes: u32 LE, body bytes: u32 LE, head, body`. Lengths are checked against the
//! receiver's limits before anything is allocated for them.

use bytes::Bytes;

use crate::limits::Limits;

/// What a frame belongs to. Channels do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// KV blocks from prefill to decode, and the answers.
    Kv,
    /// Tokens to experts and back.
    Experts,
}

impl Channel {
    /// Every channel, in the order of [`Channel::index`].
    pub(crate) const ALL: [Channel; 2] = [Channel::Kv, Channel::Experts];

    /// Position in per-channel arrays, and the tag that opens its stream on the wire.
    pub(crate) fn index(self) -> usize {
        match self {
            Channel::Kv => 0,
            Channel::Experts => 1,
        }
    }
}

/// A message: a small head that says what it is, and a body of raw bytes, given in pieces and received as one.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// At most [`Limits::head_bytes_max`].
    pub head: Bytes,
    /// Together at most [`Limits::body_bytes_max`].
    pub body: Vec<Bytes>,
}

impl Frame {
    /// Bytes of the body's pieces together.
    pub fn body_bytes(&self) -> usize {
        self.body.iter().map(Bytes::len).sum()
    }

    /// Bytes of head and body.
    pub(crate) fn bytes(&self) -> usize {
        self.head.len() + self.body_bytes()
    }

    /// Whether a peer with these limits would take it.
    pub(crate) fn fits(&self, limits: &Limits) -> bool {
        self.head.len() <= limits.head_bytes_max && self.body_bytes() <= limits.body_bytes_max
    }
}

/// The peer sent something that the wire does not allow. The connection is closed for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A frame's head is longer than our limit.
    #[error("a head of {got} bytes, at most {max} allowed")]
    HeadTooLong {
        /// Announced.
        got: u32,
        /// Allowed.
        max: usize,
    },
    /// A frame's body is longer than our limit.
    #[error("a body of {got} bytes, at most {max} allowed")]
    BodyTooLong {
        /// Announced.
        got: u32,
        /// Allowed.
        max: usize,
    },
    /// A stream ended although its channel lives as long as the connection.
    #[error("a channel's stream ended")]
    StreamEnded,
    /// A stream was opened for a channel that does not exist, or that has one already.
    #[error("a second or unknown channel with tag {tag}")]
    Channel {
        /// The stream's first byte.
        tag: u8,
    },
    /// A frame in shared memory does not lie where frames lie.
    #[error("a frame of {bytes} bytes at {place}, outside the arena")]
    SharedPlace {
        /// Its start, as announced.
        place: u64,
        /// Its length, as announced.
        bytes: usize,
    },
    /// A notice of a one-sided write that none of ours would be, or that says again what was said.
    #[error("no notice of this protocol")]
    Notice,
    /// The hello does not begin as ours do.
    #[error("no hello of this protocol")]
    HelloMagic,
    /// The peer's framing has another version.
    #[error("wire version {theirs}, ours is {ours}")]
    WireVersion {
        /// What we speak.
        ours: u16,
        /// What the peer speaks.
        theirs: u16,
    },
    /// A text in the hello is empty, too long or not UTF-8.
    #[error("the hello's {field} is empty, too long or not UTF-8")]
    HelloText {
        /// `worker`, `address`, `host` or `door`.
        field: &'static str,
    },
}

/// A frame's lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub head_bytes: u32,
    pub body_bytes: u32,
}

impl FrameHeader {
    pub const BYTES: usize = 8;

    /// The header of a frame that [`Frame::fits`] the limits, which keep lengths within `u32`.
    pub fn of(frame: &Frame) -> Self {
        Self { head_bytes: frame.head.len() as u32, body_bytes: frame.body_bytes() as u32 }
    }

    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut wire = [0; Self::BYTES];
        wire[..4].copy_from_slice(&self.head_bytes.to_le_bytes());
        wire[4..].copy_from_slice(&self.body_bytes.to_le_bytes());
        wire
    }

    pub fn decode(wire: [u8; Self::BYTES], limits: &Limits) -> Result<Self, ProtocolError> {
        let [a, b, c, d, e, f, g, h] = wire;
        let header = Self {
            head_bytes: u32::from_le_bytes([a, b, c, d]),
            body_bytes: u32::from_le_bytes([e, f, g, h]),
        };
        header.check(limits)?;
        Ok(header)
    }

    /// Whether a frame of these lengths is one that we take.
    pub fn check(self, limits: &Limits) -> Result<(), ProtocolError> {
        if self.head_bytes as usize > limits.head_bytes_max {
            return Err(ProtocolError::HeadTooLong { got: self.head_bytes, max: limits.head_bytes_max });
        }
        if self.body_bytes as usize > limits.body_bytes_max {
            return Err(ProtocolError::BodyTooLong { got: self.body_bytes, max: limits.body_bytes_max });
        }
        Ok(())
    }

    /// Bytes that follow the header.
    pub fn payload_bytes(self) -> usize {
        self.head_bytes as usize + self.body_bytes as usize
    }
}

#[cfg(test)]
mod tests;
