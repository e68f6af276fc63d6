//! What may happen in the world, and how often.

use crate::world::BLOCKS;

/// How often each thing may happen.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Requests that decode admits, one after another.
    pub requests: u8,
    pub repeats: u8,
    pub losses: u8,
    pub cuts: u8,
    /// Requests that prefill gives up. The router may let go of any at any time.
    pub aborts: u8,
    pub decode_crashes: u8,
    pub prefill_crashes: u8,
    pub leases: u8,
    /// Half seconds in which nothing is heard: a missing answer is asked for, a lost path given up.
    pub waits: u8,
    /// Of each request: one row in each block.
    pub prompt_tokens: u8,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            requests: 1,
            repeats: 0,
            losses: 0,
            cuts: 0,
            aborts: 0,
            decode_crashes: 0,
            prefill_crashes: 0,
            leases: 0,
            waits: 0,
            prompt_tokens: BLOCKS as u8,
        }
    }
}

/// One thing that may happen next.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Decode reserves for the next request.
    Admit,
    /// The ticket of a request reaches prefill.
    Begin(usize),
    /// A dial comes to its end.
    Connect {
        succeeds: bool,
    },
    /// Prefill pushes the next thing of a request.
    Push(usize),
    /// A frame arrives; it may come again.
    Deliver {
        frame: usize,
        again: bool,
    },
    Lose(usize),
    /// The router lets go of a request at decode: cancelled, or done.
    Release(usize),
    /// Prefill gives a request up.
    Abort(usize),
    Cut,
    /// An end learns of a lost connection, and perhaps that the process at its other end is gone.
    Tell {
        index: usize,
        ended: bool,
    },
    CrashDecode,
    CrashPrefill,
    /// Nothing is heard for a lease.
    Lease,
    /// Nothing is heard for half a second.
    Wait,
}
