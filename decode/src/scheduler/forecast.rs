//! How many blocks the sequences will hold at the worst moment, if each ends when it is expected to: what admission keeps
//! below the pool's high-water mark, so that pauses for memory stay rare.
//!
//! Every sequence grows by a token a step until its expected end and gives its blocks back then; the sum has its peaks
//! just before an end. Those that take turns in steps all slow down alike, which moves the peaks and not their height.

/// One sequence's expected future.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Outlook {
    /// Tokens until its expected end.
    pub(super) left: usize,
    /// Tokens in blocks that it holds alone, by now.
    pub(super) own_tokens: usize,
}

/// The most blocks held at once, `common` ones that several sequences list included. Reorders `outlooks`; O(n log n).
pub(super) fn peak_blocks(outlooks: &mut [Outlook], common: usize, block_tokens: usize) -> usize {
    // The last to end first: whoever stands before one is still there when it ends.
    outlooks.sort_unstable_by(|a, b| b.cmp(a));
    let (mut own_tokens, mut peak) = (0, 0);
    for (before, outlook) in outlooks.iter().enumerate() {
        let alive = before + 1;
        own_tokens += outlook.own_tokens;
        // The last block of each is half full on average.
        let tokens = own_tokens + alive * outlook.left + alive * block_tokens / 2;
        peak = peak.max(tokens.div_ceil(block_tokens));
    }
    common + peak
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peak(outlooks: &[(usize, usize)]) -> usize {
        let mut outlooks: Vec<_> =
            outlooks.iter().map(|&(left, own_tokens)| Outlook { left, own_tokens }).collect();
        peak_blocks(&mut outlooks, 0, 64)
    }

    #[test]
    fn what_ends_early_makes_room_for_what_ends_late() {
        assert_eq!(peak(&[]), 0);
        assert_eq!(peak(&[(64, 64)]), 3, "two blocks and half of the next");
        assert_eq!(peak(&[(640, 0)]), 11);
        // The short one is gone when the long one is at its largest.
        assert_eq!(peak(&[(640, 0), (64, 0)]), 11);
        assert_eq!(peak(&[(640, 0), (640, 0)]), 21);
        // It holds much now: then the worst moment is its end, not the other's.
        assert_eq!(peak(&[(640, 0), (64, 6400)]), 103);
    }

    #[test]
    fn it_is_never_below_a_walk_through_every_step() {
        let outlooks = [(300, 1000), (10, 64), (77, 3), (300, 0), (1, 900), (128, 128)];
        let walk = (0..=300).map(|step| {
            let alive = outlooks.iter().filter(|&&(left, _)| left >= step);
            alive.map(|&(_, own)| own + step).sum::<usize>() / 64
        });
        assert!(peak(&outlooks) >= walk.max().unwrap_or(0));
    }
}
