//! A pool in a device's memory: how rows get there and back while a step may be running.
//!
//! Copies have a stream of their own. Rows that are there can be read beside a step; what is written is on its way at once, and the
//! next step waits for it, not the host.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use compute::cuda::{Buffer, CudaError, Device, Pinned};
use model::KvLayout;

use crate::error::EngineError;

/// Pieces that are brought to the host together.
const AT_ONCE: usize = 8;
/// Pieces that can be on their way to the device: a hand-off's come one by one, and none waits for the one before it.
const LANDINGS: usize = 32;

/// The pool's memory, and what lies between it and the host.
pub(super) struct DeviceMemory {
    device: Arc<Device>,
    bytes: Buffer<u8>,
    /// A whole block, or rows of a layer of a few, page-locked.
    staging: RefCell<Pinned<u8>>,
    /// [`LANDINGS`] places of `stride` bytes, each for a layer of a block, written in place by whoever asked for it.
    landing: Pinned<u8>,
    stride: usize,
    /// The place written last, and where its first bytes belong if they are not on their way.
    place: usize,
    landed: Option<Range<usize>>,
    /// Whether some are that the device's next work does not wait for yet.
    sent: bool,
}

impl DeviceMemory {
    /// `size` bytes of memory, all zero.
    pub fn new(device: &Arc<Device>, layout: &KvLayout, size: usize) -> Result<Self, EngineError> {
        let mut bytes = device.alloc(size)?;
        device.fill(&mut bytes.view_mut(), 0)?;
        // Copies do not wait for it by themselves.
        device.synchronize()?;
        let stride = layout.layer_stride();
        Ok(Self {
            bytes,
            staging: RefCell::new(device.pinned(layout.block_bytes().max(AT_ONCE * stride))?),
            landing: device.pinned(LANDINGS * stride)?,
            stride,
            place: 0,
            landed: None,
            sent: false,
            device: Arc::clone(device),
        })
    }

    /// The pool, with everything that was written.
    pub fn bytes(&mut self) -> &mut Buffer<u8> {
        self.settle();
        &mut self.bytes
    }

    /// A place for what belongs at `range`, at most a layer of a block; what was put into the one before it is sent.
    pub fn land(&mut self, range: Range<usize>) -> &mut [u8] {
        self.send();
        self.place = (self.place + 1) % LANDINGS;
        if self.place == 0 {
            // The places' bytes may still be on their way.
            expect_device(self.device.finish_copies());
        }
        let start = self.place * self.stride;
        let bytes = start..start + range.len();
        self.landed = Some(range);
        &mut self.landing[bytes]
    }

    /// Sends what was written in place.
    pub fn send(&mut self) {
        if let Some(range) = self.landed.take() {
            let (start, to) = (self.place * self.stride, &mut self.bytes.slice_mut(range));
            expect_device(self.device.copy_in_beside(&self.landing, start, to));
            self.sent = true;
        }
    }

    /// What comes next on the device finds everything that was written.
    pub fn settle(&mut self) {
        self.send();
        if std::mem::take(&mut self.sent) {
            expect_device(self.device.after_copies());
        }
    }

    /// Writes a piece of at most a block.
    pub fn write(&mut self, range: Range<usize>, bytes: &[u8]) {
        // What was written there before comes first.
        self.send();
        let staging = self.staging.get_mut();
        staging[..bytes.len()].copy_from_slice(bytes);
        expect_device(self.device.copy_in_beside(staging, 0, &mut self.bytes.slice_mut(range)));
        expect_device(self.device.finish_copies());
    }

    /// Brings one piece of at most a block, or several of at most a layer of one, in turn to `each`. Beside the step that may be
    /// running: these rows are stored, or their observer was not told.
    pub fn read(&self, mut pieces: impl Iterator<Item = Range<usize>>, mut each: impl FnMut(&[u8])) {
        let mut staging = self.staging.borrow_mut();
        loop {
            let mut asked: [Range<usize>; AT_ONCE] = Default::default();
            let (mut count, mut end) = (0, 0);
            while count < AT_ONCE
                && let Some(range) = pieces.next()
            {
                let from = self.bytes.slice(range.clone());
                expect_device(self.device.copy_out_beside(from, &mut staging, end));
                end += range.len();
                asked[count] = range;
                count += 1;
            }
            if count == 0 {
                return;
            }
            expect_device(self.device.finish_copies());
            let mut start = 0;
            for range in &asked[..count] {
                let piece = &mut staging[start..start + range.len()];
                start += range.len();
                // What is not on its way yet.
                if let Some(landed) = self.landed.as_ref().filter(|landed| range.contains(&landed.start)) {
                    let (from, at) = (self.place * self.stride, landed.start - range.start);
                    piece[at..at + landed.len()].copy_from_slice(&self.landing[from..from + landed.len()]);
                }
                each(piece);
            }
        }
    }
}

/// A device that has failed gives nothing any more: its thread ends here, loudly, and the worker with it.
fn expect_device(outcome: Result<(), CudaError>) {
    if let Err(error) = outcome {
        tracing::error!(%error, cause = ?std::error::Error::source(&error), "the device failed");
        panic!("the device failed: {error}");
    }
}
