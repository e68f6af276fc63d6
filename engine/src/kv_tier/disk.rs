//! Blocks on a disk: foyer's block engine behind a thread of its own.
//!
//! foyer keeps an index in memory, writes entries one behind the other into regions, reclaims the oldest region when there is no
//! room, checks what it reads, and finds its entries again after a restart. It is asynchronous; its runtime belongs to the thread
//! here, and the device thread sees queues alone. What it writes is only ever a copy: it may lose anything at any time.
//!
//! An entry's key is a digest of what the block holds: execution fingerprint, rows, and the block's own digest.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select};
use foyer::{
    BlockEngineConfig, Code, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    HybridCachePolicy, RecoverMode,
};
use model::BlockDigest;
use sha2::{Digest, Sha256};
use tokio::runtime;

use super::DiskOptions;
use super::stored::{OnDisk, StoredBlock};

/// Bytes of blocks that wait to be written at most: a few hundred milliseconds of a slow disk.
const WRITE_QUEUE_BYTES: usize = 64 << 20;
/// Blocks that wait to be written at most, however small.
const WRITES_MAX: usize = 1024;
/// Bytes handed to foyer before its writes are waited for, so that its own bounds are never met; a read waits as long.
const BATCH_BYTES: usize = 8 << 20;
/// Requests that wait for their blocks at most.
const READS_MAX: usize = 64;
/// What foyer reclaims at once, unless a block is larger.
const REGION_BYTES: usize = 16 << 20;
/// Fewer regions than this, and reclaiming one costs too much of what is there.
const REGIONS_MIN: usize = 4;
/// For writing down at the end what only memory holds.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No folder can be made or written there.
    #[error("KV blocks on disk, {path}: {source}", path = path.display())]
    Folder {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Less than a few of its regions.
    #[error("KV blocks on disk: {bytes} bytes are too few, blocks of {block_bytes} need {bytes_min}")]
    TooSmall {
        /// What was given.
        bytes: usize,
        /// Bytes of one block.
        block_bytes: usize,
        /// The least that is of use.
        bytes_min: usize,
    },
    /// The cache cannot be opened.
    #[error("KV blocks on disk, {path}: {source}", path = path.display())]
    Open {
        /// Where.
        path: PathBuf,
        /// What foyer said.
        #[source]
        source: Box<foyer::Error>,
    },
}

/// What was read for a request: of `asked` blocks those that could be had.
pub struct Found {
    pub(super) request: u64,
    pub(super) asked: usize,
    pub(super) blocks: Vec<(BlockDigest, Arc<StoredBlock>)>,
}

struct Read {
    request: u64,
    digests: Vec<BlockDigest>,
}

type Write = (BlockDigest, Arc<StoredBlock>);
type Cache = HybridCache<Key, OnDisk>;

/// An entry's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key([u8; 32]);

impl Code for Key {
    fn encode(&self, writer: &mut impl std::io::Write) -> Result<(), foyer::Error> {
        writer.write_all(&self.0).map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl std::io::Read) -> Result<Self, foyer::Error> {
        let mut key = [0; 32];
        reader.read_exact(&mut key).map_err(foyer::Error::io_error)?;
        Ok(Self(key))
    }

    fn estimated_size(&self) -> usize {
        self.0.len()
    }
}

/// What all keys of a worker begin with.
#[derive(Debug, Clone, Copy)]
struct Scope {
    fingerprint: u64,
    rows: u8,
}

impl Scope {
    fn key(self, digest: &BlockDigest) -> Key {
        let hash = Sha256::new_with_prefix(self.fingerprint.to_le_bytes());
        Key(hash.chain_update([self.rows]).chain_update(digest.0).finalize().into())
    }
}

/// The device thread's side.
pub(super) struct DiskTier {
    scope: Scope,
    cache: Cache,
    blocks_max: usize,
    /// `None` once it closes.
    ways: Option<Ways>,
    found: Receiver<Found>,
    thread: Option<JoinHandle<()>>,
}

