//! A block outside the pool: its bytes, their checksum, and its place among others.

use std::io::{Read, Write};
use std::sync::Arc;

use foyer::{Code, Error, ErrorKind};
use model::BlockDigest;
use xxhash_rust::xxh3::xxh3_64;

use crate::lower_tier::Evicted;

/// Bytes before a block's own on disk: parent, depth, checksum, length.
const HEADER_BYTES: usize = 32 + 3 * 8;

/// A block's KV. Shared with the disk's thread while that writes it.
#[derive(Debug, Clone)]
pub struct StoredBlock {
    pub(super) parent: BlockDigest,
    pub(super) depth_tokens: u64,
    checksum: u64,
    bytes: Box<[u8]>,
}

impl StoredBlock {
    /// Memory for a block.
    pub(super) fn zeroed(block_bytes: usize) -> Self {
        let bytes = vec![0; block_bytes].into_boxed_slice();
        Self { parent: BlockDigest([0; 32]), depth_tokens: 0, checksum: 0, bytes }
    }

    /// Writes a block over what is here.
    pub(super) fn fill(&mut self, evicted: &Evicted, read: impl FnOnce(&mut [u8])) {
        (self.parent, self.depth_tokens) = (evicted.parent, evicted.depth_tokens);
        read(&mut self.bytes);
        self.checksum = xxh3_64(&self.bytes);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether the bytes are those that were stored.
    pub(super) fn is_whole(&self) -> bool {
        xxh3_64(&self.bytes) == self.checksum
    }

    /// Damages it.
    #[cfg(test)]
    pub(super) fn flip(&mut self) {
        self.bytes[0] ^= 1;
    }
}

/// How it lies on the disk.
#[derive(Debug, Clone)]
pub(super) struct OnDisk(pub(super) Arc<StoredBlock>);

impl Code for OnDisk {
    fn encode(&self, writer: &mut impl Write) -> Result<(), Error> {
        let StoredBlock { parent, depth_tokens, checksum, bytes } = &*self.0;
        let mut header = [0; HEADER_BYTES];
        header[..32].copy_from_slice(&parent.0);
        header[32..40].copy_from_slice(&depth_tokens.to_le_bytes());
        header[40..48].copy_from_slice(&checksum.to_le_bytes());
        header[48..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        writer.write_all(&header).and_then(|()| writer.write_all(bytes)).map_err(Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> Result<Self, Error> {
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header).map_err(Error::io_error)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let mut parent = [0; 32];
        parent.copy_from_slice(&header[..32]);
        let length = number(48);
        let mut bytes = Vec::new();
        // A length that was made up reserves nothing.
        reader.take(length).read_to_end(&mut bytes).map_err(Error::io_error)?;
        if bytes.len() as u64 != length {
            return Err(Error::new(ErrorKind::OutOfRange, "a block ends before its length"));
        }
        Ok(Self(Arc::new(StoredBlock {
            parent: BlockDigest(parent),
            depth_tokens: number(32),
            checksum: number(40),
            bytes: bytes.into_boxed_slice(),
        })))
    }

    fn estimated_size(&self) -> usize {
        HEADER_BYTES + self.0.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_as_it_went_or_not_at_all() {
        let mut block = StoredBlock::zeroed(100);
        let evicted =
            Evicted { digest: BlockDigest([1; 32]), parent: BlockDigest([2; 32]), depth_tokens: 640 };
        block.fill(&evicted, |bytes| bytes.copy_from_slice(&[7; 100]));
        let mut written = Vec::new();
        OnDisk(Arc::new(block)).encode(&mut written).expect("memory takes it");
        let back = OnDisk::decode(&mut &written[..]).expect("whole").0;
        assert_eq!((back.parent, back.depth_tokens, back.bytes()), (evicted.parent, 640, &[7; 100][..]));
        assert!(back.is_whole());
        for length in 0..written.len() {
            assert!(OnDisk::decode(&mut &written[..length]).is_err(), "{length} bytes");
        }
        let last = written.len() - 1;
        written[last] ^= 1;
        assert!(!OnDisk::decode(&mut &written[..]).expect("as long as it says").0.is_whole());
        // A length beyond everything.
        written[48..56].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(OnDisk::decode(&mut &written[..]).is_err());
    }
}
