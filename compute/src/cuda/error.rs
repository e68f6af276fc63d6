//! What can go wrong between here and the device.

use std::path::{Path, PathBuf};

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// Why a device cannot be used, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// No driver library on this machine, or it refuses to start.
    #[error("no CUDA driver: {detail}")]
    NoDriver {
        /// What was tried.
        detail: String,
    },
    /// A driver older than the functions this build calls.
    #[error("the CUDA driver speaks version {}.{}, this build needs {}.{}", found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10)]
    DriverVersion {
        /// As the driver states it: 1000 · major + 10 · minor.
        found: u32,
        /// The least that will do, likewise.
        needed: u32,
    },
    /// Fewer devices than the ordinal asks for.
    #[error("no CUDA device {ordinal}: the machine shows {count}")]
    NoDevice {
        /// Asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// A device without instructions the kernels are made of (E4M3 conversion).
    #[error(
        "device {ordinal} ({name}) has compute capability {}.{}, the kernels need 8.9",
        capability.0,
        capability.1
    )]
    Architecture {
        /// Which device.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Major and minor.
        capability: (u32, u32),
    },
    /// Device memory is used up.
    #[error("out of device memory: {requested} bytes asked for, {free} of {total} free")]
    OutOfMemory {
        /// Bytes asked for.
        requested: usize,
        /// Bytes free when it failed.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// Kernels must be compiled and the compiler's library is not there.
    #[error(
        "no NVRTC library (libnvrtc.so) to compile kernel {kernel}: install CUDA 13's and put its folder on LD_LIBRARY_PATH{}",
        or_shipped(looked_in.as_deref())
    )]
    NoNvrtc {
        /// Which kernel file.
        kernel: &'static str,
        /// The folder of prebuilt kernels that does not have it either.
        looked_in: Option<PathBuf>,
    },
    /// NVRTC refuses a kernel.
    #[error("NVRTC cannot compile {kernel} for {architecture} ({error}):\n{log}")]
    Nvrtc {
        /// Which kernel file.
        kernel: &'static str,
        /// Target.
        architecture: String,
        /// NVRTC's code.
        error: String,
        /// NVRTC's own words.
        log: String,
    },
    /// A kernel faulted: an address that is not its own, a check that did not hold. Every later call fails, and the worker
    /// must end. Kernels run after they were asked for: which one it was nobody says.
    #[error("a kernel faulted; the driver said so when asked to {action}")]
    Fault {
        /// What was asked for next.
        action: String,
        /// What kind of fault.
        #[source]
        source: DriverError,
    },
    /// A kernel could not be launched.
    #[error("kernel {kernel} cannot be launched")]
    Kernel {
        /// Entry point.
        kernel: &'static str,
        /// The driver's reason.
        #[source]
        source: DriverError,
    },
    /// Any other call of the driver.
    #[error("the CUDA driver failed to {action}")]
    Driver {
        /// What was being done.
        action: &'static str,
        /// The driver's reason.
        #[source]
        source: DriverError,
    },
}

impl CudaError {
    /// Whether nothing is wrong with the machine but the lack of CUDA: no driver or no device.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::NoDriver { .. } | Self::NoDevice { .. })
    }
}

/// The other way to have kernels: those of this build, compiled elsewhere.
fn or_shipped(folder: Option<&Path>) -> String {
    let folder =
        folder.map(|folder| format!(", or put this build's compiled kernels into {}", folder.display()));
    folder.unwrap_or_default()
}

/// Names what was being done when a driver call failed.
pub(super) trait Doing<T> {
    fn doing(self, action: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, action: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| failed(action, source))
    }
}

/// A call that failed: its own failure, or an earlier kernel's fault.
pub(super) fn failed(action: &'static str, source: DriverError) -> CudaError {
    match is_fault(&source) {
        true => CudaError::Fault { action: action.to_owned(), source },
        false => CudaError::Driver { action, source },
    }
}

/// The same of a launch.
pub(super) fn not_launched(kernel: &'static str, source: DriverError) -> CudaError {
    match is_fault(&source) {
        true => CudaError::Fault { action: format!("launch {kernel}"), source },
        false => CudaError::Kernel { kernel, source },
    }
}

/// What only a running kernel can do wrong.
fn is_fault(error: &DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
    )
}

pub(super) fn is_out_of_memory(error: &DriverError) -> bool {
    error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

#[cfg(test)]
mod tests;
