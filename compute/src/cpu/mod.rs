//! The CPU as a device: a thread pool, an instruction set, and the operators, a file each.

mod disjoint;
mod elementwise;
mod gumbel;
mod isa;
mod kv_write;
mod linear;
mod logits;
mod mla_attention;
mod norm;
mod pool;
mod probe;
mod quantise;
mod route;
mod scratch;
mod vector;

use std::ops::Range;

pub(crate) use disjoint::Disjoint;
pub use gumbel::{GUMBEL_TOKENS, GumbelKey};
pub use isa::Isa;
pub use linear::{InputRows, LinearJob};
pub use logits::{WEIGHT_BLOCK, WeightBlock};
pub use pool::ThreadPool;
pub(crate) use quantise::ScaleRule;

/// Values or multiply-adds below which a loop is not worth waking another thread for (about 10 µs of one core).
const SERIAL_MAX: usize = 128 * 1024;

/// Threads and instruction set; every operator is a method.
///
/// Slices of the wrong length are a programming error and panic; nothing that comes from a network or a file reaches
/// an operator unchecked.
pub struct Cpu {
    pool: ThreadPool,
    isa: Isa,
}

impl Cpu {
    /// A device of `threads` threads (the calling one included) with the best instruction set of the machine.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Self::new`] with a given instruction set, or the best below it that the machine has.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let isa = Isa::available().into_iter().filter(|&i| i <= isa).max().unwrap_or(Isa::Portable);
        Self { pool: ThreadPool::new(threads, "compute"), isa }
    }

    /// The instruction set in use; its name is part of the execution fingerprint.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The thread pool.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Runs tasks on the pool, or here if all of them together are small. The bits of a result do not depend on which.
    pub(crate) fn divide(&self, tasks: usize, work: usize, task: &(dyn Fn(usize) + Sync)) {
        if work < SERIAL_MAX {
            (0..tasks).for_each(task);
        } else {
            self.pool.run(tasks, task);
        }
    }
}

/// The `i`-th part of `size` (the last may be shorter) of `0..len`.
pub(crate) fn part(i: usize, size: usize, len: usize) -> Range<usize> {
    i * size..((i + 1) * size).min(len)
}
