//! The middle of the last few values: what a few odd ones cannot move.

/// Values that count.
const KEPT: usize = 15;

/// The last few values.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Recent {
    values: [f64; KEPT],
    len: usize,
    next: usize,
}

impl Recent {
    /// Forgets the oldest for it, if need be.
    pub fn push(&mut self, value: f64) {
        self.values[self.next] = value;
        self.next = (self.next + 1) % KEPT;
        self.len = (self.len + 1).min(KEPT);
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The least. None of none.
    pub fn least(&self) -> Option<f64> {
        self.values[..self.len].iter().copied().min_by(f64::total_cmp)
    }

    /// The mean of what is left without the third that is least and the third that is most. None of none.
    pub fn middle(&self) -> Option<f64> {
        let mut values = self.values;
        let values = &mut values[..self.len];
        values.sort_unstable_by(f64::total_cmp);
        let middle = &values[self.len / 3..self.len - self.len / 3];
        (self.len > 0).then(|| middle.iter().sum::<f64>() / middle.len() as f64)
    }
}
