use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::ThreadPool;

#[test]
fn every_task_runs_once() {
    for threads in [0, 1, 2, 5] {
        let pool = ThreadPool::new(threads, "test");
        assert_eq!(pool.threads(), threads.max(1));
        for tasks in [0, 1, 2, 3, 64, 1000] {
            let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                "{threads} threads, {tasks} tasks"
            );
        }
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = ThreadPool::new(3, "test");
    for round in 0..50 {
        let result =
            catch_unwind(AssertUnwindSafe(|| pool.run(20, &|i| assert!(i != round % 20, "task {i}"))));
        let message = result.expect_err("a task panicked");
        assert!(message.downcast_ref::<String>().is_some_and(|m| m.contains("task")));
        let count = AtomicUsize::new(0);
        pool.run(20, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 20);
    }
}

#[test]
fn callers_take_turns() {
    let pool = ThreadPool::new(2, "test");
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    pool.run(7, &|_| {
                        total.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 4 * 100 * 7);
}
