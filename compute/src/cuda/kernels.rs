//! Every kernel file and its entry points.

use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;

use super::CudaError;
use super::error::Doing;
use super::launch::size;
use super::linear::{ALONE_SHARED, HIGH, ROUNDED_SHARED, WIDE, narrow_shared, parts_shared, wgmma_shared};
use super::mla_attention::MLA_SHARED;
use super::store::{KernelStore, Origin, in_parallel};

/// One kernel file: what is compiled at a time.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The file's name without ending.
    pub name: &'static str,
    /// Its text, number formats and reductions before it.
    pub text: &'static str,
}

macro_rules! kernels {
    ($($file:ident $([$($before:ident),+])?: $($function:ident),+;)+) => {
        /// All kernel files of `compute/kernels`.
        pub const SOURCES: &[Source] = &[$(Source {
            name: stringify!($file),
            text: concat!(
                include_str!("../../kernels/numbers.cu"),
                $($("\n#line 1 \"", stringify!($before), ".cu\"\n",
                    include_str!(concat!("../../kernels/", stringify!($before), ".cu")),)+)?
                "\n#line 1 \"", stringify!($file), ".cu\"\n",
                include_str!(concat!("../../kernels/", stringify!($file), ".cu")),
            ),
        }),+];

        /// Entry points, loaded.
        pub(super) struct Functions {
            $($(pub(super) $function: CudaFunction,)+)+
        }

        impl Functions {
            fn load_with(mut module: impl FnMut(&'static str) -> Result<Module, CudaError>) -> Result<Self, CudaError> {
                $(
                    let loaded = module(stringify!($file))?;
                    $(let $function = loaded.load_function(stringify!($function)).doing("find a kernel")?;)+
                )+
                Ok(Self { $($($function,)+)+ })
            }
        }
    };
}

type Module = Arc<cudarc::driver::CudaModule>;

// In brackets: what is put before a file, after numbers.cu.
kernels! {
    quantise: quantise_e4m3, round_bf16, round_bf16_in_place;
    linear [product]: linear_f32, linear_bf16_f32, linear_fp8_f32, linear_bf16, linear_fp8;
    linear_wgmma [hopper, product]: linear_fp8_wgmma_16, linear_fp8_wgmma_64, linear_fp8_wgmma_128;
    linear_narrow [hopper, product]: linear_fp8_narrow_64x16, linear_fp8_narrow_64x32, linear_fp8_narrow_64x64,
        linear_fp8_narrow_64x128, linear_fp8_narrow_128x64;
    linear_wide [hopper, product]: linear_fp8_wide, linear_fp8_wide_picked, linear_fp8_high;
    linear_bf16 [hopper, product]: linear_bf16_absorb_16, linear_bf16_rounded_16, linear_bf16_wgmma_16, linear_bf16_wgmma_64, linear_bf16_wgmma_128,
        linear_parts_wgmma_16, linear_parts_wgmma_32, linear_parts_wgmma_64;
    rms_norm [norm_row]: rms_norm;
    norm [norm_row]: norm_rows, norm_rows_split;
    norm_pair: norm_pair;
    elementwise: silu_mul, add_in_place, add_scaled, weighted_sum;
    swiglu: swiglu;
    experts: group_rows, combine_f32, combine_bf16;
    rope: rope_interleaved;
    query: split_queries_f32, split_queries_bf16;
    kv_write [norm_row]: kv_write, latent_write, latent_write_norm;
    mla_attention [attention]: mla_attention_f32, mla_attention_bf16, mla_attention_fp8;
    mla_attention_wgmma [hopper, attention, mla_wgmma]: mla_attention_wgmma, mla_combine;
    mla_prompt [hopper, attention, mla_wgmma]: mla_unpack, mla_prompt;
    route: route;
    embed: embed_f32, embed_bf16, embed_fp8;
    logprob: logprob;
    sample: sample;
    synthetic: synthetic_f32, synthetic_bf16, synthetic_e4m3;
}

impl Functions {
    /// Lets the matrix unit's kernels have the shared memory that they need.
    pub(super) fn allow_shared_memory(&self) -> Result<(), CudaError> {
        let tiles: [&[&CudaFunction]; 3] = [
            &[&self.linear_fp8_wgmma_16, &self.linear_bf16_wgmma_16],
            &[&self.linear_fp8_wgmma_64, &self.linear_bf16_wgmma_64, &self.linear_parts_wgmma_64],
            &[&self.linear_fp8_wgmma_128, &self.linear_bf16_wgmma_128],
        ];
        let products = tiles.into_iter().enumerate().flat_map(|(tile, kernels)| {
            kernels.iter().map(move |k| (k, wgmma_shared(tile).max(ALONE_SHARED)))
        });
        let others = [
            (&&self.mla_attention_wgmma, MLA_SHARED),
            (&&self.mla_prompt, MLA_SHARED),
            (&&self.linear_bf16_rounded_16, ROUNDED_SHARED),
            (&&self.linear_parts_wgmma_16, parts_shared(16)),
            (&&self.linear_parts_wgmma_32, parts_shared(32)),
            (&&self.linear_fp8_wide, WIDE.shared()),
            (&&self.linear_fp8_wide_picked, WIDE.shared()),
            (&&self.linear_fp8_high, HIGH.shared()),
            (&&self.linear_fp8_narrow_64x16, narrow_shared(0)),
            (&&self.linear_fp8_narrow_64x32, narrow_shared(1)),
            (&&self.linear_fp8_narrow_64x64, narrow_shared(2)),
            (&&self.linear_fp8_narrow_128x64, narrow_shared(3)),
            (&&self.linear_fp8_narrow_64x128, narrow_shared(4)),
        ];
        for (kernel, bytes) in products.chain(others) {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.set_attribute(attribute, size(bytes) as i32).doing("give a kernel shared memory")?;
        }
        Ok(())
    }

    /// Finds or compiles every kernel and loads it; also how many came from where (prebuilt, cache, compiler).
    pub(super) fn load(
        context: &Arc<CudaContext>,
        store: &KernelStore,
        architecture: &str,
    ) -> Result<(Self, [usize; 3]), CudaError> {
        let mut found = in_parallel(SOURCES, |source| store.find(source, architecture)).into_iter();
        let mut origins = [0; 3];
        // Modules are asked for in the order of the list.
        let functions = Self::load_with(|name| {
            let (cubin, origin) =
                found.next().ok_or(CudaError::NoNvrtc { kernel: name, looked_in: None })??;
            origins[match origin {
                Origin::Prebuilt => 0,
                Origin::Cache => 1,
                Origin::Compiler => 2,
            }] += 1;
            context.load_module(Ptx::from_binary(cubin)).doing("load a kernel")
        })?;
        Ok((functions, origins))
    }
}
