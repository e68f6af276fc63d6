//! Norm, SwiGLU's product and rotation.

use crate::{RopeRows, RopeTable};

/// `y = x / sqrt(mean(x²) + eps) · w` for each of the rows of `w.len()` values.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    if w.is_empty() {
        return;
    }
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let factor = 1.0 / (squares / w.len() as f64 + f64::from(eps)).sqrt();
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = (f64::from(x) * factor * f64::from(w)) as f32;
        }
    }
}

/// `out = silu(gate) · up`, `silu(g) = g / (1 + e^-g)`.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && up.len() == out.len());
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        let gate = f64::from(gate);
        *out = (gate / (1.0 + (-gate).exp()) * f64::from(up)) as f32;
    }
}

/// Rotates pair `(x[2i], x[2i+1])` of every row by the angle of (position, i), in place.
pub fn rope_interleaved(x: &mut [f32], rows: RopeRows, positions: &[u32], table: &RopeTable) {
    assert_eq!(x.len(), positions.len() * rows.per_position * rows.stride);
    for (row, x) in x.chunks_exact_mut(rows.stride).enumerate() {
        let angles = table.at(positions[row / rows.per_position]);
        let x = &mut x[rows.offset..][..2 * table.pairs()];
        for (x, angle) in x.chunks_exact_mut(2).zip(angles.chunks_exact(2)) {
            let (a, b) = (f64::from(x[0]), f64::from(x[1]));
            let (cos, sin) = (f64::from(angle[0]), f64::from(angle[1]));
            x[0] = (a * cos - b * sin) as f32;
            x[1] = (a * sin + b * cos) as f32;
        }
    }
}
