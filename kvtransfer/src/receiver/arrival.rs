//! What has landed for one ticket: the arrival counter, and the checks that each piece passes.

use fabric::Body;
use model::TokenId;
use proto::ticket::TicketId;

use super::BlockSink;
use crate::extent::{Extent, Violation};
use crate::pieces::Pieces;
use crate::wire::Run;

/// Progress of one ticket. Order of arrival does not matter, and nothing counts twice.
#[derive(Clone, Hash)]
pub(super) struct Arrival {
    extent: Extent,
    landed: Pieces,
    first_token: Option<TokenId>,
}

/// What one run has added.
#[derive(Default)]
pub(super) struct Landed {
    pub(super) pieces: u64,
    pub(super) bytes: u64,
    pub(super) duplicates: u64,
}

/// Where the pieces of one run go.
pub(super) struct Place<'a> {
    pub(super) sink: &'a mut dyn BlockSink,
    pub(super) ticket: TicketId,
    pub(super) layer: u32,
}

impl Arrival {
    pub(super) fn new(extent: Extent) -> Self {
        Self { extent, landed: Pieces::none(extent.pieces()), first_token: None }
    }

    /// The token to go on from, once everything is here.
    pub(super) fn complete(&self) -> Option<TokenId> {
        self.first_token.filter(|_| self.landed.missing() == 0)
    }

    /// What need not be sent again.
    pub(super) fn landed(&self) -> &Pieces {
        &self.landed
    }

    /// Notes the first token.
    pub(super) fn finish(&mut self, token: TokenId) -> Result<(), Violation> {
        let known = *self.first_token.get_or_insert(token);
        if known == token { Ok(()) } else { Err(Violation::FirstToken { known: known.0, sent: token.0 }) }
    }

    /// Checks the whole run, then copies those of its pieces to their places that have not landed before, and checks
    /// each copy, which nobody else can change any more. A damaged one lies in a block of a ticket that ends for it:
    /// nobody reads the block before it has been written anew, and a piece that has landed is never written again.
    pub(super) fn land(
        &mut self,
        run: &Run,
        body: &Body,
        place: &mut Place<'_>,
    ) -> Result<Landed, Violation> {
        self.extent.check(run, body.len())?;
        let (mut landed, mut start) = (Landed::default(), 0);
        for (block, &expected) in (run.first_block..run.first_block + run.blocks).zip(&run.checksums) {
            let (at, bytes) = (start, self.extent.piece_bytes(block));
            start += bytes;
            let index = self.extent.index(run.layer, block);
            if self.landed.has(index) {
                landed.duplicates += 1;
                continue;
            }
            let into = place.sink.place(place.ticket, block, place.layer, bytes);
            let into = into.filter(|into| into.len() == bytes).ok_or(Violation::Unplaced { block })?;
            if body.copy_summed(at, into) != Ok(expected) {
                return Err(Violation::Checksum { layer: run.layer, block });
            }
            self.landed.insert(index);
            landed.pieces += 1;
            landed.bytes += bytes as u64;
        }
        Ok(landed)
    }

    /// # Panics
    /// Where counter and bits have come apart.
    pub(super) fn check_invariants(&self) {
        self.landed.check_invariants();
    }
}
