//! An NVIDIA GPU as a device: memory, kernels, and the operators, a file each.
//!
//! Kernels are text in `compute/kernels`, compiled for the device's architecture when it is opened (see
//! [`KernelStore`]). The driver and the compiler are libraries found at run time: where they are missing,
//! [`Device::open`] says so and everything else of the crate works as before.
//!
//! The operators mean what those of [`crate::Cpu`] mean, and are row invariant as those are; their bits differ from the
//! CPU's. They return when the work is asked for, not when it is done: a fault inside a kernel shows at a later call, and
//! every call after it fails too. Lengths that do not fit are programming errors and panic; an index *on the device* that
//! is out of range (a token, a block) ends the context instead of reading elsewhere.

mod activations;
mod beside;
mod copies;
mod elementwise;
mod embed;
mod error;
mod experts;
mod graph;
mod kernels;
mod kv_write;
mod launch;
mod linear;
mod logprob;
mod mark;
mod matrix;
mod memory;
mod mla_attention;
mod norm;
mod norm_pair;
pub mod nvrtc;
mod pinned;
mod quantise;
mod query;
mod rms_norm;
mod rope;
mod route;
mod sample;
mod store;
mod swiglu;
mod synthetic;
mod uploads;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use cudarc::driver::{CudaContext, CudaStream, result, sys};

pub use activations::{Activations, InputFormat, RowStaging};
pub use beside::Beside;
pub use error::CudaError;
pub use experts::{GroupStaging, Groups, ResultBuffer, ResultStaging, Results};
pub use graph::Graph;
pub use kernels::{SOURCES, Source};
pub use kv_write::{CacheRows, LatentRows};
pub use linear::{Inputs, LinearKernel, Outputs};
pub use mark::Mark;
pub use matrix::{ExpertMatrices, HeadMatrices, Matrix};
pub use memory::{Buffer, Element, View, ViewMut};
pub use mla_attention::{AttentionKernel, MlaParts, MlaQueries, MlaRows};
pub use norm::NormRows;
pub use norm_pair::NormHalf;
pub use pinned::Pinned;
pub use query::{QueryParts, QueryShape};
pub use rope::RopeTable;
pub use route::Routing;
pub use sample::{Adjustment, DRAWN_WORDS, DrawRow};
pub use store::{BuildError, KernelStore};
pub use uploads::Uploads;

use beside::Branch;
use error::Doing;
use kernels::Functions;

/// The oldest driver this build's bindings can speak to: they name functions of CUDA 13.0.
const DRIVER_VERSION_MIN: u32 = 13_000;

/// One GPU: a context, a stream and the loaded kernels; every operator is a method.
pub struct Device {
    stream: Arc<CudaStream>,
    /// Copies beside the work of `stream`.
    copies: Arc<CudaStream>,
    branch: Branch,
    /// Whether kernels are started before the one before them has ended; none knows better.
    overlaps: AtomicBool,
    /// The next kernel waits for all that was asked for.
    in_turn: AtomicBool,
    functions: Functions,
    name: String,
    architecture: String,
    has_wgmma: bool,
    multiprocessors: usize,
}

impl Device {
    /// Opens GPU `ordinal` with the default [`KernelStore`].
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        Self::open_with(ordinal, &KernelStore::default())
    }

    /// Opens GPU `ordinal`, taking kernels from `store` and compiling what it lacks (0.1 s a kernel).
    pub fn open_with(ordinal: usize, store: &KernelStore) -> Result<Self, CudaError> {
        check_driver()?;
        let count = CudaContext::device_count().doing("count devices")?;
        let count = usize::try_from(count).unwrap_or(0);
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).doing("open the device")?;
        // Buffers here are ordered by the one stream; the bindings' own events would only stand in the way of graphs.
        // SAFETY: no buffer of the bindings is used, only ours.
        unsafe { context.disable_event_tracking() };
        let name = context.name().doing("ask for the device's name")?;
        let (major, minor) = context.compute_capability().doing("ask for the device's architecture")?;
        let capability = (major.unsigned_abs(), minor.unsigned_abs());
        if capability < (8, 9) {
            return Err(CudaError::Architecture { ordinal, name, capability });
        }
        let architecture = architecture(capability);
        let (functions, [prebuilt, cached, compiled]) = Functions::load(&context, store, &architecture)?;
        let has_wgmma = capability == (9, 0);
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors =
            context.attribute(count).doing("count its multiprocessors")?.unsigned_abs() as usize;
        if has_wgmma {
            functions.allow_shared_memory()?;
        }
        let stream = context.new_stream().doing("create a stream")?;
        let copies = context.new_stream().doing("create a stream")?;
        let branch = Branch::new(&context)?;
        let (overlaps, in_turn) = (AtomicBool::new(capability.0 >= 9), AtomicBool::new(true));
        let fp8_linear = if has_wgmma { "wgmma where the shape allows" } else { "plain" };
        tracing::info!(device = name, architecture, prebuilt, cached, compiled, fp8_linear, "kernels loaded");
        Ok(Self {
            stream,
            copies,
            branch,
            overlaps,
            in_turn,
            functions,
            name,
            architecture,
            has_wgmma,
            multiprocessors,
        })
    }

    /// The device's name, such as `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its kernels are compiled for, such as `sm_90a`; part of the execution fingerprint.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Waits for everything asked for so far, and reports what went wrong in it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().doing("finish its work")
    }

    /// Milliseconds that the device takes for what `work` asks of it.
    pub fn time_ms(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<f32, CudaError> {
        let event = || {
            let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            self.stream.record_event(timed).doing("record an event")
        };
        let start = event()?;
        work()?;
        let end = event()?;
        end.synchronize().doing("finish its work")?;
        start.elapsed_ms(&end).doing("read its timer")
    }

    /// Makes the device's context the calling thread's.
    fn bind(&self) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().doing("take the device to a thread")
    }
}

/// Architecture-specific from Hopper on: matrix and copy instructions exist only there.
fn architecture((major, minor): (u32, u32)) -> String {
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

fn check_driver() -> Result<(), CudaError> {
    // SAFETY: looks for a shared library; its initialisers are the driver's.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver { detail: "libcuda is not on this machine".to_owned() });
    }
    let mut version = 0;
    // SAFETY: an out-pointer to a live integer; every driver has this function, also before initialisation.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().doing("state its version")?;
    let found = version.unsigned_abs();
    if found < DRIVER_VERSION_MIN {
        return Err(CudaError::DriverVersion { found, needed: DRIVER_VERSION_MIN });
    }
    result::init().map_err(|error| CudaError::NoDriver { detail: error.to_string() })
}
