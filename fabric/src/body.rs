//! A frame's body as its receiver holds it: bytes of its own, or a place in a peer's memory.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::frame::checksum;
use crate::inbox::Admission;
use crate::shared::SharedBody;

/// A received body. What is in it can only be copied: where it lies in a peer's memory, the peer could change it
/// between a check and a use.
#[derive(Clone)]
pub struct Body(Place);

#[derive(Clone)]
enum Place {
    Own(Bytes),
    /// With its part of the receive budget, where the channel has one.
    Shared(Arc<(SharedBody, Option<Admission>)>),
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

    /// Bytes of it.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Own(bytes) => bytes.len(),
            Place::Shared(shared) => shared.0.len(),
        }
    }

    /// Whether the frame has no body.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `into.len()` bytes from `start` on, and gives the copy's [`checksum`], taken while it is in cache.
    ///
    /// # Errors
    /// The body does not hold so many. Nothing was copied.
    pub fn copy_summed(&self, start: usize, into: &mut [u8]) -> Result<u64, OutsideBody> {
        let end = start.checked_add(into.len()).filter(|&end| end <= self.len());
        let end = end.ok_or(OutsideBody { start, bytes: into.len(), len: self.len() })?;
        Ok(match &self.0 {
            Place::Own(bytes) => {
                into.copy_from_slice(&bytes[start..end]);
                checksum(into)
            }
            Place::Shared(shared) => shared.0.copy_summed(start, into),
        })
    }

    /// The `bytes` bytes from `start` on, once they have passed their [`checksum`], where nobody else can change them any
    /// more: as they lie if they are our own, copied to `scratch` if they lie in a peer's memory. `None`: they are damaged.
    ///
    /// # Errors
    /// The body does not hold so many. Nothing was copied.
    pub fn verified<'a>(
        &'a self,
        start: usize,
        bytes: usize,
        expected: u64,
        scratch: &'a mut Vec<u8>,
    ) -> Result<Option<Verified<'a>>, OutsideBody> {
        let end = start.checked_add(bytes).filter(|&end| end <= self.len());
        let end = end.ok_or(OutsideBody { start, bytes, len: self.len() })?;
        let (piece, sum): (&[u8], u64) = match &self.0 {
            Place::Own(own) => (&own[start..end], checksum(&own[start..end])),
            Place::Shared(shared) => {
                scratch.resize(bytes, 0);
                let sum = shared.0.copy_summed(start, scratch);
                (scratch, sum)
            }
        };
        Ok((sum == expected).then_some(Verified(piece)))
    }

    /// The bytes, copied where they lie in a peer's memory.
    pub fn into_bytes(self) -> Bytes {
        match self.0 {
            Place::Own(bytes) => bytes,
            Place::Shared(shared) => shared.0.to_vec().into(),
        }
    }
}

/// Bytes of a body that have passed their checksum and can no longer change.
#[derive(Debug)]
pub struct Verified<'a>(&'a [u8]);

impl Verified<'_> {
    /// Copies them to where they belong.
    ///
    /// # Panics
    /// `into` is not as long as they are.
    pub fn copy_to(self, into: &mut [u8]) {
        into.copy_from_slice(self.0);
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

/// Copies pieces into one body, taking each one's checksum.
pub(crate) fn gather(pieces: &[&[u8]]) -> (Bytes, Vec<u64>) {
    let mut body = BytesMut::with_capacity(pieces.iter().map(|piece| piece.len()).sum());
    let checksums = pieces
        .iter()
        .map(|piece| {
            let start = body.len();
            body.extend_from_slice(piece);
            checksum(&body[start..])
        })
        .collect();
    (body.freeze(), checksums)
}
