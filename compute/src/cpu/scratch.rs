//! Working memory of a thread: grows to the largest task it has seen, then never allocates again.

use std::cell::RefCell;

/// One cache line, so that a buffer of them is aligned for the widest vectors.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static LINES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `body` with `len` values of scratch, aligned to 64 bytes, of unspecified content. Not to be nested.
pub(super) fn with_f32<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    LINES.with_borrow_mut(|lines| {
        let needed = len.div_ceil(16);
        if lines.len() < needed {
            lines.resize(needed, Line([0; 64]));
        }
        // SAFETY: the lines are initialised, exclusively borrowed for the call, at least `len * 4` bytes long, aligned
        // above what f32 asks for, and any bits are an f32.
        let scratch = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<f32>(), len) };
        body(scratch)
    })
}
