//! Starting kernels.
//!
//! A kernel may be started while the one before it in its stream still runs (programmatic dependent launch): it waits in
//! `previous_done` of `kernels/numbers.cu` until that one is done, and has asked for its first weights by then.

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use cudarc::driver::{CudaFunction, sys};

use super::error::not_launched;
use super::{CudaError, Device};

/// Dynamic shared memory a kernel may have without asking for more: 48 KiB less what the kernels declare themselves.
pub(super) const SHARED_MAX: usize = 46 * 1024;

/// Kernels that do not wait by themselves: they are started when all before them is done.
pub(super) const IN_TURN: &[&str] = &["sample"];

/// What a kernel's parameter may be: the same bytes on both sides.
///
/// # Safety
/// The type's layout is that of the kernel's parameter.
pub(super) unsafe trait Argument {
    fn pointer(&mut self) -> *mut c_void {
        std::ptr::from_mut(self).cast()
    }
}

// SAFETY: plain numbers and addresses.
unsafe impl Argument for u32 {}
// SAFETY: as above.
unsafe impl Argument for u64 {}
// SAFETY: as above.
unsafe impl Argument for f32 {}

/// Threads of a launch.
pub(super) struct Grid {
    pub(super) blocks: (u32, u32, u32),
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: usize,
}

impl Grid {
    /// `blocks` blocks of `threads` threads in a row.
    pub(super) fn line(blocks: usize, threads: u32) -> Self {
        Self { blocks: (size(blocks), 1, 1), threads, shared: 0 }
    }

    /// A thread of 256 a value.
    pub(super) fn values(len: usize) -> Self {
        Self::line(len.div_ceil(256), 256)
    }

    /// With `bytes` of dynamic shared memory.
    ///
    /// # Panics
    /// If that is more than a kernel gets: a width far beyond any model's.
    pub(super) fn with_shared(self, bytes: usize) -> Self {
        assert!(bytes <= SHARED_MAX, "{bytes} bytes of shared memory");
        Self { shared: bytes, ..self }
    }
}

/// A length as kernels take it.
///
/// # Panics
/// If it does not fit a signed 32-bit number.
pub(super) fn size(len: usize) -> u32 {
    assert!(i32::try_from(len).is_ok(), "a kernel's size of {len}");
    len as u32
}

impl Device {
    /// # Safety
    /// The arguments are the kernel's parameters in order and type; every address in them is valid for what the kernel
    /// does there until the stream has passed it.
    pub(super) unsafe fn launch(
        &self,
        kernel: &'static str,
        function: &CudaFunction,
        grid: Grid,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        self.bind()?;
        let in_turn = self.in_turn.swap(false, Ordering::Relaxed) || IN_TURN.contains(&kernel);
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared as u32,
            hStream: self.launching().cu_stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(self.overlaps.load(Ordering::Relaxed) && !in_turn),
        };
        // SAFETY: the caller's promise; a kernel that is started early waits before it reads or writes what others do.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|source| not_launched(kernel, source))
    }

    /// Whether kernels are started before the one before them has ended; so it is at first, where the device can. For whoever
    /// wants to know what one takes by itself.
    pub fn overlap(&self, wanted: bool) {
        self.overlaps.store(wanted && !self.architecture.starts_with("sm_8"), Ordering::Relaxed);
    }

    /// The next kernel comes after something that is no kernel of its stream.
    pub(super) fn await_all(&self) {
        self.in_turn.store(true, Ordering::Relaxed);
    }
}

/// `launch!(device, entry, grid; arguments…)`, to be used inside `unsafe`.
macro_rules! launch {
    ($device:expr, $function:ident, $grid:expr; $($argument:expr),+ $(,)?) => {
        $device.launch(
            stringify!($function),
            &$device.functions.$function,
            $grid,
            &mut [$($crate::cuda::launch::Argument::pointer(&mut { $argument })),+],
        )
    };
}

pub(super) use launch;

#[cfg(test)]
mod tests;
