//! What has landed for one ticket: the arrival counter, and the checks that a piece passes before it counts.

use model::TokenId;

use crate::extent::{Extent, Violation};
use crate::wire::{self, Run};

/// Progress of one ticket. Order of arrival does not matter, and nothing counts twice.
pub(super) struct Arrival {
    extent: Extent,
    /// One bit for each piece.
    landed: Vec<u64>,
    /// Pieces whose bit is not set: the arrival counter.
    missing: usize,
    first_token: Option<TokenId>,
}

/// What one run has added.
#[derive(Default)]
pub(super) struct Landed {
    pub(super) pieces: u64,
    pub(super) bytes: u64,
    pub(super) duplicates: u64,
}

impl Arrival {
    pub(super) fn new(extent: Extent) -> Self {
        let pieces = extent.pieces();
        Self { extent, landed: vec![0; pieces.div_ceil(64)], missing: pieces, first_token: None }
    }

    /// The token to go on from, once everything is here.
    pub(super) fn complete(&self) -> Option<TokenId> {
        self.first_token.filter(|_| self.missing == 0)
    }

    /// Notes the first token.
    pub(super) fn finish(&mut self, token: TokenId) -> Result<(), Violation> {
        let known = *self.first_token.get_or_insert(token);
        if known == token { Ok(()) } else { Err(Violation::FirstToken { known: known.0, sent: token.0 }) }
    }

    /// Checks the whole run, then has those of its pieces written, as (block, bytes), that have not landed before.
    pub(super) fn land(
        &mut self,
        run: &Run,
        body: &[u8],
        mut write: impl FnMut(u32, &[u8]),
    ) -> Result<Landed, Violation> {
        self.extent.check(run, body.len())?;
        for ((block, piece), &expected) in pieces(self.extent, run, body).zip(&run.checksums) {
            if wire::checksum(piece) != expected {
                return Err(Violation::Checksum { layer: run.layer, block });
            }
        }
        let mut landed = Landed::default();
        for (block, piece) in pieces(self.extent, run, body) {
            let index = self.extent.index(run.layer, block);
            let (word, bit) = (&mut self.landed[index / 64], 1 << (index % 64));
            if *word & bit != 0 {
                landed.duplicates += 1;
                continue;
            }
            write(block, piece);
            *word |= bit;
            self.missing -= 1;
            landed.pieces += 1;
            landed.bytes += piece.len() as u64;
        }
        Ok(landed)
    }

    /// # Panics
    /// Where counter and bits have come apart.
    pub(super) fn check_invariants(&self) {
        let landed: u32 = self.landed.iter().map(|word| word.count_ones()).sum();
        assert_eq!(landed as usize + self.missing, self.extent.pieces(), "the arrival counter is off");
    }
}

/// The pieces of a checked run: block and bytes.
fn pieces<'a>(extent: Extent, run: &Run, body: &'a [u8]) -> impl Iterator<Item = (u32, &'a [u8])> + use<'a> {
    let mut rest = body;
    (run.first_block..run.first_block + run.blocks).map(move |block| {
        let (piece, behind) = rest.split_at(extent.piece_bytes(block));
        rest = behind;
        (block, piece)
    })
}
