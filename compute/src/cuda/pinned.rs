//! Page-locked host memory, which the device copies from and to while the host goes on.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::error::Doing;
use super::{CudaError, Device, Element, View, ViewMut};

/// `len` values of page-locked host memory, zero at first.
pub struct Pinned<T> {
    pointer: *mut T,
    len: usize,
    /// Where the device copies from and to it. Not waited for by way of their context: that would break off what another device of
    /// this process, with the same context, is recording.
    streams: [Arc<CudaStream>; 2],
}

// SAFETY: plain memory with one owner; elements are plain numbers.
unsafe impl<T: Element> Send for Pinned<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Element> Sync for Pinned<T> {}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // Copies from and to it may still be under way.
            for stream in &self.streams {
                let _ = stream.context().bind_to_thread();
                let _ = stream.synchronize();
            }
            // SAFETY: allocated by `Device::pinned`, and nothing that uses it is still running.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}

impl<T: Element> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values from `pointer` on, initialised when allocated; null is never used with a length.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
}

impl<T: Element> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl Device {
    /// Copies the first `from.len()` values to `to`, behind what was asked for before. They are there after
    /// [`Device::synchronize`]; until then a reader finds what was there or what will be.
    ///
    /// # Panics
    /// If `to` is shorter.
    pub fn copy_out_later<T: Element>(&self, from: View<'_, T>, to: &mut Pinned<T>) -> Result<(), CudaError> {
        self.copy_out_later_at(from, to, 0)
    }

    /// As [`Self::copy_out_later`], to the values from `start` on.
    ///
    /// # Panics
    /// If `to` ends before.
    pub fn copy_out_later_at<T: Element>(
        &self,
        from: View<'_, T>,
        to: &mut Pinned<T>,
        start: usize,
    ) -> Result<(), CudaError> {
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.await_all();
        let to = &mut to[start..start + from.len()];
        // SAFETY: both sides have the length; `Pinned` waits before it is freed.
        unsafe { result::memcpy_dtoh_async(to, from.address(), self.stream.cu_stream()) }
            .doing("copy from the device")
    }

    /// Copies the first `to.len()` values of `from`, behind what was asked for before. They must stay as they are until
    /// then: [`Device::synchronize`] says when.
    ///
    /// # Panics
    /// If `from` is shorter.
    pub fn copy_in_later<T: Element>(
        &self,
        from: &Pinned<T>,
        to: &mut ViewMut<'_, T>,
    ) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.await_all();
        // SAFETY: both sides have the length; `Pinned` waits before it is freed.
        unsafe { result::memcpy_htod_async(to.address(), &from[..to.len()], self.stream.cu_stream()) }
            .doing("copy to the device")
    }

    /// Page-locked memory for `len` values, zero.
    pub fn pinned<T: Element>(&self, len: usize) -> Result<Pinned<T>, CudaError> {
        self.bind()?;
        let streams = [self.stream.clone(), self.copies.clone()];
        if len == 0 {
            return Ok(Pinned { pointer: std::ptr::NonNull::dangling().as_ptr(), len, streams });
        }
        let bytes = len.saturating_mul(size_of::<T>());
        // SAFETY: the memory is written before anybody reads it, below.
        let pointer = unsafe { result::malloc_host(bytes, 0) }.doing("allocate page-locked memory")?;
        // SAFETY: just allocated, with that many bytes; zero bytes are values of any element.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { pointer: pointer.cast(), len, streams })
    }
}
