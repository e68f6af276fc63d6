//! What the process' allocator does with memory that is freed.
//!
//! The network's datagrams lie in buffers of tens of KiB, allocated by the I/O thread and freed by a device thread when it has copied
//! out of them, megabytes at a time. glibc gives whatever is free at a heap's top back to the system beyond 128 KiB, and takes it
//! again, zeroed, page by page: 75,000 page faults for a GB of 8,972-byte datagrams, measured, an eighth of what they cost in all.

#![expect(unsafe_code, reason = "glibc's settings have no other interface")]

/// Free memory at a heap's top that is kept.
const KEPT_BYTES: i32 = 256 << 20;
/// Larger allocations have pages of their own: where glibc's own adjustment of this ends, which setting the other turns off.
const OWN_PAGES_BYTES: i32 = 32 << 20;

/// Keeps freed memory for the allocations to come. For the start of a process, before its threads; nothing where the C library is
/// not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (setting, bytes) in [(libc::M_TRIM_THRESHOLD, KEPT_BYTES), (libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES)]
    {
        // SAFETY: sets one number of the allocator, under its lock; no memory of ours is touched.
        if unsafe { libc::mallopt(setting, bytes) } == 0 {
            tracing::debug!(setting, bytes, "the allocator does not know this");
        }
    }
}
