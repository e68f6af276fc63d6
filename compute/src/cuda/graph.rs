//! Steps recorded once and replayed: a launch for a whole step instead of one for each kernel.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::error::Doing;
use super::{CudaError, Device};

/// Recorded work. It names memory by address: whoever records keeps that memory for as long as the graph.
pub struct Graph {
    executable: sys::CUgraphExec,
    stream: Arc<CudaStream>,
}

// SAFETY: a handle that any thread may use; launches are ordered by the one stream.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.stream.context().bind_to_thread();
        let _ = self.stream.synchronize();
        // SAFETY: made by `Device::record`, destroyed once, and nothing of it is still running.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}

impl Device {
    /// Records what `work` asks of the device instead of doing it. `work` may launch kernels and copy between device and
    /// page-locked memory; it must neither wait nor allocate. What other threads ask of devices of their own meanwhile does not
    /// matter, as long as nobody waits for all that a context does.
    pub fn record<E: From<CudaError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the device's own stream, not capturing: recording does not nest.
        unsafe { result::stream::begin_capture(stream, mode) }.doing("record a step")?;
        self.await_all();
        let outcome = work();
        self.await_all();
        // SAFETY: begun above; ended in any case.
        let graph = unsafe { result::stream::end_capture(stream) }.doing("record a step");
        // A call that failed also ends the recording, and says more.
        let graph = match (outcome, graph) {
            (Ok(()), graph) => graph?,
            (Err(error), graph) => {
                // SAFETY: what was recorded until then, if anything, is nobody's.
                let _ = graph.map(|graph| unsafe { result::graph::destroy(graph) });
                return Err(error);
            }
        };
        let mut executable = std::ptr::null_mut();
        // SAFETY: a graph just recorded, an out-pointer to a live handle.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }.result();
        // SAFETY: no longer needed once there is an executable, or none.
        let _ = unsafe { result::graph::destroy(graph) };
        made.doing("prepare a recorded step")?;
        Ok(Graph { executable, stream: self.stream.clone() })
    }

    /// Does what was recorded.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.bind()?;
        self.await_all();
        // SAFETY: an executable graph of this device, whose memory its owner keeps.
        unsafe { sys::cuGraphLaunch(graph.executable, self.stream.cu_stream()) }
            .result()
            .doing("replay a recorded step")
    }
}
