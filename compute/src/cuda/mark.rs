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

    /// Milliseconds from this moment to a later one, both of which must have been waited for; needs marks that
    /// [`Device::timed_mark`] made.
    pub fn ms_until(&self, later: &Self) -> Result<f32, CudaError> {
        self.0.elapsed_ms(&later.0).doing("read its timer")
    }
}

impl Device {
    /// This moment in what was asked for.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        self.bind()?;
        self.stream.record_event(None).map(Mark).doing("record an event")
    }

    /// As [`Self::mark`], with the device's time.
    pub fn timed_mark(&self) -> Result<Mark, CudaError> {
        self.bind()?;
        let timed = cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.stream.record_event(Some(timed)).map(Mark).doing("record an event")
    }
}
