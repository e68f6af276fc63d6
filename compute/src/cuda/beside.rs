//! Kernels that run beside those asked for after them, on a stream of their own: two branches of a step, also of a recorded one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::error::Doing;
use super::{CudaError, Device};

/// Work beside the device's stream that nobody has waited for yet.
#[must_use = "what it writes is there after Device::join"]
#[derive(Debug)]
pub struct Beside(());

/// The other stream, and the moments at which the two part and meet. One branch at a time.
pub(super) struct Branch {
    stream: Arc<CudaStream>,
    parted: CudaEvent,
    ended: CudaEvent,
    /// Launches go there.
    taken: AtomicBool,
}

impl Branch {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        let event = || context.new_event(None).doing("create an event");
        Ok(Self {
            stream: context.new_stream().doing("create a stream")?,
            parted: event()?,
            ended: event()?,
            taken: AtomicBool::new(false),
        })
    }
}

impl Device {
    /// Lets the kernels that `work` launches run beside whatever is asked for until [`Self::join`], which must come before
    /// anything reads what they write or writes what they read. `work` copies nothing: copies keep to the device's stream.
    pub fn beside(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Beside, CudaError> {
        let Branch { stream, parted, ended, taken } = &self.branch;
        parted.record(&self.stream).doing("record an event")?;
        stream.wait(parted).doing("part a stream")?;
        self.await_all();
        taken.store(true, Ordering::Relaxed);
        let outcome = work();
        taken.store(false, Ordering::Relaxed);
        // Also after an error: what was recorded so far must end in the stream that it came from.
        ended.record(stream).doing("record an event")?;
        outcome.map(|()| Beside(()))
    }

    /// What is asked for from here on comes after `beside`.
    pub fn join(&self, Beside(()): Beside) -> Result<(), CudaError> {
        self.stream.wait(&self.branch.ended).doing("join streams")?;
        self.await_all();
        Ok(())
    }

    /// Where kernels are launched.
    pub(super) fn launching(&self) -> &CudaStream {
        if self.branch.taken.load(Ordering::Relaxed) { &self.branch.stream } else { &self.stream }
    }
}
