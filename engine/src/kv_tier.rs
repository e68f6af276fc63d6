//! The second tier of the prefix cache: blocks that a pool has no room for, in host memory and behind that on a disk.
//!
//! ```text
//!           evicted (keep)                offered, if the queue has room
//!  pool ──────────────────► host memory ───────────────────────────────► disk
//!    ▲                         │     ▲                                     │
//!    └─────────────────────────┘     └─────────────────────────────────────┘
//!      restore: checked, copied         fetch: asked for before a prompt is let in, read by the disk's own thread
//! ```
//!
//! The device thread owns it. Host memory is looked up and copied in place; the disk is reached over bounded queues that are never
//! waited on: a write that finds its queue full is dropped, a read that does is not made, both are counted. Every block
//! carries a checksum from the moment it leaves the pool; one that does not match is a miss, and so is whatever a disk has
//! lost. So a tier decides what must be computed, and never what comes of it.
//!
//! Blocks are named by [`BlockDigest`] (salt and tokens up to their end), on disk together with the execution fingerprint and
//! [`BlockRows`]: what another build or another model wrote is not found.

mod disk;
mod host;
mod stored;

use std::path::PathBuf;

use crossbeam_channel::{Receiver, TryRecvError};
use model::{BlockDigest, BlockId, ExecutionFingerprint, KvLayout};

use self::disk::DiskTier;
pub use self::disk::{DiskError, Found};
use self::host::HostTier;
use crate::kv_cache::KvPool;
use crate::lower_tier::{Evicted, LowerTier, Source};

/// Bounds of a tier.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KvTierOptions {
    /// Bytes of host memory; 0: no tier.
    pub host_bytes: usize,
    /// Where blocks go from there, if anywhere.
    pub disk: Option<DiskOptions>,
}

/// A worker's part of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// A folder that no other worker uses.
    pub path: PathBuf,
    /// Bytes that it may grow to.
    pub bytes: usize,
}

/// Which rows of a block its worker stores: a block without the MTP module's must not pass for one that has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockRows {
    /// Those of the model's layers.
    Layers,
    /// And those of the MTP module.
    LayersAndMtp,
}

/// What a tier has done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Blocks in host memory.
    pub host_blocks: usize,
    /// Blocks that came into host memory from the pool.
    pub stored: u64,
    /// Blocks that gave way to others in host memory.
    pub host_evictions: u64,
    /// Blocks whose checksum did not hold.
    pub corrupt: u64,
    /// Blocks handed to the disk.
    pub disk_writes: u64,
    /// Blocks that the disk was too slow to take.
    pub disk_dropped: u64,
    /// Blocks that came back from the disk.
    pub disk_reads: u64,
    /// Blocks that the disk's index promised and that could not be read: damaged, or overwritten since.
    pub disk_misses: u64,
    /// Reads not made because as many were under way as may be.
    pub disk_reads_refused: u64,
}

impl TierStats {
    /// Name, meaning and value of each count, as a worker's metrics show them. The blocks in host memory are not among them: they
    /// come and go.
    pub fn counts(&self) -> [(&'static str, &'static str, u64); 8] {
        [
            ("kv_tier_stored", "Evicted KV blocks that were kept in host memory", self.stored),
            (
                "kv_tier_host_evictions",
                "KV blocks that gave way to others in host memory",
                self.host_evictions,
            ),
            ("kv_tier_corrupt", "Kept KV blocks whose checksum did not hold: computed again", self.corrupt),
            ("kv_tier_disk_writes", "KV blocks handed to the disk", self.disk_writes),
            ("kv_tier_disk_dropped", "KV blocks that the disk was too slow to take", self.disk_dropped),
            ("kv_tier_disk_reads", "KV blocks that came back from the disk", self.disk_reads),
            (
                "kv_tier_disk_misses",
                "KV blocks that the disk's index promised and that could not be read",
                self.disk_misses,
            ),
            (
                "kv_tier_disk_reads_refused",
                "Reads that would have exceeded their bound",
                self.disk_reads_refused,
            ),
        ]
    }
}

/// The tier of one worker.
pub struct KvTier {
    host: HostTier,
    disk: Option<DiskTier>,
    /// Blocks that the disk was asked for and that have not come.
    fetching: usize,
    /// Whose they are.
    waiting: Vec<u64>,
    stats: TierStats,
}

impl KvTier {
    /// An empty tier behind a pool of `layout`, over what its disk still holds. Reads the disk's index: not for a thread that
    /// must not block.
    ///
    /// # Errors
    /// A disk's folder that cannot be used.
    pub fn open(
        options: &KvTierOptions,
        layout: &KvLayout,
        fingerprint: &ExecutionFingerprint,
        rows: BlockRows,
    ) -> Result<Self, DiskError> {
        let block_bytes = layout.block_bytes();
        let host = HostTier::new(options.host_bytes / block_bytes.max(1), block_bytes);
        let disk = match &options.disk {
            Some(disk) if host.blocks_max() > 0 => {
                Some(DiskTier::open(disk, block_bytes, fingerprint.digest(), rows as u8)?)
            }
            _ => None,
        };
        Ok(Self { host, disk, fetching: 0, waiting: Vec::new(), stats: TierStats::default() })
    }

