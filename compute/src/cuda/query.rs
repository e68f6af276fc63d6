//! Projected queries to what attention takes.

use super::launch::{Grid, launch, size};
use super::{CudaError, Device, RopeTable, View, ViewMut};

/// Widths of projected queries `[m, heads, nope + rope]`.
#[derive(Clone, Copy, Debug)]
pub struct QueryShape {
    /// Heads.
    pub heads: usize,
    /// Channels that are taken into the latent space.
    pub nope: usize,
    /// Channels that are rotated.
    pub rope: usize,
}

/// Where the two parts go: `[m, heads, nope]` and `[m, heads, rope]`.
pub enum QueryParts<'a, 'b> {
    /// As they are.
    F32(&'a mut ViewMut<'b, f32>, &'a mut ViewMut<'b, f32>),
    /// Rounded to bf16.
    Bf16(&'a mut ViewMut<'b, u16>, &'a mut ViewMut<'b, u16>),
}

impl Device {
    /// Splits queries `q` `[m, heads, nope + rope]`, and rotates the rotary part by its row's position.
    ///
    /// # Panics
    /// If a length does not fit or a width is odd.
    pub fn split_queries(
        &self,
        q: View<'_, f32>,
        shape: QueryShape,
        positions: View<'_, u32>,
        table: &RopeTable,
        parts: QueryParts<'_, '_>,
    ) -> Result<(), CudaError> {
        let QueryShape { heads, nope, rope } = shape;
        let rows = positions.len() * heads;
        assert_eq!(q.len(), rows * (nope + rope), "queries");
        assert!(nope.is_multiple_of(2) && rope == 2 * table.pairs(), "widths in pairs, as the table's");
        let lengths = match &parts {
            QueryParts::F32(a, b) => (a.len(), b.len()),
            QueryParts::Bf16(a, b) => (a.len(), b.len()),
        };
        assert_eq!(lengths, (rows * nope, rows * rope), "room for both parts");
        let len = q.len() / 2;
        if len == 0 {
            return Ok(());
        }
        let grid = Grid::values(len);
        let (q, positions, heads, nope, rope) =
            (q.address(), positions.address(), size(heads), size(nope), size(rope));
        let (angles, positions_max) = table.addresses();
        // SAFETY: a thread a pair; lengths checked above, positions in the kernel.
        unsafe {
            match parts {
                QueryParts::F32(a, b) => launch!(self, split_queries_f32, grid;
                    q, heads, nope, rope, positions, angles, positions_max, len as u64, a.address(), b.address()),
                QueryParts::Bf16(a, b) => launch!(self, split_queries_bf16, grid;
                    q, heads, nope, rope, positions, angles, positions_max, len as u64, a.address(), b.address()),
            }
        }
    }
}
