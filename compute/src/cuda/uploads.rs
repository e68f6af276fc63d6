//! Weights on their way to the device: read by several threads into page-locked memory, copied from there while the next ones
//! are read.
//!
//! A file that is mapped into memory is read by whoever touches it first, a page at a time: one thread that touches and copies
//! is far slower than the device takes it. Each thread here has two slots, one being read while the other is copied. No
//! second copy of the weights is ever in the host's memory.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bytes::Bytes;
use cudarc::driver::{CudaStream, result};

use super::error::Doing;
use super::memory::Memory;
use super::{Buffer, CudaError, Device, Pinned};

/// Bytes of a slot: long enough for a copy to run at full speed, short enough for many to be under way.
const SLOT: usize = 4 << 20;

/// Copies to a device that are under way. Dropped, it waits for them.
pub struct Uploads {
    jobs: Option<SyncSender<Job>>,
    workers: Vec<JoinHandle<Result<(), CudaError>>>,
    bytes: u64,
}

/// Some bytes and where they belong.
struct Job {
    bytes: Bytes,
    address: u64,
    /// Keeps the place until they are there.
    _memory: Arc<Memory>,
}

impl Uploads {
    /// Ready to copy, with `threads` threads that read.
    pub fn new(device: &Device, threads: usize) -> Result<Self, CudaError> {
        // One job each beside those that are being read: whoever asks is held up, so that it can tell how far things are.
        let (jobs, queue) = sync_channel(threads);
        let queue = Arc::new(Mutex::new(queue));
        let mut workers = Vec::new();
        for _ in 0..threads.max(1) {
            let slots = [Slot::new(device)?, Slot::new(device)?];
            let queue = Arc::clone(&queue);
            workers.push(std::thread::spawn(move || work(&queue, slots)));
        }
        Ok(Self { jobs: Some(jobs), workers, bytes: 0 })
    }

    /// Copies `bytes` to the place `start` of `to`. They are there after [`Self::finish`].
    ///
    /// # Errors
    /// An earlier copy failed.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn copy(&mut self, bytes: &Bytes, to: &mut Buffer<u8>, start: usize) -> Result<(), CudaError> {
        let (mut address, memory) = to.place(start..start + bytes.len());
        let Some(memory) = memory else { return Ok(()) };
        self.bytes += bytes.len() as u64;
        for first in (0..bytes.len()).step_by(SLOT) {
            let part = bytes.slice(first..bytes.len().min(first + SLOT));
            let len = part.len() as u64;
            let job = Job { bytes: part, address, _memory: Arc::clone(&memory) };
            let taken = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
            if !taken {
                // They only go when one of them has failed.
                return self.join().map(drop);
            }
            address += len;
        }
        Ok(())
    }

    /// Waits for every copy; how many bytes they were.
    ///
    /// # Errors
    /// One of them failed.
    pub fn finish(mut self) -> Result<u64, CudaError> {
        self.join()
    }

    fn join(&mut self) -> Result<u64, CudaError> {
        self.jobs = None;
        let mut outcome = Ok(self.bytes);
        for worker in self.workers.drain(..) {
            match worker.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => outcome = Err(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        outcome
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        // Whoever drops them unfinished has an error of its own.
        let _ = self.join();
    }
}

/// Page-locked memory and the stream that empties it.
struct Slot {
    memory: Pinned<u8>,
    stream: Arc<CudaStream>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The memory does not know this stream, and waits for its device's only.
        let _ = self.stream.synchronize();
    }
}

impl Slot {
    fn new(device: &Device) -> Result<Self, CudaError> {
        let stream = device.stream.context().new_stream().doing("create a stream")?;
        Ok(Self { memory: device.pinned(SLOT)?, stream })
    }

    /// Reads a job's bytes and asks for their copy.
    fn take(&mut self, job: &Job) -> Result<(), CudaError> {
        self.stream.synchronize().doing("copy weights to the device")?;
        let memory = &mut self.memory[..job.bytes.len()];
        memory.copy_from_slice(&job.bytes);
        // SAFETY: the place has the length and is kept by the job's owner until the stream has been waited for; the slot is
        // written again only after that.
        unsafe { result::memcpy_htod_async(job.address, memory, self.stream.cu_stream()) }
            .doing("copy weights to the device")
    }
}

fn work(queue: &Mutex<Receiver<Job>>, mut slots: [Slot; 2]) -> Result<(), CudaError> {
    slots[0].stream.context().bind_to_thread().doing("take the device to a thread")?;
    // What a slot's copy writes to, until that copy is done.
    let mut kept: [Option<Job>; 2] = [None, None];
    let mut turn = 0;
    let mut outcome = Ok(());
    loop {
        let Ok(job) = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv() else { break };
        outcome = slots[turn].take(&job);
        if outcome.is_err() {
            break;
        }
        kept[turn] = Some(job);
        turn = 1 - turn;
    }
    for slot in &slots {
        let done = slot.stream.synchronize().doing("copy weights to the device");
        outcome = outcome.and(done);
    }
    outcome
}