struct Ways {
    writes: Sender<Write>,
    reads: Sender<Read>,
}

impl DiskTier {
    /// Starts the thread, and finds what an earlier one left in the folder.
    pub(super) fn open(
        options: &DiskOptions,
        block_bytes: usize,
        fingerprint: u64,
        rows: u8,
    ) -> Result<Self, DiskError> {
        let DiskOptions { path, bytes } = options;
        // An entry has a header, and begins at a page.
        let entry_bytes = (block_bytes + 4096).next_multiple_of(4096);
        let region_bytes = REGION_BYTES.max((4 * entry_bytes).next_multiple_of(4096));
        let bytes_min = REGIONS_MIN * region_bytes;
        if *bytes < bytes_min {
            return Err(DiskError::TooSmall { bytes: *bytes, block_bytes, bytes_min });
        }
        let folder = |source| DiskError::Folder { path: path.clone(), source };
        std::fs::create_dir_all(path).map_err(folder)?;
        let scope = Scope { fingerprint, rows };
        let batch_max = (BATCH_BYTES / entry_bytes).max(1);
        let queue_max = (WRITE_QUEUE_BYTES / entry_bytes).clamp(1, WRITES_MAX);
        let (writes, written) = bounded(queue_max);
        let (reads, asked) = bounded(READS_MAX);
        let (answers, found) = bounded(READS_MAX);
        let (opened, ready) = bounded(1);
        let (path, capacity) = (path.clone(), *bytes);
        let name = path.clone();
        let run = move || {
            let runtime = match runtime::Builder::new_multi_thread().worker_threads(1).build() {
                Ok(runtime) => runtime,
                Err(source) => return drop(opened.send(Err(DiskError::Folder { path, source }))),
            };
            let cache = runtime.block_on(open(&path, capacity, region_bytes, 2 * batch_max * entry_bytes));
            let cache = match cache {
                Ok(cache) => cache,
                Err(source) => {
                    let source = Box::new(source);
                    return drop(opened.send(Err(DiskError::Open { path, source })));
                }
            };
            let _ = opened.send(Ok(cache.clone()));
            Thread { scope, cache, runtime, batch_max, writes: written, reads: asked, answers }.run();
        };
        let thread = std::thread::Builder::new().name("kv-disk".to_owned()).spawn(run);
        let thread = thread.map_err(|source| DiskError::Folder { path: name.clone(), source })?;
        let gone = || std::io::Error::other("its thread ended");
        let cache = ready.recv().unwrap_or_else(|_| Err(DiskError::Folder { path: name, source: gone() }))?;
        let ways = Some(Ways { writes, reads });
        let blocks_max = bytes / entry_bytes;
        Ok(Self { scope, cache, blocks_max, ways, found, thread: Some(thread) })
    }

    /// Blocks that fit.
    pub(super) fn blocks_max(&self) -> usize {
        self.blocks_max
    }

    /// Whether the index has the block; it may be gone all the same.
    pub(super) fn may_hold(&self, digest: &BlockDigest) -> bool {
        self.cache.storage().may_contains(&self.scope.key(digest))
    }

    /// Queues a block to be written; `false` where the queue is full.
    pub(super) fn write(&self, digest: BlockDigest, block: Arc<StoredBlock>) -> bool {
        self.ways.as_ref().is_some_and(|ways| ways.writes.try_send((digest, block)).is_ok())
    }

    /// Asks for blocks; `false` where as many are waited for as may be.
    pub(super) fn read(&self, request: u64, digests: Vec<BlockDigest>) -> bool {
        self.ways.as_ref().is_some_and(|ways| ways.reads.try_send(Read { request, digests }).is_ok())
    }

    /// An answer that is there.
    pub(super) fn take(&self) -> Result<Found, TryRecvError> {
        self.found.try_recv()
    }

    pub(super) fn arrivals(&self) -> &Receiver<Found> {
        &self.found
    }

