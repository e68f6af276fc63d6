//! A bit for each piece of a ticket: what has landed at one end, what has been sent at the other.

/// A set of pieces, numbered in the order layer, block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Pieces {
    words: Vec<u64>,
    pieces: usize,
    /// Not in the set: the arrival counter.
    missing: usize,
}

impl Pieces {
    /// None of `pieces`.
    pub(crate) fn none(pieces: usize) -> Self {
        Self { words: vec![0; pieces.div_ceil(64)], pieces, missing: pieces }
    }

    /// A set as it travels. `None`: it is not of `pieces`.
    pub(crate) fn from_words(words: Vec<u64>, pieces: usize) -> Option<Self> {
        let beyond =
            words.last().is_some_and(|last| !pieces.is_multiple_of(64) && last >> (pieces % 64) != 0);
        let held: usize = words.iter().map(|word| word.count_ones() as usize).sum();
        let fits = words.len() == pieces.div_ceil(64) && !beyond;
        fits.then(|| Self { words, pieces, missing: pieces - held })
    }

    /// As it travels.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether a piece is in the set.
    pub(crate) fn has(&self, index: usize) -> bool {
        self.words[index / 64] & (1 << (index % 64)) != 0
    }

    /// Puts a piece in, which may be there.
    pub(crate) fn insert(&mut self, index: usize) {
        if !self.has(index) {
            self.words[index / 64] |= 1 << (index % 64);
            self.missing -= 1;
        }
    }

    /// How many are not in the set.
    pub(crate) fn missing(&self) -> usize {
        self.missing
    }

    /// # Panics
    /// Where counter and bits have come apart.
    pub(crate) fn check_invariants(&self) {
        let held: u32 = self.words.iter().map(|word| word.count_ones()).sum();
        assert_eq!(held as usize + self.missing, self.pieces, "the arrival counter is off");
    }
}

#[cfg(test)]
mod tests {
    use super::Pieces;

    #[test]
    fn counts_each_piece_once() {
        let mut pieces = Pieces::none(70);
        for index in [0, 69, 69, 64] {
            pieces.insert(index);
        }
        pieces.check_invariants();
        assert_eq!((pieces.missing(), pieces.has(69), pieces.has(1)), (67, true, false));
        assert_eq!(Pieces::from_words(pieces.words().to_vec(), 70), Some(pieces));
    }

    #[test]
    fn a_set_of_other_pieces_is_none() {
        for (words, pieces) in [(vec![0], 65), (vec![0, 0], 64), (vec![1 << 3], 3), (vec![], 1)] {
            assert_eq!(Pieces::from_words(words.clone(), pieces), None, "{words:?} of {pieces}");
        }
    }
}
