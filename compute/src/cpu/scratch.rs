//! Working memory of a thread: grows to the largest task it has seen, then never allocates again.

use std::cell::RefCell;

use crate::aligned::Aligned;

thread_local! {
    static SCRATCH: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
}

/// Calls `body` with `len` values of scratch, aligned to 64 bytes, of unspecified content. Not to be nested.
pub(super) fn with_f32<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.set_len(len);
        body(scratch)
    })
}
