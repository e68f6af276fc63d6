use std::path::Path;

use model::{KvFormat, Numerics, TokenId};

use super::*;
use crate::block_pool::{BlockPool, BlockTable, Reservation};

const POOL_BLOCKS: usize = 8;

fn layout() -> KvLayout {
    KvLayout { format: KvFormat::Fp8, layers: 3, latent: 128, rope: 16, block_tokens: 64 }
}

fn fingerprint(revision: u32) -> ExecutionFingerprint {
    ExecutionFingerprint {
        weights: [3; 16],
        numerics: Numerics::Fp8,
        kv_layout_digest: 5,
        backend: "cpu/test".to_owned(),
        arithmetic_revision: revision,
    }
}

/// A worker's pool and its tier.
struct Rig {
    blocks: BlockPool,
    memory: KvPool,
    tier: KvTier,
}

impl Rig {
    fn new(tier: KvTier) -> Self {
        let memory = KvPool::new(layout(), POOL_BLOCKS).expect("a small pool");
        Self { blocks: BlockPool::new(POOL_BLOCKS, layout().block_tokens), memory, tier }
    }

    /// Runs a prompt through the pool: what was found of it must be its own KV, the rest is "computed". Returns how many
    /// blocks were found.
    fn run(&mut self, prompt: &[TokenId]) -> usize {
        let blocks = prompt.len() / 64;
        let reservation = Reservation { salt: 1, prompt, shared_max: blocks, blocks, blocks_max: blocks };
        let mut table: BlockTable =
            self.blocks.reserve(reservation, &mut self.tier.behind(&mut self.memory)).expect("room");
        let content = |at: usize, layer: usize| -> Vec<u8> {
            let seed: u32 = prompt[..(at + 1) * 64].iter().map(|token| token.0).sum();
            (0..layout().layer_stride()).map(|i| (seed as usize + layer + i) as u8).collect()
        };
        for (at, &block) in table.blocks().iter().enumerate() {
            for layer in 0..layout().layers {
                if at < table.shared() {
                    assert_eq!(*self.memory.block_layer(block, layer), content(at, layer), "block {at}");
                } else {
                    self.memory.write_block_layer(block, layer, &content(at, layer));
                }
            }
        }
        let found = table.shared();
        self.blocks.commit(&mut table, prompt);
        self.blocks.release(table);
        self.blocks.check_invariants([]);
        found
    }

    /// Waits for what the disk has of a prompt.
    fn fetch(&mut self, prompt: &[TokenId]) {
        let missing = self.blocks.missing(1, prompt, usize::MAX);
        if !self.tier.fetch(9, &missing) {
            return;
        }
        loop {
            let mut select = crossbeam_channel::Select::new();
            select.recv(self.tier.arrivals().expect("a disk"));
            select.ready();
            if self.tier.poll().contains(&9) {
                return;
            }
        }
    }
}

fn prompt(seed: u32, blocks: u32) -> Vec<TokenId> {
    (0..blocks * 64).map(|at| TokenId(seed * 1000 + at)).collect()
}

fn open(folder: Option<&Path>, host_blocks: usize, revision: u32) -> Result<KvTier, DiskError> {
    let disk = folder.map(|path| DiskOptions { path: path.to_owned(), bytes: 64 << 20 });
    let options = KvTierOptions { host_bytes: host_blocks * layout().block_bytes(), disk };
    KvTier::open(&options, &layout(), &fingerprint(revision), BlockRows::Layers)
}

#[test]
fn what_the_pool_lost_comes_back_from_host_memory() {
    let mut rig = Rig::new(open(None, 16, 1).expect("no disk to fail"));
    assert_eq!(rig.run(&prompt(1, 6)), 0);
    assert_eq!(rig.run(&prompt(2, 6)), 0);
    assert_eq!(rig.run(&prompt(1, 6)), 6);
    assert_eq!(rig.run(&prompt(2, 6)), 6);
    assert!(rig.blocks.restored().host > 0 && rig.blocks.restored().disk == 0);
    assert_eq!(rig.tier.stats().corrupt, 0);
}

