//! A frame's body as its receiver holds it: bytes of its own, or a place in a peer's memory.

use std::sync::Arc;

use bytes::Bytes;

use crate::checksum::{Stores, SummedCopy};
use crate::inbox::Admission;
use crate::rdma::StagedBody;
use crate::shared::SharedBody;
use crate::spares::Spares;

/// A received body. What is in it can only be copied: where it lies in a peer's memory, the peer could change it
/// between a check and a use.
#[derive(Clone)]
pub struct Body(Place);

#[derive(Clone)]
enum Place {
    Own(Bytes),
    /// As they came off the network, with their part of the receive budget: to be copied once, to where they belong.
    Pieces(Arc<(Pieces, Admission)>),
    /// With its part of the receive budget, where the channel has one.
    Shared(Arc<(SharedBody, Option<Admission>)>),
    /// Where the peer may still write, with its part of the receive budget.
    Staged(Arc<(StagedBody, Admission)>),
}

/// A copy was asked for that the body does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes {start}..{start}+{bytes} of a body of {len}")]
pub struct OutsideBody {
    /// Where the copy should begin.
    pub start: usize,
    /// Its length.
    pub bytes: usize,
    /// The body's length.
    pub len: usize,
}

impl Body {
    pub(crate) fn shared(body: SharedBody, admission: Option<Admission>) -> Self {
        Self(Place::Shared(Arc::new((body, admission))))
    }

    pub(crate) fn staged(body: StagedBody, admission: Admission) -> Self {
        Self(Place::Staged(Arc::new((body, admission))))
    }

    pub(crate) fn pieces(pieces: Vec<Bytes>, admission: Admission) -> Self {
        Self(Place::Pieces(Arc::new((Pieces::new(pieces), admission))))
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Own(bytes) => bytes.len(),
            Place::Pieces(pieces) => pieces.0.len(),
            Place::Shared(shared) => shared.0.len(),
            Place::Staged(staged) => staged.0.len(),
        }
    }

    /// Whether the frame has no body.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `into.len()` bytes from `start` on, and gives the copy's [`crate::checksum`], taken on the way.
    ///
    /// # Errors
    /// The body does not hold so many. Nothing was copied.
    pub fn copy_summed(&self, start: usize, into: &mut [u8]) -> Result<u64, OutsideBody> {
        self.bounds(start, into.len())?;
        // Of what is stored, whatever a peer does to its side meanwhile. Nobody reads it soon, and it is far from the last write.
        let mut copy = SummedCopy::new(into, Stores::Streaming);
        match &self.0 {
            Place::Own(bytes) => copy.append(&bytes[start..start + copy.left()]),
            Place::Pieces(pieces) => pieces.0.parts(start, copy.left(), |part| copy.append(part)),
            Place::Shared(shared) => shared.0.copy_summed(start, &mut copy),
            Place::Staged(staged) => staged.0.copy_summed(start, &mut copy),
        }
        Ok(copy.finish())
    }

    /// Copies `into.len()` bytes from `start` on.
    ///
    /// # Errors
    /// As [`Self::copy_summed`].
    pub fn copy(&self, start: usize, into: &mut [u8]) -> Result<(), OutsideBody> {
        self.bounds(start, into.len())?;
        match &self.0 {
            Place::Own(bytes) => into.copy_from_slice(&bytes[start..start + into.len()]),
            Place::Pieces(pieces) => pieces.0.copy(start, into),
            Place::Shared(shared) => shared.0.copy(start, into),
            Place::Staged(staged) => staged.0.copy(start, into),
        }
        Ok(())
    }

    fn bounds(&self, start: usize, bytes: usize) -> Result<(), OutsideBody> {
        let len = self.len();
        let end = start.checked_add(bytes).filter(|&end| end <= len);
        end.map(drop).ok_or(OutsideBody { start, bytes, len })
    }

    /// The bytes in one piece, copied where they lie in several or in a peer's memory.
    pub fn into_bytes(self) -> Bytes {
        match self.0 {
            Place::Own(bytes) => bytes,
            Place::Pieces(pieces) => pieces.0.to_vec().into(),
            Place::Shared(shared) => shared.0.to_vec().into(),
            Place::Staged(staged) => staged.0.to_vec().into(),
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(Place::Own(bytes))
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes)", self.len())
    }
}

/// Bytes in several places, each with where it ends in the whole.
struct Pieces(Vec<(usize, Bytes)>);

impl Pieces {
    fn new(pieces: Vec<Bytes>) -> Self {
        let mut end = 0;
        let ended = |piece: Bytes| {
            end += piece.len();
            (end, piece)
        };
        Self(pieces.into_iter().map(ended).collect())
    }

    fn len(&self) -> usize {
        self.0.last().map_or(0, |(end, _)| *end)
    }

    /// Copies `into.len()` bytes from `start` on. The caller has checked the bounds.
    fn copy(&self, start: usize, into: &mut [u8]) {
        let mut at = 0;
        self.parts(start, into.len(), |part| {
            into[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        });
    }

    /// The `bytes` bytes from `start` on, in the places in which they lie. The caller has checked the bounds.
    fn parts<'a>(&'a self, mut start: usize, mut bytes: usize, mut take: impl FnMut(&'a [u8])) {
        let first = self.0.partition_point(|(end, _)| *end <= start);
        for (end, piece) in &self.0[first..] {
            if bytes == 0 {
                return;
            }
            let here = &piece[piece.len() - (end - start)..];
            let part = &here[..here.len().min(bytes)];
            take(part);
            (bytes, start) = (bytes - part.len(), *end);
        }
    }

    fn to_vec(&self) -> Vec<u8> {
        let mut whole = Vec::with_capacity(self.len());
        self.0.iter().for_each(|(_, piece)| whole.extend_from_slice(piece));
        whole
    }
}

/// Copies pieces into one body, taking each one's checksum on the way.
pub(crate) fn gather(pieces: &[&[u8]], spares: &Spares) -> (Bytes, Vec<u64>) {
    let bytes = pieces.iter().map(|piece| piece.len()).sum();
    let mut body = spares.take(bytes);
    let mut rest = &mut body[..];
    let checksums = pieces.iter().map(|piece| {
        let (into, behind) = std::mem::take(&mut rest).split_at_mut(piece.len());
        rest = behind;
        let mut copy = SummedCopy::new(into, Stores::Cached);
        copy.append(piece);
        copy.finish()
    });
    let checksums = checksums.collect();
    (spares.lend(body, bytes), checksums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_read_like_the_whole() {
        let whole: Vec<u8> = (0..=255).collect();
        for cuts in [vec![0, 256], vec![0, 1, 1, 100, 255, 256], vec![0, 0, 128, 256, 256]] {
            let pieces = Pieces::new(
                cuts.windows(2).map(|cut| Bytes::copy_from_slice(&whole[cut[0]..cut[1]])).collect(),
            );
            assert_eq!(pieces.to_vec(), whole);
            for start in 0..=256 {
                for end in start..=256 {
                    let mut copy = vec![0; end - start];
                    pieces.copy(start, &mut copy);
                    assert_eq!(copy, whole[start..end], "{cuts:?}, {start}..{end}");
                }
            }
        }
    }
}
