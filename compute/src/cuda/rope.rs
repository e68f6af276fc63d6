//! Rotation.

use super::launch::{Grid, launch, size};
use super::{Buffer, CudaError, Device, View, ViewMut};
use crate::RopeRows;

/// cos and sin of every position and pair, on the device.
pub struct RopeTable {
    angles: Buffer<f32>,
    pairs: usize,
    positions_max: usize,
}

impl RopeTable {
    /// Copies the first `positions_max` positions of a table: 512 bytes each for V3's 64 rope channels.
    ///
    /// # Panics
    /// If the table has fewer.
    pub fn new(device: &Device, table: &crate::RopeTable, positions_max: usize) -> Result<Self, CudaError> {
        let angles: Vec<f32> = (0..positions_max).flat_map(|p| table.at(p as u32).iter().copied()).collect();
        Ok(Self { angles: device.upload(&angles)?, pairs: table.pairs(), positions_max })
    }

    pub(super) fn pairs(&self) -> usize {
        self.pairs
    }

    /// The angles, and how many positions there are.
    pub(super) fn addresses(&self) -> (u64, u32) {
        (self.angles.view().address(), size(self.positions_max))
    }
}

impl Device {
    /// Rotates pairs `(x[2i], x[2i+1])` in place; they stay interleaved. `x` holds
    /// `positions.len() * rows.per_position` rows of `rows.stride` values. A position past the table ends the context.
    ///
    /// # Panics
    /// If `x` has another length or a row is too narrow.
    pub fn rope_interleaved(
        &self,
        x: &mut ViewMut<'_, f32>,
        rows: RopeRows,
        positions: View<'_, u32>,
        table: &RopeTable,
    ) -> Result<(), CudaError> {
        let count = positions.len() * rows.per_position;
        assert_eq!(x.len(), count * rows.stride, "rows to rotate");
        assert!(rows.offset + 2 * table.pairs <= rows.stride, "rotated values past their row");
        let len = count * table.pairs;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: a thread a pair; pairs lie inside their row, rows inside `x`; positions are checked in the kernel.
        unsafe {
            launch!(self, rope_interleaved, Grid::values(len);
                x.address(), size(rows.stride), size(rows.offset), size(rows.per_position),
                positions.address(), table.angles.view().address(), size(table.positions_max),
                size(table.pairs), len as u64)
        }
    }
}
