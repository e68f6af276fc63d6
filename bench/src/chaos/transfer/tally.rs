//! What histories add up to.

use std::fmt;
use std::time::Duration;

/// Objections kept: the first ones say it all.
const OBJECTIONS_MAX: usize = 5;

/// Counts over histories.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Histories run.
    pub histories: u64,
    /// Tickets issued: hand-offs begun.
    pub issued: u64,
    /// Hand-offs that decode committed.
    pub committed: u64,
    /// Tickets that ended by abort, loss, refusal or lease.
    pub ended: u64,
    /// Tickets whose end came from the router: cancelled, or noticed to be dead.
    pub released: u64,
    /// Pushes for dead tickets or other incarnations, stopped by the fence.
    pub fenced: u64,
    /// Hand-offs that went on on another path, or after an answer was missing.
    pub resumed: u64,
    /// Pieces that came again.
    pub duplicates: u64,
    /// Faults by kind.
    pub faults: [u64; Fault::ALL.len()],
    /// Bytes in a committed sequence that are not its own.
    pub foreign_bytes: u64,
    /// Blocks that nobody gave back.
    pub leaked_blocks: u64,
    /// Times taken from a fault that met a hand-off: to one end's having forgotten or committed it, or to the next fault.
    pub met_by_fault: u64,
    /// The longest of them.
    pub baseline_max: Duration,
    /// The longest from the first fault to an end, whatever came between; and how many faults had met that hand-off.
    pub prolonged_max: (Duration, u32),
    /// What the oracle objects to.
    pub objections: Vec<String>,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A worker's process ends, and another one starts in its place.
    Kill,
    /// A worker stops, and goes on after a while.
    Pause,
    /// A client goes away, or prefill gives up.
    Abort,
    /// Nothing passes between two workers for a while.
    Partition,
    /// A connection breaks.
    Reset,
    /// A frame takes its time.
    Delay,
    /// A frame comes twice.
    Repeat,
    /// A frame's body is damaged.
    Damage,
    /// A frame is lost, or all for a while, and their connection is not: what no transport here does.
    Lose,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Fault; 9] = [
        Self::Kill,
        Self::Pause,
        Self::Abort,
        Self::Partition,
        Self::Reset,
        Self::Delay,
        Self::Repeat,
        Self::Damage,
        Self::Lose,
    ];
}

impl Tally {
    /// Notes a fault.
    pub fn fault(&mut self, fault: Fault) {
        self.faults[fault as usize] += 1;
    }

    /// Notes what must not be.
    pub fn object(&mut self, what: impl FnOnce() -> String) {
        if self.objections.len() < OBJECTIONS_MAX {
            self.objections.push(what());
        }
    }

    /// Adds another one's counts.
    pub fn add(&mut self, other: Self) {
        self.histories += other.histories;
        self.issued += other.issued;
        self.committed += other.committed;
        self.ended += other.ended;
        self.released += other.released;
        self.fenced += other.fenced;
        self.resumed += other.resumed;
        self.duplicates += other.duplicates;
        for (count, more) in self.faults.iter_mut().zip(other.faults) {
            *count += more;
        }
        self.foreign_bytes += other.foreign_bytes;
        self.leaked_blocks += other.leaked_blocks;
        self.met_by_fault += other.met_by_fault;
        self.baseline_max = self.baseline_max.max(other.baseline_max);
        self.prolonged_max = self.prolonged_max.max(other.prolonged_max);
        for objection in other.objections {
            self.object(|| objection);
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} hand-offs in {} histories", self.issued, self.histories)?;
        writeln!(f, "  committed            {}", self.committed)?;
        writeln!(
            f,
            "  ended otherwise      {} by the machines, {} by the router",
            self.ended, self.released
        )?;
        write!(f, "  faults              ")?;
        for fault in Fault::ALL {
            write!(f, " {} {fault:?}", self.faults[fault as usize])?;
        }
        writeln!(f)?;
        writeln!(f, "  pushes fenced off    {}", self.fenced)?;
        writeln!(f, "  resumed              {}", self.resumed)?;
        writeln!(f, "  pieces repeated      {}", self.duplicates)?;
        writeln!(f, "  foreign bytes        {}", self.foreign_bytes)?;
        writeln!(f, "  leaked blocks        {}", self.leaked_blocks)?;
        let (met, longest, (prolonged, faults)) = (self.met_by_fault, self.baseline_max, self.prolonged_max);
        writeln!(
            f,
            "  back at the baseline {longest:.1?} after a fault, or hit by the next one, at most: {met} times"
        )?;
        write!(f, "  longest after the first of a hand-off's faults {prolonged:.1?}, with {faults} of them")
    }
}
