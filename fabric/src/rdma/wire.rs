//! What two ends tell each other about one-sided writes: the offer in the handshake, the notices beside the writes.

use crate::frame::{Channel, FrameHeader, ProtocolError};

/// The C interface and the version of what follows; ends that differ stay with QUIC.
const MAGIC: [u8; 8] = *b"TRRD15\x01\0";
/// NIXL's metadata with a few devices is some KB.
pub(crate) const OFFER_BYTES_MAX: usize = 256 << 10;
/// What proves that a peer reaches our memory.
pub(crate) const PROOF_BYTES: usize = 32;

/// How a peer writes to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Where our arenas for each channel begin, as their address here: what NIXL calls them by.
    pub arenas: [u64; 2],
    /// Bytes of each of them.
    pub arena_bytes: u64,
    /// Frames under way in a channel.
    pub frames_max: u64,
    /// To be written to the beginning of the first arena.
    pub proof: [u8; PROOF_BYTES],
    /// NIXL's.
    pub metadata: Vec<u8>,
}

impl Offer {
    pub fn encode(&self) -> Vec<u8> {
        let mut wire = MAGIC.to_vec();
        for word in [self.arenas[0], self.arenas[1], self.arena_bytes, self.frames_max] {
            wire.extend_from_slice(&word.to_le_bytes());
        }
        wire.extend_from_slice(&self.proof);
        wire.extend_from_slice(&self.metadata);
        wire
    }

    /// `None`: of another version, or nonsense.
    pub fn decode(wire: &[u8]) -> Option<Self> {
        let wire = wire.strip_prefix(&MAGIC)?;
        let (words, wire) = wire.split_at_checked(4 * 8)?;
        let (proof, metadata) = wire.split_at_checked(PROOF_BYTES)?;
        let words: Vec<u64> = words.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let &[kv, experts, arena_bytes, frames_max] = words.as_slice() else { return None };
        let offer = Self {
            arenas: [kv, experts],
            arena_bytes,
            frames_max,
            proof: proof.try_into().ok()?,
            metadata: metadata.to_vec(),
        };
        // An arena that wraps around the end of memory is nobody's.
        let sound = offer.arenas.iter().all(|start| start.checked_add(arena_bytes).is_some());
        (sound && arena_bytes > 0 && frames_max > 0).then_some(offer)
    }
}

/// What comes with a write, or on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The proof lies where it was asked for.
    Proof,
    /// A channel's frame lies at `place` of its arena: body, then head.
    Frame { channel: Channel, number: u64, place: u64, header: FrameHeader },
    /// The receiver is done with so many of the frames of a channel: credit for as many more.
    Done { channel: Channel, count: u64 },
}

const NOTICE_BYTES: usize = 26;

impl Notice {
    pub fn encode(self) -> [u8; NOTICE_BYTES] {
        let (kind, channel, words) = match self {
            Self::Proof => (0, 0, [0, 0, 0]),
            Self::Frame { channel, number, place, header } => {
                let lengths = u64::from(header.head_bytes) << 32 | u64::from(header.body_bytes);
                (1, channel.index(), [number, place, lengths])
            }
            Self::Done { channel, count } => (2, channel.index(), [count, 0, 0]),
        };
        let mut wire = [0; NOTICE_BYTES];
        (wire[0], wire[1]) = (kind, channel as u8);
        for (at, word) in words.into_iter().enumerate() {
            wire[2 + 8 * at..][..8].copy_from_slice(&word.to_le_bytes());
        }
        wire
    }

    pub fn decode(wire: &[u8]) -> Result<Self, ProtocolError> {
        let wire: &[u8; NOTICE_BYTES] = wire.try_into().map_err(|_| ProtocolError::Notice)?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&wire[2 + 8 * at..][..8]);
            u64::from_le_bytes(bytes)
        };
        let channel = Channel::ALL.get(usize::from(wire[1])).copied();
        let channel = channel.ok_or(ProtocolError::Channel { tag: wire[1] })?;
        match wire[0] {
            0 => Ok(Self::Proof),
            1 => {
                let header = FrameHeader { head_bytes: (word(2) >> 32) as u32, body_bytes: word(2) as u32 };
                Ok(Self::Frame { channel, number: word(0), place: word(1), header })
            }
            2 => Ok(Self::Done { channel, count: word(0) }),
            _ => Err(ProtocolError::Notice),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_and_offers_survive_and_nonsense_does_not() {
        let header = FrameHeader { head_bytes: u32::MAX, body_bytes: 7 };
        for channel in Channel::ALL {
            for notice in [
                Notice::Proof,
                Notice::Frame { channel, number: u64::MAX, place: 1 << 40, header },
                Notice::Done { channel, count: 3 },
            ] {
                assert_eq!(Notice::decode(&notice.encode()).expect("a notice"), notice);
            }
        }
        let mut wire = Notice::Proof.encode();
        wire[0] = 3;
        assert!(Notice::decode(&wire).is_err());
        wire = Notice::Proof.encode();
        wire[1] = 2;
        assert!(Notice::decode(&wire).is_err());
        assert!(Notice::decode(&wire[1..]).is_err());

        let offer = Offer {
            arenas: [4096, 8192],
            arena_bytes: 4096,
            frames_max: 4,
            proof: [7; PROOF_BYTES],
            metadata: vec![1, 2, 3],
        };
        let wire = offer.encode();
        assert_eq!(Offer::decode(&wire), Some(offer.clone()));
        assert_eq!(Offer::decode(&wire[1..]), None);
        assert_eq!(Offer::decode(&wire[..50]), None);
        let wraps = Offer { arenas: [u64::MAX, 0], ..offer };
        assert_eq!(Offer::decode(&wraps.encode()), None);
    }
}
