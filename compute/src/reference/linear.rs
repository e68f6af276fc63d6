//! Matrix products.

use crate::{Activations, HeadMatrices, Matrix};

/// `y[m, n] = Σ_k x[m, k] · w[n, k]`, scales multiplied out, summed in f64.
pub fn linear(w: &Matrix, x: &Activations, y: &mut [f32]) {
    assert_eq!(w.cols(), x.channels());
    assert_eq!(y.len(), x.rows() * w.rows());
    let weights = w.to_f32();
    let k = w.cols();
    for row in 0..x.rows() {
        for n in 0..w.rows() {
            let sum: f64 = (0..k).map(|i| f64::from(x.value(row, i)) * f64::from(weights[n * k + i])).sum();
            y[row * w.rows() + n] = sum as f32;
        }
    }
}

/// `y[m, h, o] = Σ_i x[m, h, i] · w[h, o, i]`, summed in f64.
pub fn head_matmul(w: &HeadMatrices, x: &[f32], m: usize, y: &mut [f32]) {
    let (heads, outs, ins) = (w.heads(), w.out_dim(), w.in_dim());
    assert_eq!(x.len(), m * heads * ins);
    assert_eq!(y.len(), m * heads * outs);
    for row in 0..m {
        for head in 0..heads {
            let x = &x[(row * heads + head) * ins..][..ins];
            for out in 0..outs {
                let sum: f64 = x
                    .iter()
                    .enumerate()
                    .map(|(i, &x)| f64::from(x) * f64::from(w.weight(head, out, i)))
                    .sum();
                y[(row * heads + head) * outs + out] = sum as f32;
            }
        }
    }
}