    /// Keeps nothing.
    pub fn none() -> Self {
        let host = HostTier::new(0, 0);
        Self { host, disk: None, fetching: 0, waiting: Vec::new(), stats: TierStats::default() }
    }

    /// Blocks that may be held behind a pool, in memory and on disk.
    pub fn blocks_max(&self) -> usize {
        self.host.blocks_max() + self.disk.as_ref().map_or(0, DiskTier::blocks_max)
    }

    /// Whether there is a disk to [fetch](Self::fetch) from.
    pub fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Between `pool` and this tier.
    pub fn behind<'a>(&'a mut self, pool: &'a mut KvPool) -> Behind<'a> {
        Behind { tier: self, pool }
    }

    /// Asks the disk for those of `missing`, a prompt's blocks in order, that can be had one after another and are not in
    /// memory; [`Self::poll`] says `request` once they have come. `false`: there is nothing to wait for.
    pub fn fetch(&mut self, request: u64, missing: &[BlockDigest]) -> bool {
        let Some(disk) = &self.disk else { return false };
        let mut wanted = Vec::new();
        // What comes must not push out what came before it.
        let mut room = (self.host.blocks_max() / 2).saturating_sub(self.fetching);
        for digest in missing {
            if self.host.touch(digest) {
                continue;
            }
            if !disk.may_hold(digest) {
                break;
            }
            if room == 0 {
                self.stats.disk_reads_refused += 1;
                break;
            }
            room -= 1;
            wanted.push(*digest);
        }
        let blocks = wanted.len();
        if blocks == 0 {
            return false;
        }
        let asked = disk.read(request, wanted);
        if asked {
            self.fetching += blocks;
            self.waiting.push(request);
        } else {
            self.stats.disk_reads_refused += 1;
        }
        asked
    }

    /// Takes in what the disk has read; names the requests that need wait no longer.
    pub fn poll(&mut self) -> Vec<u64> {
        // Memory for it is taken when something has come.
        let mut done = Vec::new();
        while let Some(disk) = &self.disk {
            match disk.take() {
                Ok(found) => {
                    done.push(found.request);
                    self.take_in(found);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    tracing::error!("the disk's thread has ended: KV blocks stay in memory alone");
                    self.disk = None;
                    self.fetching = 0;
                    done.append(&mut self.waiting);
                }
            }
        }
        done
    }

    fn take_in(&mut self, found: Found) {
        let Found { request, asked, blocks } = found;
        self.waiting.retain(|&waiting| waiting != request);
        self.fetching -= asked;
        self.stats.disk_reads += blocks.len() as u64;
        self.stats.disk_misses += (asked - blocks.len()) as u64;
        for (digest, block) in blocks {
            if block.is_whole() {
                self.host.insert(digest, block, Source::Disk);
            } else {
                self.stats.corrupt += 1;
                tracing::warn!(?digest, "a block from the disk is damaged: it is computed again");
            }
        }
    }

    /// Rings when the disk has read something; `None` without one.
    pub fn arrivals(&self) -> Option<&Receiver<Found>> {
        self.disk.as_ref().map(DiskTier::arrivals)
    }

    /// What it has done.
    pub fn stats(&self) -> TierStats {
        TierStats { host_blocks: self.host.len(), host_evictions: self.host.evictions(), ..self.stats }
    }

    /// Hands what the disk lacks of host memory to it, as far as that goes within its patience, and waits until it is
    /// written.
    pub fn close(mut self) {
        if let Some(disk) = self.disk.take() {
            disk.close(self.host.drain());
        }
    }
}

/// A tier and the pool before it.
pub struct Behind<'a> {
    tier: &'a mut KvTier,
    pool: &'a mut KvPool,
}

impl LowerTier for Behind<'_> {
    fn holds(&mut self, digest: &BlockDigest) -> bool {
        self.tier.host.touch(digest)
    }

    fn keep(&mut self, block: BlockId, evicted: &Evicted) {
        let KvTier { host, disk, stats, .. } = &mut *self.tier;
        // The same tokens give the same bits: a copy that is here already is as good.
        if host.blocks_max() == 0 || host.touch(&evicted.digest) {
            return;
        }
        let pool = &*self.pool;
        let stored = host.store(evicted, |bytes| pool.read_block(block, bytes));
        stats.stored += 1;
        if let Some(disk) = disk.as_ref().filter(|disk| !disk.may_hold(&evicted.digest)) {
            let queued = disk.write(evicted.digest, stored);
            stats.disk_writes += u64::from(queued);
            stats.disk_dropped += u64::from(!queued);
        }
    }

    fn restore(&mut self, digest: &BlockDigest, block: BlockId) -> Option<Source> {
        let KvTier { host, stats, .. } = &mut *self.tier;
        let (stored, source) = host.get(digest)?;
        if !stored.is_whole() {
            stats.corrupt += 1;
            tracing::warn!(?digest, "a block in host memory is damaged: it is computed again");
            host.remove(digest);
            return None;
        }
        self.pool.write_block(block, stored.bytes());
        host.restored(digest);
        Some(source)
    }
}

#[cfg(test)]
mod tests;
