//! Who gets which token: the pure half of a dispatch.
//!
//! A batch of (tokens × top-k) expert choices becomes one parcel per destination worker. A parcel
//! names each of its tokens once, in the batch's order, with all of that token's experts on that
//! worker, in top-k order; and it remembers which row of the combine's output each (token, expert)
//! vector belongs to. Invariant: the slots of all parcels are `0..tokens*topk`, each once.

/// One destination worker's part of a batch. Its buffers are reused from batch to batch.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Parcel {
    /// Rows of the batch to send, ascending.
    pub tokens: Vec<u32>,
    /// Experts of those tokens, flattened.
    pub experts: Vec<u32>,
    /// How many of `experts` belong to each token.
    pub experts_per_token: Vec<u32>,
    /// For each entry of `experts`, its row in the combine's output: `token * topk + k`.
    pub slots: Vec<u32>,
}

impl Parcel {
    fn clear(&mut self) {
        self.tokens.clear();
        self.experts.clear();
        self.experts_per_token.clear();
        self.slots.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    fn push(&mut self, token: u32, expert: u16, slot: u32) {
        if self.tokens.last() == Some(&token) {
            if let Some(count) = self.experts_per_token.last_mut() {
                *count += 1;
            }
        } else {
            self.tokens.push(token);
            self.experts_per_token.push(1);
        }
        self.experts.push(u32::from(expert));
        self.slots.push(slot);
    }
}

/// An expert id that the placement does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnknownExpert(pub u16);

/// Fills `parcels` (one per rank) from `expert_ids`, `[tokens, topk]`; `owners` maps expert to rank.
pub(crate) fn pack(
    owners: &[u16],
    expert_ids: &[u16],
    topk: usize,
    parcels: &mut [Parcel],
) -> Result<(), UnknownExpert> {
    parcels.iter_mut().for_each(Parcel::clear);
    for (slot, &expert) in expert_ids.iter().enumerate() {
        let rank = owners.get(usize::from(expert)).ok_or(UnknownExpert(expert))?;
        let parcel = parcels.get_mut(usize::from(*rank)).ok_or(UnknownExpert(expert))?;
        parcel.push((slot / topk) as u32, expert, slot as u32);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(owners: &[u16], ids: &[u16], topk: usize, workers: usize) -> Vec<Parcel> {
        let mut parcels = vec![Parcel::default(); workers];
        pack(owners, ids, topk, &mut parcels).expect("known experts");
        parcels
    }

    #[test]
    fn a_token_goes_once_to_each_of_its_workers() {
        let parcels = packed(&[0, 0, 1, 1], &[3, 0, 2, 3, 1, 0], 2, 3);
        let first = Parcel {
            tokens: vec![0, 2],
            experts: vec![0, 1, 0],
            experts_per_token: vec![1, 2],
            slots: vec![1, 4, 5],
        };
        let second = Parcel {
            tokens: vec![0, 1],
            experts: vec![3, 2, 3],
            experts_per_token: vec![1, 2],
            slots: vec![0, 2, 3],
        };
        assert_eq!(parcels, [first, second, Parcel::default()]);
    }

    #[test]
    fn experts_and_ranks_outside_the_table_are_named() {
        let mut parcels = vec![Parcel::default(); 1];
        assert_eq!(pack(&[0], &[1], 1, &mut parcels), Err(UnknownExpert(1)));
        assert_eq!(pack(&[1], &[0], 1, &mut parcels), Err(UnknownExpert(0)));
    }

    proptest! {
        #[test]
        fn every_pair_is_sent_once_to_its_owner(
            owners in prop::collection::vec(0u16..5, 1..40),
            choices in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
            topk in 1usize..9,
        ) {
            let tokens = choices.len() / topk;
            let ids: Vec<u16> =
                choices[..tokens * topk].iter().map(|choice| choice.index(owners.len()) as u16).collect();
            let mut slots = Vec::new();
            for (rank, parcel) in packed(&owners, &ids, topk, 5).into_iter().enumerate() {
                prop_assert!(parcel.tokens.is_sorted_by(|a, b| a < b));
                prop_assert_eq!(parcel.tokens.len(), parcel.experts_per_token.len());
                let repeated = parcel.tokens.iter().zip(&parcel.experts_per_token);
                let token_of_pair: Vec<u32> =
                    repeated.flat_map(|(&token, &count)| std::iter::repeat_n(token, count as usize)).collect();
                prop_assert_eq!(token_of_pair.len(), parcel.experts.len());
                for ((token, &expert), &slot) in token_of_pair.iter().zip(&parcel.experts).zip(&parcel.slots) {
                    prop_assert_eq!(usize::from(owners[expert as usize]), rank);
                    prop_assert_eq!(slot as usize / topk, *token as usize);
                    prop_assert_eq!(u32::from(ids[slot as usize]), expert);
                }
                slots.extend(parcel.slots);
            }
            slots.sort_unstable();
            prop_assert_eq!(slots, (0..(tokens * topk) as u32).collect::<Vec<_>>());
        }
    }
}
