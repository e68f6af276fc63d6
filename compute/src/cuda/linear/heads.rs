//! Products by a matrix for each head.

use super::{CHANNELS, LinearKernel, PLAIN_ROWS, Product, TILES, tile_for};
use crate::WeightFormat;
use crate::cuda::launch::size;
use crate::cuda::matrix::HeadMatrices;
use crate::cuda::{CudaError, Device, Inputs, Outputs};

impl Device {
    /// The kernel that multiplies by each head's matrix.
    pub fn head_kernel(&self, w: &HeadMatrices) -> LinearKernel {
        let tiles = w.out_dim.is_multiple_of(CHANNELS) && w.in_dim.is_multiple_of(64);
        if self.has_wgmma && w.bf16 && tiles { LinearKernel::Wgmma } else { LinearKernel::Plain }
    }

    /// `y[m, h, o] = Σ_i x[m, h, i] · w[h, o, i]`: `m` rows of one vector per head. f32 inputs go to the plain kernel, bf16
    /// ones need [`LinearKernel::Wgmma`].
    ///
    /// # Panics
    /// If a length does not fit or the inputs' format does not go with the matrices.
    pub fn head_matmul(
        &self,
        w: &HeadMatrices,
        x: Inputs<'_>,
        m: usize,
        y: Outputs<'_, '_>,
    ) -> Result<(), CudaError> {
        let HeadMatrices { heads, out_dim, in_dim, .. } = *w;
        assert_eq!(x.rows(heads * in_dim), m, "input [{m}, {heads}, {in_dim}]");
        assert_eq!(y.len(), m * heads * out_dim, "output [{m}, {heads}, {out_dim}]");
        if m == 0 {
            return Ok(());
        }
        let product = Product {
            x_stride: size(heads * in_dim),
            x_head: size(in_dim),
            heads: size(heads),
            x_vector: u32::from(x.rows_by_four(in_dim)),
            y_bf16: u32::from(matches!(y, Outputs::Bf16(_))),
            ..Product::of(w.weights.view().address(), x.addresses().0, y.address(), m, out_dim, in_dim)
        };
        // SAFETY: lengths checked above.
        unsafe {
            match x {
                Inputs::F32(_) => {
                    let format = if w.bf16 { WeightFormat::Bf16 } else { WeightFormat::F32 };
                    self.plain_product(format, x, product, PLAIN_ROWS, m.div_ceil(PLAIN_ROWS), heads)
                }
                Inputs::Bf16(_) => {
                    assert_eq!(self.head_kernel(w), LinearKernel::Wgmma, "bf16 inputs");
                    let tile = TILES[tile_for(m)].0;
                    self.wgmma_product(WeightFormat::Bf16, product, tile, m.div_ceil(tile), heads)
                }
                Inputs::Fp8 { .. } => panic!("heads take f32 or bf16"),
            }
        }
    }
}
