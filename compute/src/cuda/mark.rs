//! Moments in the device's work that the host can wait for.

use cudarc::driver::CudaEvent;

use super::error::Doing;
use super::{CudaError, Device};

/// The moment at which everything is done that was asked for before [`Device::mark`].
pub struct Mark(CudaEvent);

impl Mark {
    /// Waits for it.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.0.synchronize().doing("finish its work")
    }
}

impl Device {
    /// This moment in what was asked for.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        self.bind()?;
        self.stream.record_event(None).map(Mark).doing("record an event")
    }
}
