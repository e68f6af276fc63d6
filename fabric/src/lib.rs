//! Bytes between memory regions of different workers.
