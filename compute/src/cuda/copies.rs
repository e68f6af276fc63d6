//! Copies between page-locked memory and the device on a stream of their own, beside the work that was asked for.
//!
//! They come one after another among themselves. What a copy reads must be there already, which [`super::Mark::wait`] tells, and
//! nothing else may use what it writes until [`Device::after_copies`] or [`Device::finish_copies`].

use cudarc::driver::result;

use super::error::Doing;
use super::{CudaError, Device, Element, Pinned, View, ViewMut};

impl Device {
    /// Copies to the values of `to` from `start` on.
    ///
    /// # Panics
    /// If `to` ends before.
    pub fn copy_out_beside<T: Element>(
        &self,
        from: View<'_, T>,
        to: &mut Pinned<T>,
        start: usize,
    ) -> Result<(), CudaError> {
        let to = &mut to[start..start + from.len()];
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both sides have the length; `Pinned` waits before it is freed.
        unsafe { result::memcpy_dtoh_async(to, from.address(), self.copies.cu_stream()) }
            .doing("copy from the device")
    }

    /// Copies the values of `from` from `start` on, as many as `to` takes.
    ///
    /// # Panics
    /// If `from` ends before.
    pub fn copy_in_beside<T: Element>(
        &self,
        from: &Pinned<T>,
        start: usize,
        to: &mut ViewMut<'_, T>,
    ) -> Result<(), CudaError> {
        let from = &from[start..start + to.len()];
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both sides have the length; `Pinned` waits before it is freed.
        unsafe { result::memcpy_htod_async(to.address(), from, self.copies.cu_stream()) }
            .doing("copy to the device")
    }

    /// What is asked of the device from here on comes after the copies so far.
    pub fn after_copies(&self) -> Result<(), CudaError> {
        self.bind()?;
        self.await_all();
        let copied = self.copies.record_event(None).doing("record an event")?;
        self.stream.wait(&copied).doing("wait for copies")
    }

    /// Waits for the copies so far.
    pub fn finish_copies(&self) -> Result<(), CudaError> {
        self.copies.synchronize().doing("finish a copy")
    }
}
