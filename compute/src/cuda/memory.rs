//! Device memory: buffers that own, views that borrow, copies from and to the host.
//!
//! Everything runs on the device's stream in the order it was asked for; copies return when they are done.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::error::{Doing, failed, is_out_of_memory};
use super::{CudaError, Device};

/// A plain number that means the same on host and device; any bits are a value of it.
pub trait Element: Copy + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($t:ty),+) => { $(impl sealed::Sealed for $t {} impl Element for $t {})+ };
}

elements!(u8, u16, u32, f32);

/// An allocation; freed when the last who keeps it goes, after the work that was asked for before.
pub(super) struct Memory {
    address: u64,
    stream: Arc<CudaStream>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Errors are those of an earlier kernel and show at the next call; here nothing can be done about them.
        let _ = self.stream.context().bind_to_thread();
        let _ = self.stream.synchronize();
        // SAFETY: allocated by `Device::alloc`, and nothing that uses it is still running.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// `len` values on the device; freed when dropped, after the work that was asked for before.
pub struct Buffer<T> {
    address: u64,
    len: usize,
    /// None where there are no values.
    memory: Option<Arc<Memory>>,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, owner: PhantomData }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, owner: PhantomData }
    }

    /// A part, to read.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice(&self, range: Range<usize>) -> View<'_, T> {
        self.view().slice(range)
    }

    /// A part, to write.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        let View { address, len, .. } = self.view().slice(range);
        ViewMut { address, len, owner: PhantomData }
    }

    /// Where a part lies, for whoever writes it beside the stream, and what keeps it there meanwhile.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub(super) fn place(&mut self, range: Range<usize>) -> (u64, Option<Arc<Memory>>) {
        (self.slice(range).address, self.memory.clone())
    }
}

/// Borrowed device memory, to read.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    address: u64,
    len: usize,
    owner: PhantomData<&'a T>,
}

impl<T: Element> View<'_, T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} values", self.len);
        Self { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Whether every row of `width` values starts at a multiple of four values.
    pub(super) fn rows_by_four(&self, width: usize) -> bool {
        width.is_multiple_of(4) && self.address.is_multiple_of(4 * size_of::<T>() as u64)
    }
}

/// Borrowed device memory, to write.
pub struct ViewMut<'a, T> {
    address: u64,
    len: usize,
    owner: PhantomData<&'a mut T>,
}

impl<T: Element> ViewMut<'_, T> {
    /// A part of it.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        let View { address, len, .. } = self.view().slice(range);
        ViewMut { address, len, owner: PhantomData }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same, to read.
    pub fn view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, owner: PhantomData }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Device {
    /// Memory for `len` values; what it holds is undefined.
    pub fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        self.bind()?;
        let requested = len.saturating_mul(size_of::<T>());
        if requested == 0 {
            return Ok(Buffer { address: 0, len, memory: None, element: PhantomData });
        }
        // SAFETY: the memory is the device's; hosts reach it through copies only, and any bits are values.
        let address = unsafe { result::malloc_sync(requested) }.map_err(|source| {
            let (free, total) = result::mem_get_info().unwrap_or((0, 0));
            if is_out_of_memory(&source) {
                return CudaError::OutOfMemory { requested, free, total };
            }
            failed("allocate memory", source)
        })?;
        let memory = Some(Arc::new(Memory { address, stream: self.stream.clone() }));
        Ok(Buffer { address, len, memory, element: PhantomData })
    }

    /// A buffer holding `values`.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.alloc(values.len())?;
        self.copy_in(values, &mut buffer.view_mut())?;
        Ok(buffer)
    }

    /// Copies from the host; returns when the copy is done.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_in<T: Element>(&self, values: &[T], to: &mut ViewMut<'_, T>) -> Result<(), CudaError> {
        assert_eq!(values.len(), to.len(), "values and room for them");
        if values.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.await_all();
        // SAFETY: both sides have the length; `values` outlives the copy, which is waited for.
        unsafe { result::memcpy_htod_async(to.address, values, self.stream.cu_stream()) }
            .doing("copy to the device")?;
        self.synchronize()
    }

    /// Copies to the host; returns when the copy, and with it everything asked for before, is done.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_out<T: Element>(&self, from: View<'_, T>, values: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(values.len(), from.len(), "values and room for them");
        if values.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.await_all();
        // SAFETY: both sides have the length; any bits are values; `values` outlives the copy, which is waited for.
        unsafe { result::memcpy_dtoh_async(values, from.address, self.stream.cu_stream()) }
            .doing("copy from the device")?;
        self.synchronize()
    }

    /// Copies from one place on the device to another.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_within<T: Element>(
        &self,
        from: View<'_, T>,
        to: &mut ViewMut<'_, T>,
    ) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "values and room for them");
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.await_all();
        let bytes = from.len * size_of::<T>();
        // SAFETY: both sides have the length.
        unsafe { result::memcpy_dtod_async(to.address, from.address, bytes, self.stream.cu_stream()) }
            .doing("copy on the device")
    }

    /// Sets every byte.
    pub fn fill<T: Element>(&self, to: &mut ViewMut<'_, T>, byte: u8) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.await_all();
        // SAFETY: inside the borrowed memory.
        unsafe { result::memset_d8_async(to.address, byte, to.len * size_of::<T>(), self.stream.cu_stream()) }
            .doing("fill memory")
    }

    /// Bytes free and in all.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        result::mem_get_info().doing("ask for free memory")
    }
}