    /// Writes those of `blocks` that are not there, as many as its patience allows, and ends.
    pub(super) fn close(mut self, blocks: Vec<Write>) {
        let until = Instant::now() + CLOSE_MAX;
        let Some(ways) = self.ways.take() else { return };
        let lacking = blocks.into_iter().filter(|(digest, _)| !self.may_hold(digest));
        for block in lacking.collect::<Vec<_>>() {
            if ways.writes.send_deadline(block, until).is_err() {
                tracing::warn!("the disk is too slow for all of the KV blocks in memory: some are not kept");
                break;
            }
        }
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        // The thread ends when it has written what is queued.
        self.ways = None;
        if let Some(thread) = self.thread.take() {
            // Nobody looks at what is found from here on, and nobody may wait for it to be.
            while !thread.is_finished() {
                let _ = self.found.recv_timeout(Duration::from_millis(10));
            }
            if thread.join().is_err() {
                tracing::error!("the thread that writes KV blocks to disk has failed");
            }
        }
    }
}

async fn open(
    path: &std::path::Path,
    capacity: usize,
    region_bytes: usize,
    buffer_bytes: usize,
) -> Result<Cache, foyer::Error> {
    let device = FsDeviceBuilder::new(path).with_capacity(capacity).build()?;
    let engine = BlockEngineConfig::new(device)
        .with_block_size(region_bytes)
        .with_buffer_pool_size(buffer_bytes.max(REGION_BYTES))
        .with_submit_queue_size_threshold(2 * buffer_bytes.max(REGION_BYTES));
    HybridCacheBuilder::new()
        .with_name("kv")
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .with_flush_on_close(false)
        // Memory is ours: foyer's own keeps the last block that was read, and no more.
        .memory(1)
        .with_shards(1)
        .storage()
        .with_engine_config(engine)
        // Whatever cannot be read is a miss.
        .with_recover_mode(RecoverMode::Quiet)
        .build()
        .await
}

struct Thread {
    scope: Scope,
    cache: Cache,
    runtime: runtime::Runtime,
    batch_max: usize,
    writes: Receiver<Write>,
    reads: Receiver<Read>,
    answers: Sender<Found>,
}

impl Thread {
    fn run(self) {
        loop {
            // Somebody waits for a read, nobody for a write.
            match self.reads.try_recv() {
                Ok(read) => {
                    self.answer(read);
                    continue;
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => break,
            }
            select! {
                recv(self.reads) -> read => match read {
                    Ok(read) => self.answer(read),
                    Err(_) => break,
                },
                recv(self.writes) -> block => match block {
                    Ok(block) => self.write(block),
                    Err(_) => break,
                },
            }
        }
        while let Ok(block) = self.writes.try_recv() {
            self.write(block);
        }
        if let Err(error) = self.runtime.block_on(self.cache.close()) {
            tracing::warn!(%error, "KV blocks on disk were not closed in order");
        }
    }

    fn answer(&self, read: Read) {
        let Read { request, digests } = read;
        let asked = digests.len();
        let blocks = self.runtime.block_on(async {
            let reads = digests.into_iter().map(|digest| async move {
                match self.cache.get(&self.scope.key(&digest)).await {
                    Ok(entry) => Some((digest, Arc::clone(&entry?.value().0))),
                    Err(error) => {
                        tracing::warn!(?digest, %error, "a KV block cannot be read: it is computed again");
                        None
                    }
                }
            });
            futures::future::join_all(reads).await
        });
        let blocks = blocks.into_iter().flatten().collect();
        // Nobody listens any more: the worker ends.
        let _ = self.answers.send(Found { request, asked, blocks });
    }

    /// Writes a block and those that wait behind it, and waits for the disk.
    fn write(&self, first: Write) {
        let waiting = std::iter::from_fn(|| self.writes.try_recv().ok());
        for (digest, block) in std::iter::once(first).chain(waiting).take(self.batch_max) {
            drop(self.cache.storage_writer(self.scope.key(&digest)).insert(OnDisk(block)));
        }
        self.runtime.block_on(self.cache.storage().wait());
    }
}
