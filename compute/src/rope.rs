//! Rotary tables: cos and sin of `position · frequency`, the angle in f64, rounded once to f32.

use std::sync::OnceLock;

/// Positions computed at a time when a table grows.
const CHUNK: usize = 1024;

/// cos and sin for every (position, pair), times a gain (YaRN's mscale ratio; 1 for released checkpoints).
///
/// Filled in steps of 1,024 positions when one is first used: a 160 k context would take 40 MB and 0.2 s at start,
/// and few sequences go there. A filled step never moves or changes.
pub struct RopeTable {
    frequencies: Vec<f64>,
    gain: f64,
    positions_max: usize,
    chunks: Vec<OnceLock<Box<[f32]>>>,
}

impl RopeTable {
    /// A table for `frequencies.len()` pairs and positions `0..positions_max`; frequencies in radians per position.
    pub fn new(frequencies: &[f64], gain: f64, positions_max: usize) -> Self {
        let chunks = (0..positions_max.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        Self { frequencies: frequencies.to_vec(), gain, positions_max, chunks }
    }

    /// Number of pairs rotated; the rope part of a row is twice as wide.
    pub fn pairs(&self) -> usize {
        self.frequencies.len()
    }

    /// First position the table does not have.
    pub fn positions_max(&self) -> usize {
        self.positions_max
    }

    /// `[cos, sin]` of each pair at `position`, interleaved: `2 * pairs` values.
    ///
    /// # Panics
    /// If `position` is not below [`Self::positions_max`].
    pub fn at(&self, position: u32) -> &[f32] {
        let position = position as usize;
        assert!(position < self.positions_max, "position {position} past the table's {}", self.positions_max);
        let width = 2 * self.pairs();
        let chunk = self.chunks[position / CHUNK].get_or_init(|| self.chunk(position / CHUNK * CHUNK));
        &chunk[position % CHUNK * width..][..width]
    }

    fn chunk(&self, first: usize) -> Box<[f32]> {
        let mut chunk = Vec::with_capacity(CHUNK * 2 * self.pairs());
        for position in first..first + CHUNK {
            for frequency in &self.frequencies {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                chunk.push((cos * self.gain) as f32);
                chunk.push((sin * self.gain) as f32);
            }
        }
        chunk.into()
    }
}

/// Where in a buffer the values to rotate lie: row `r` of position `r / per_position` starts at `r * stride + offset`
/// and is `2 * pairs` wide. Queries `[m, heads, nope + rope]` are `{ per_position: heads, stride: nope + rope,
/// offset: nope }`, the shared key `[m, rope]` is `{ 1, rope, 0 }`.
#[derive(Clone, Copy, Debug)]
pub struct RopeRows {
    /// Rows that share a position (heads).
    pub per_position: usize,
    /// Values from one row to the next.
    pub stride: usize,
    /// First rotated value in a row.
    pub offset: usize,
}