#[test]
fn without_memory_there_is_no_tier() {
    let mut rig = Rig::new(KvTier::none());
    rig.run(&prompt(1, 6));
    rig.run(&prompt(2, 6));
    assert!(rig.run(&prompt(1, 6)) < 6);
    assert_eq!((rig.tier.blocks_max(), rig.tier.stats()), (0, TierStats::default()));
}

#[test]
fn damaged_memory_is_a_miss() {
    let mut rig = Rig::new(open(None, 16, 1).expect("no disk to fail"));
    rig.run(&prompt(1, 6));
    rig.run(&prompt(2, 8));
    let missing = rig.blocks.missing(1, &prompt(1, 6), 6);
    assert_eq!(missing.len(), 6);
    rig.tier.host.damage(&missing[2]);
    assert_eq!(rig.run(&prompt(1, 6)), 2);
    assert_eq!(rig.tier.stats().corrupt, 1);
    // What was computed anew takes its place.
    rig.run(&prompt(2, 8));
    assert_eq!(rig.run(&prompt(1, 6)), 6);
}

#[test]
fn a_restart_finds_what_was_written_under_its_own_fingerprint() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut rig = Rig::new(open(Some(folder.path()), 8, 1).expect("a disk"));
    rig.run(&prompt(1, 6));
    rig.run(&prompt(2, 6));
    // What nobody holds is offered at the end.
    rig.blocks.keep_cached(&mut rig.tier.behind(&mut rig.memory));
    rig.tier.close();

    let mut other = Rig::new(open(Some(folder.path()), 8, 2).expect("a disk"));
    other.fetch(&prompt(1, 6));
    assert_eq!(other.run(&prompt(1, 6)), 0, "another arithmetic");
    drop(other);

    let mut same = Rig::new(open(Some(folder.path()), 8, 1).expect("a disk"));
    for seed in [1, 2] {
        same.fetch(&prompt(seed, 6));
        // Half of the memory at once.
        assert!(same.run(&prompt(seed, 6)) >= 4);
    }
    assert!(same.blocks.restored().disk >= 8);
    assert_eq!(same.tier.stats().corrupt + same.tier.stats().disk_misses, 0);
}

#[test]
fn a_damaged_or_shortened_disk_is_a_miss() {
    for shorten in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut rig = Rig::new(open(Some(folder.path()), 16, 1).expect("a disk"));
        rig.run(&prompt(1, 6));
        rig.blocks.keep_cached(&mut rig.tier.behind(&mut rig.memory));
        rig.tier.close();
        let mut again = Rig::new(open(Some(folder.path()), 16, 1).expect("a disk"));
        // Behind its index' back, all of it.
        for file in std::fs::read_dir(folder.path()).expect("the folder").flatten() {
            let length = file.metadata().expect("a file").len();
            if shorten {
                let file = std::fs::OpenOptions::new().write(true).open(file.path()).expect("a file");
                file.set_len(length / 1000).expect("shorter");
            } else {
                let mut bytes = std::fs::read(file.path()).expect("a file");
                bytes.iter_mut().skip(5000).step_by(997).for_each(|byte| *byte ^= 0x40);
                std::fs::write(file.path(), bytes).expect("written");
            }
        }
        again.fetch(&prompt(1, 6));
        assert_eq!(again.run(&prompt(1, 6)), 0, "shortened: {shorten}");
        let stats = again.tier.stats();
        assert!(stats.disk_misses + stats.corrupt > 0, "{stats:?}");
        drop(again);
        // And whoever opens it so goes on without.
        let mut third = Rig::new(open(Some(folder.path()), 16, 1).expect("a disk"));
        third.fetch(&prompt(1, 6));
        third.run(&prompt(1, 6));
    }
}

#[test]
fn a_disk_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, b"no folder").expect("written");
    let error = open(Some(&file), 8, 1).err().expect("a file is no folder").to_string();
    assert!(error.contains(&file.display().to_string()), "{error}");
    let disk = DiskOptions { path: folder.path().to_owned(), bytes: 1 << 20 };
    let options = KvTierOptions { host_bytes: 1 << 20, disk: Some(disk) };
    let small = KvTier::open(&options, &layout(), &fingerprint(1), BlockRows::Layers).err();
    assert!(matches!(small, Some(DiskError::TooSmall { .. })));
}
