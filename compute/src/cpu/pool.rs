//! A fixed set of threads that run one indexed loop at a time.
//!
//! Task indices are handed out by an atomic counter, so a slow thread delays no others. A worker waits by spinning for
//! some 20 µs, since the next operator of a step usually follows within that time, and then parks: an idle process costs
//! nothing. `run` allocates nothing and takes one uncontended lock.

use std::any::Any;
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

// SAFETY: the pointee is `Sync`, and it outlives every use: `run` does not return before all workers left the job.
unsafe impl Send for Job {}

struct Shared {
    /// Number of the current job; a worker that sees a new number takes part in it.
    epoch: AtomicU64,
    job: Mutex<Option<Job>>,
    next: AtomicUsize,
    /// Workers that have not yet left the current job.
    busy: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

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
            epoch: AtomicU64::new(0),
            job: Mutex::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for i in 1..threads.max(1) {
            let shared = Arc::clone(&shared);
            match std::thread::Builder::new().name(format!("{name}-{i}")).spawn(move || work(&shared)) {
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
        // SAFETY: only the lifetime changes. The pointer is used by this thread and by workers between the epoch's
        // increment and their decrement of `busy`; this function leaves only after `busy` is zero, so `body` outlives
        // every use. Panics in a body are caught on both sides and cannot skip that wait.
        let body: Body = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Body>(body) };
        let job = Job { body, tasks };
        *lock(&shared.job) = Some(job);
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        // Release: a worker that sees the new epoch sees the stores above.
        shared.epoch.fetch_add(1, Ordering::Release);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        take_part(shared, job);
        wait_until(|| shared.busy.load(Ordering::Acquire) == 0);
        *lock(&shared.job) = None;
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

fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        let spin_until = Instant::now() + SPIN;
        loop {
            if shared.stop.load(Ordering::Acquire) {
                return;
            }
            if shared.epoch.load(Ordering::Acquire) != seen {
                break;
            }
            if Instant::now() < spin_until {
                std::hint::spin_loop();
            } else {
                // An `unpark` between the check above and this call makes it return at once.
                std::thread::park();
            }
        }
        // One epoch at a time: the next one cannot start before this worker left the present one.
        seen += 1;
        let job = *lock(&shared.job);
        if let Some(job) = job {
            take_part(shared, job);
        }
        // Release: whatever the bodies wrote is visible to the caller that sees zero.
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

/// Takes tasks until there are none left, or one panics.
fn take_part(shared: &Shared, job: Job) {
    // SAFETY: `run` keeps the body alive until every thread that calls this has left the job.
    let body = unsafe { &*job.body };
    loop {
        let task = shared.next.fetch_add(1, Ordering::Relaxed);
        if task >= job.tasks {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(task))) {
            // Nobody needs the remaining tasks: the caller will not see a result.
            shared.next.store(job.tasks, Ordering::Relaxed);
            lock(&shared.panic).get_or_insert(panic);
            return;
        }
    }
}

/// Spins, and after [`SPIN`] yields: a thread that finished last may have been put off the core.
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
