//! What a ticket permits to be written: which blocks of which layers, and how long each piece is.
//!
//! A piece is one layer of one block: the unit that is checked, written and counted. Every piece of a ticket
//! holds `block_tokens` rows but those of the prompt's last block, which end with the prompt.

use model::KvLayout;

use crate::error::TransferError;
use crate::wire::Run;

/// The pieces of one ticket. Blocks are counted from the sequence's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Extent {
    pub(crate) first_block: u32,
    /// Behind the last block.
    pub(crate) end_block: u32,
    pub(crate) layers: u32,
    block_tokens: u32,
    /// Rows in the block before `end_block`.
    last_rows: u32,
    row_bytes: usize,
}

/// A frame that its ticket does not permit. Its text is the `detail` that the sender reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// No such layer.
    #[error("layer is {layer}, the ticket has {layers}")]
    Layer {
        /// As sent.
        layer: u32,
        /// Layers expected.
        layers: u32,
    },
    /// Not within the ticket's blocks, or none at all.
    #[error("blocks {first}..{first}+{blocks} are not within {permitted_first}..{permitted_end}")]
    Blocks {
        /// First block, as sent.
        first: u32,
        /// Number of blocks, as sent.
        blocks: u32,
        /// The ticket's first block.
        permitted_first: u32,
        /// Behind the ticket's last block.
        permitted_end: u32,
    },
    /// The run's last block has another number of rows.
    #[error("last_rows is {last_rows}, block {block} has {expected} rows")]
    LastRows {
        /// As sent.
        last_rows: u32,
        /// The run's last block.
        block: u32,
        /// Its rows.
        expected: u32,
    },
    /// The body is not as long as its pieces.
    #[error("the body has {bytes} bytes, its blocks have {expected}")]
    BodyBytes {
        /// As received.
        bytes: usize,
        /// By the layout.
        expected: usize,
    },
    /// Not one checksum for each block.
    #[error("{checksums} checksums for {blocks} blocks")]
    Checksums {
        /// As sent.
        checksums: usize,
        /// Blocks in the run.
        blocks: u32,
    },
    /// A piece is not what its sender read.
    #[error("checksum of layer {layer}, block {block} does not hold")]
    Checksum {
        /// The piece's layer.
        layer: u32,
        /// The piece's block.
        block: u32,
    },
    /// Permitted, but the receiver's books have no such block: their fault, not the sender's.
    #[error("block {block} has no place")]
    Unplaced {
        /// The block.
        block: u32,
    },
    /// Of a path that no resume has opened.
    #[error("generation is {sent}, the ticket is at {known}")]
    Generation {
        /// The ticket's.
        known: u32,
        /// The frame's.
        sent: u32,
    },
    /// A second first token, and another one.
    #[error("first_token was {known}, now it is {sent}")]
    FirstToken {
        /// What came first.
        known: u32,
        /// What came now.
        sent: u32,
    },
}

impl Extent {
    /// What is missing of a prompt whose blocks before `first_block` are there.
    pub(crate) fn new(
        layout: &KvLayout,
        first_block: usize,
        prompt_tokens: usize,
    ) -> Result<Self, TransferError> {
        let refused = || TransferError::Reservation { prompt_tokens, first_block };
        let end_block = layout.blocks_for(prompt_tokens);
        if prompt_tokens == 0 || u32::try_from(prompt_tokens).is_err() || first_block > end_block {
            return Err(refused());
        }
        let before_last = (end_block - 1) * layout.block_tokens;
        let narrow = |value: usize| u32::try_from(value).map_err(|_| refused());
        Ok(Self {
            first_block: narrow(first_block)?,
            end_block: narrow(end_block)?,
            layers: narrow(layout.layers)?,
            block_tokens: narrow(layout.block_tokens)?,
            last_rows: narrow(prompt_tokens - before_last)?,
            row_bytes: layout.row_bytes(),
        })
    }

    /// Blocks in each layer.
    pub(crate) fn blocks(&self) -> u32 {
        self.end_block - self.first_block
    }

    /// Pieces in all.
    pub(crate) fn pieces(&self) -> usize {
        self.blocks() as usize * self.layers as usize
    }

    /// A piece's place in the order layer, block.
    pub(crate) fn index(&self, layer: u32, block: u32) -> usize {
        layer as usize * self.blocks() as usize + (block - self.first_block) as usize
    }

    /// Bytes of a layer of `block`.
    pub(crate) fn piece_bytes(&self, block: u32) -> usize {
        self.rows(block) as usize * self.row_bytes
    }

    /// Bytes expected in each layer.
    pub(crate) fn bytes_per_layer(&self) -> u64 {
        self.run_bytes(self.first_block, self.end_block) as u64
    }

    /// Checks that a run lies within the ticket and that its body and checksums are as many as it says.
    pub(crate) fn check(&self, run: &Run, body_bytes: usize) -> Result<(), Violation> {
        if run.layer >= self.layers {
            return Err(Violation::Layer { layer: run.layer, layers: self.layers });
        }
        let end = run.first_block.checked_add(run.blocks).filter(|&end| end <= self.end_block);
        let (Some(end), true) = (end, run.blocks > 0 && run.first_block >= self.first_block) else {
            return Err(Violation::Blocks {
                first: run.first_block,
                blocks: run.blocks,
                permitted_first: self.first_block,
                permitted_end: self.end_block,
            });
        };
        let block = end - 1;
        if run.last_rows != self.rows(block) {
            let expected = self.rows(block);
            return Err(Violation::LastRows { last_rows: run.last_rows, block, expected });
        }
        let expected = self.run_bytes(run.first_block, end);
        if body_bytes != expected {
            return Err(Violation::BodyBytes { bytes: body_bytes, expected });
        }
        if run.checksums.len() != run.blocks as usize {
            return Err(Violation::Checksums { checksums: run.checksums.len(), blocks: run.blocks });
        }
        Ok(())
    }

    /// Only the prompt's last block can be partial, so the others need no look at where it is.
    fn run_bytes(&self, first: u32, end: u32) -> usize {
        if first == end {
            return 0;
        }
        (end - first - 1) as usize * self.block_tokens as usize * self.row_bytes + self.piece_bytes(end - 1)
    }

    fn rows(&self, block: u32) -> u32 {
        if block + 1 == self.end_block { self.last_rows } else { self.block_tokens }
    }
}

#[cfg(test)]
mod tests;
