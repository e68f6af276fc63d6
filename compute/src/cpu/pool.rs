//! A fixed set of threads that run one indexed loop at a time.
//!
//! Each thread has a range of the task indices of its own, in order, so that what it reads from memory is one stream; a
//! thread that is through takes from the others' ranges, so that a slow one delays nobody. A worker waits by spinning for
//! some 20 µs, since the next operator of a step usually follows within that time, and then parks: an idle process costs
//! nothing. A loop waits for the workers that joined it, never for one to wake up: on a crowded machine the caller may
//! have done all the work by then. `run` allocates nothing.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SPIN: Duration = Duration::from_micros(20);

/// A loop body with its lifetime erased; see the safety argument in [`ThreadPool::run`].
type Body = *const (dyn Fn(usize) + Sync);

#[derive(Clone, Copy)]
struct Job {
    body: Body,
    tasks: usize,
}

/// The next task of a thread's range, in a cache line (two, as prefetchers take them) of its own.
#[derive(Default)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

/// The gate's layout: workers inside in the low 32 bits, then a bit that lets them in, then the loop's number.
const OPEN: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 33;

struct Shared {
    /// Who takes part in which loop. Workers enter only while it is open, by the same atomic step that counts them.
    gate: AtomicU64,
    /// The current loop. Written only while the gate is closed and nobody is inside; read only from inside.
    job: UnsafeCell<Option<Job>>,
    /// One per thread; the caller's is the first.
    cursors: Box<[Cursor]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

impl Shared {
    /// First task of a thread's range, of `tasks`; of the thread after the last one, their end.
    fn start(&self, tasks: usize, thread: usize) -> usize {
        tasks / self.cursors.len() * thread + tasks % self.cursors.len() * thread / self.cursors.len()
    }
}

// SAFETY: all but `job` is `Sync` by itself; `job` is guarded by the gate as its comment says, and what its pointer
// leads to is `Sync` and alive for as long as anybody is inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing is tied to a thread.
unsafe impl Send for Shared {}

/// Fixed threads for data-parallel loops; the caller of [`ThreadPool::run`] is one of them.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a loop runs: loops of several callers follow each other.
    turn: Mutex<()>,
}

impl ThreadPool {
    /// `threads` in all, the caller of `run` included; named `{name}-1`, `{name}-2`, … Threads that the system refuses
    /// are done without (and logged): the pool is then merely smaller.
    pub fn new(threads: usize, name: &str) -> Self {
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            cursors: (0..threads.max(1)).map(|_| Cursor::default()).collect(),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for i in 1..threads.max(1) {
            let shared = Arc::clone(&shared);
            match std::thread::Builder::new().name(format!("{name}-{i}")).spawn(move || work(&shared, i)) {
                Ok(worker) => workers.push(worker),
                Err(error) => {
                    tracing::warn!(%error, asked = threads, got = i, "no more threads for the pool");
                    break;
                }
            }
        }
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(0)`, …, `body(tasks - 1)`, each once, in any order and on any of the threads; returns when all are
    /// done. Must not be called from within a body.
    ///
    /// # Panics
    /// With the first panic of a body, after all threads have left the loop; the pool stays usable.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(body);
            return;
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by this thread and by workers inside the gate; this
        // function leaves only after the gate is closed and nobody is inside, so `body` outlives every use. Panics in
        // a body are caught on both sides and cannot skip that wait.
        let body: Body = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Body>(body) };
        let job = Job { body, tasks };
        // SAFETY: the gate is closed and nobody is inside: so the previous loop left it, and `turn` keeps others off.
        unsafe { *shared.job.get() = Some(job) };
        for (thread, cursor) in shared.cursors.iter().enumerate() {
            cursor.0.store(shared.start(tasks, thread), Ordering::Relaxed);
        }
        // Release: a worker that enters sees the stores above.
        let number = (shared.gate.load(Ordering::Relaxed) & !INSIDE).wrapping_add(NUMBER);
        shared.gate.store(number | OPEN, Ordering::Release);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        take_part(shared, job, 0);
        // Acquire, here and in the wait: what workers wrote is visible once they have left.
        shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        wait_until(|| shared.gate.load(Ordering::Acquire) & INSIDE == 0);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its bodies' panics, so there is nothing to hear from it.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut last = 0;
    while let Some(number) = enter(shared, last) {
        last = number;
        // SAFETY: this worker is inside, so nobody writes the job.
        if let Some(job) = unsafe { *shared.job.get() } {
            take_part(shared, job, thread);
        }
        // Release: what the bodies wrote is visible to the caller that sees nobody inside.
        shared.gate.fetch_sub(1, Ordering::Release);
    }
}

/// Waits for an open gate of another loop than `last` and enters; `None` when the pool ends.
fn enter(shared: &Shared, last: u64) -> Option<u64> {
    let spin_until = Instant::now() + SPIN;
    loop {
        if shared.stop.load(Ordering::Acquire) {
            return None;
        }
        let gate = shared.gate.load(Ordering::Relaxed);
        let number = gate / NUMBER;
        if gate & OPEN != 0 && number != last {
            // Acquire: the job and the counter that belong to this gate.
            if shared.gate.compare_exchange(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Some(number);
            }
        } else if Instant::now() < spin_until {
            std::hint::spin_loop();
        } else {
            // An `unpark` between the check above and this call makes it return at once.
            std::thread::park();
        }
    }
}

/// Takes tasks until there are none left, or one panics: first those of this thread's own range.
fn take_part(shared: &Shared, job: Job, thread: usize) {
    // SAFETY: `run` keeps the body alive until every thread that calls this has left the loop.
    let body = unsafe { &*job.body };
    let threads = shared.cursors.len();
    for owner in (thread..threads).chain(0..thread) {
        let cursor = &shared.cursors[owner].0;
        let end = shared.start(job.tasks, owner + 1);
        // Looked at first: most ranges of others are at their end, and counting on would take the line from their owner.
        while cursor.load(Ordering::Relaxed) < end {
            let task = cursor.fetch_add(1, Ordering::Relaxed);
            if task >= end {
                break;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(task))) {
                // Nobody needs the remaining tasks: the caller will not see a result.
                for cursor in shared.cursors.iter() {
                    cursor.0.store(job.tasks, Ordering::Relaxed);
                }
                lock(&shared.panic).get_or_insert(panic);
                return;
            }
        }
    }
}

/// Spins, and after [`SPIN`] yields: a thread with the last task may have been put off the core.
fn wait_until(done: impl Fn() -> bool) {
    let spin_until = Instant::now() + SPIN;
    while !done() {
        if Instant::now() < spin_until {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Data behind these locks is whole at any time, so a poisoned lock is as good as a healthy one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
