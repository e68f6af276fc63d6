//! Products by a matrix for each head.

use super::{CHANNELS, LinearKernel, PLAIN_ROWS, Product, TILES, short_shared, tile_for};
use crate::cuda::launch::{Argument, Grid, launch, size};
use crate::cuda::matrix::HeadMatrices;
use crate::cuda::{
    Activations, CudaError, Device, InputFormat, Inputs, Outputs, QueryParts, QueryShape, RopeTable, View,
    ViewMut,
};
use crate::fp8::{self, BLOCK};
use crate::{ScaleFormat, WeightFormat};

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
        let HeadMatrices { heads, out_dim, .. } = *w;
        assert_eq!(y.len(), m * heads * out_dim, "output [{m}, {heads}, {out_dim}]");
        let y_bf16 = u32::from(matches!(y, Outputs::Bf16(_)));
        let product = Product { y: y.address(), y_bf16, ..Product::of_heads(w, x, m) };
        if m == 0 {
            return Ok(());
        }
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

    /// [`Self::split_queries`] of `q` into bf16, and [`Self::head_matmul`] of the first part into `latent`: one launch for few rows, else
    /// by way of `nope`. The same bits.
    ///
    /// # Panics
    /// As either.
    pub fn absorb_queries<'b>(
        &self,
        w: &HeadMatrices,
        q: View<'_, f32>,
        shape: QueryShape,
        (positions, table): (View<'_, u32>, &RopeTable),
        (nope, rope): (&mut ViewMut<'b, u16>, &mut ViewMut<'b, u16>),
        latent: &mut ViewMut<'_, u16>,
    ) -> Result<(), CudaError> {
        let HeadMatrices { heads, out_dim, in_dim, .. } = *w;
        let m = positions.len();
        assert_eq!((shape.heads, shape.nope), (heads, in_dim), "queries of these heads");
        let by_four = shape.rope.is_multiple_of(4) && q.address().is_multiple_of(16);
        let fits = self.head_kernel(w) == LinearKernel::Wgmma && in_dim <= 2 * 64 && by_four;
        if m == 0 || m > FEW_ROWS || !fits {
            self.split_queries(q, shape, positions, table, QueryParts::Bf16(nope, rope))?;
            return self.head_matmul(w, Inputs::Bf16(nope.view()), m, Outputs::Bf16(latent));
        }
        assert_eq!(q.len(), m * heads * (in_dim + shape.rope), "queries");
        assert_eq!((rope.len(), latent.len()), (m * heads * shape.rope, m * heads * out_dim), "room");
        assert_eq!(shape.rope, 2 * table.pairs(), "widths as the table's");
        let product = Product {
            heads: size(heads),
            y_bf16: 1,
            ..Product::of(w.weights.view().address(), q.address(), latent.address(), m, out_dim, in_dim)
        };
        let (angles, positions_max) = table.addresses();
        let queries = Queries {
            q: q.address(),
            positions: positions.address(),
            table: angles,
            rope: rope.address(),
            rope_dim: size(shape.rope),
            positions_max,
        };
        let blocks = (size(out_dim / CHANNELS), 1, size(heads));
        let grid = Grid { blocks, threads: 128, shared: short_shared(0, in_dim) };
        // SAFETY: a thread block for 64 channels of a head, all rows; lengths checked above, positions in the kernel.
        unsafe { launch!(self, linear_bf16_absorb_16, grid; product, queries) }
    }

    /// [`Self::head_matmul`] of bf16 inputs, rounded into `out` `[m, heads * out_dim]`: the same bits as rounding what it gives. In
    /// one launch for few rows and FP8, else by way of `values`.
    ///
    /// # Panics
    /// As [`Self::head_matmul`] and [`Self::prepare`].
    pub fn head_matmul_rounded(
        &self,
        w: &HeadMatrices,
        x: View<'_, u16>,
        m: usize,
        values: &mut ViewMut<'_, f32>,
        out: &mut Activations,
    ) -> Result<(), CudaError> {
        let HeadMatrices { heads, out_dim, .. } = *w;
        let x = Inputs::Bf16(x);
        let fits =
            (1..=FEW_ROWS).contains(&m) && out_dim == BLOCK && self.head_kernel(w) == LinearKernel::Wgmma;
        let (InputFormat::Fp8(format), true) = (out.format(), fits) else {
            self.head_matmul(w, x, m, Outputs::F32(values))?;
            return self.prepare(values.view(), out);
        };
        assert_eq!(out.channels(), heads * out_dim, "channels out");
        // Slicing checks that there is room.
        out.inputs(m);
        let product = Product::of_heads(w, x, m);
        assert!(product.x.is_multiple_of(16), "inputs start at a multiple of 16 bytes");
        let rounded = Rounded {
            codes: out.codes.view().address(),
            scales: out.scales.view().address(),
            power_of_two: u32::from(format == ScaleFormat::Ue8m0),
            amax_min: fp8::ACTIVATION_AMAX_MIN,
        };
        let grid = Grid { blocks: (1, 1, size(heads)), threads: 256, shared: ROUNDED_SHARED };
        // SAFETY: two warpgroups a head, each with 64 of its channels and all rows; lengths checked above.
        unsafe { launch!(self, linear_bf16_rounded_16, grid; product, rounded) }
    }
}

/// Rows that the kernels have that do more than a product.
const FEW_ROWS: usize = TILES[0].0;
/// Shared memory of the one that rounds: two tiles'.
pub(in crate::cuda) const ROUNDED_SHARED: usize = 1024 + 2 * TILES[0].1 * 128 * (CHANNELS + TILES[0].0);

/// Where rounded outputs go; `struct Rounded` in the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rounded {
    codes: u64,
    scales: u64,
    power_of_two: u32,
    amax_min: f32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Rounded {}

/// What is split on the way; `struct Queries` in the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Queries {
    q: u64,
    positions: u64,
    table: u64,
    rope: u64,
    rope_dim: u32,
    positions_max: u32,
}

// SAFETY: the same fields in the same order, C layout.
unsafe impl Argument for Queries {}

impl Product {
    /// Every head's vector of `m` rows by its matrix, into nothing yet.
    fn of_heads(w: &HeadMatrices, x: Inputs<'_>, m: usize) -> Self {
        let HeadMatrices { heads, out_dim, in_dim, .. } = *w;
        assert_eq!(x.rows(heads * in_dim), m, "input [{m}, {heads}, {in_dim}]");
        Self {
            x_stride: size(heads * in_dim),
            x_head: size(in_dim),
            heads: size(heads),
            x_vector: u32::from(x.rows_by_four(in_dim)),
            ..Self::of(w.weights.view().address(), x.addresses().0, 0, m, out_dim, in_dim)
        }
    }
}
