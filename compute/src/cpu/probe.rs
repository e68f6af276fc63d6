//! What the machine gives at best, to hold operators against.

use std::hint::black_box;
use std::time::Instant;

use super::Cpu;
use super::vector::{self, Operation, Vector};

/// Rounds of a probe; the best one counts, since anything else on the machine can only slow one down.
const ROUNDS: usize = 32;

/// Bytes that the read probe walks over, a part per round: far more than a last-level cache.
const READ_BYTES: usize = 512 << 20;
/// Bytes of a round.
const ROUND_BYTES: usize = 32 << 20;

/// Multiply-adds in a row of each of the probe's independent sums.
const CHAIN: usize = 4096;
/// Independent sums: latency times throughput of any core, with room.
const CHAINS: usize = 12;

impl Cpu {
    /// Bytes per second that all threads together read from memory, in order.
    pub fn memory_read_bandwidth(&self) -> f64 {
        // On huge pages, as weights are.
        let written = crate::Arena::new().take(READ_BYTES, |bytes| bytes.fill(0x3F));
        let Ok(memory) = written else { return f64::NAN };
        let tasks = self.pool.threads() * 8;
        let size = ROUND_BYTES / tasks;
        let seconds = best_of(|round| {
            let memory = &memory[super::part(round % (READ_BYTES / ROUND_BYTES), ROUND_BYTES, memory.len())];
            self.pool.run(tasks, &|task| {
                let mut sum = 0.0;
                vector::run(self.isa, Read { memory: &memory[task * size..][..size], sum: &mut sum });
                black_box(sum);
            });
        });
        (tasks * size) as f64 / seconds
    }

    /// Operations per second (a multiply-add is two) of all threads together in f32.
    pub fn peak_f32(&self) -> f64 {
        let threads = self.pool.threads();
        let mut lanes = [0; 1];
        vector::run(self.isa, MultiplyAdd { sum: &mut 0.0, lanes: &mut lanes[0] });
        let seconds = best_of(|_| {
            self.pool.run(threads * 64, &|_| {
                let (mut sum, mut lanes) = (0.0, 0);
                vector::run(self.isa, MultiplyAdd { sum: &mut sum, lanes: &mut lanes });
                black_box(sum);
            });
        });
        (2 * threads * 64 * CHAIN * CHAINS * lanes[0]) as f64 / seconds
    }

    /// Operations per second (a multiply-add is two) of all threads together in bf16 products summed in f32, which FP8
    /// products are made of as well; where the instruction set has none, they are f32's.
    pub fn peak_bf16(&self) -> f64 {
        #[cfg(target_arch = "x86_64")]
        if self.isa == super::Isa::Avx512 {
            let tasks = self.pool.threads() * 64;
            // SAFETY: this instruction set includes AVX512-BF16, and the machine has it.
            let count = unsafe { dot_products() };
            let seconds = best_of(|_| {
                self.pool.run(tasks, &|_| {
                    // SAFETY: as above.
                    black_box(unsafe { dot_products() });
                });
            });
            return (2 * tasks * count) as f64 / seconds;
        }
        self.peak_f32()
    }
}

/// As [`MultiplyAdd`] with pairs of bf16: the multiply-adds that were done.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_products() -> usize {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_reduce_add_ps, _mm512_set1_epi16, _mm512_set1_ps,
    };
    let half: __m512i = _mm512_set1_epi16(black_box(0x3F00));
    // SAFETY: both are 512 bits of plain data.
    let x: __m512bh = unsafe { std::mem::transmute::<__m512i, __m512bh>(half) };
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..CHAIN {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, x);
        }
    }
    for sum in sums {
        black_box(_mm512_reduce_add_ps(sum));
    }
    32 * CHAIN * CHAINS
}

/// Seconds of the fastest round.
fn best_of(mut run: impl FnMut(usize)) -> f64 {
    let mut best = f64::INFINITY;
    for round in 0..ROUNDS {
        let start = Instant::now();
        run(round);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

struct Read<'a> {
    memory: &'a [u8],
    sum: &'a mut f32,
}

impl Operation for Read<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: the machine has the instruction set; four whole vectors are left in the slice.
        unsafe {
            let mut sums = [V::splat(0.0); 4];
            let memory = self.memory.as_ptr().cast::<f32>();
            let mut i = 0;
            while i + 4 * V::LANES <= self.memory.len() / 4 {
                let mut j = 0;
                while j < 4 {
                    sums[j] = sums[j].max(V::load(memory.add(i + j * V::LANES)));
                    j += 1;
                }
                i += 4 * V::LANES;
            }
            *self.sum = sums[0].max(sums[1]).max(sums[2].max(sums[3])).largest();
        }
    }
}

struct MultiplyAdd<'a> {
    sum: &'a mut f32,
    lanes: &'a mut usize,
}

impl Operation for MultiplyAdd<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: the machine has the instruction set.
        unsafe {
            let (x, mut sums) = (V::splat(black_box(0.5)), [V::splat(1.0); CHAINS]);
            let mut i = 0;
            while i < CHAIN {
                let mut j = 0;
                while j < CHAINS {
                    sums[j] = sums[j].mul_add(x, x);
                    j += 1;
                }
                i += 1;
            }
            let mut total = V::splat(0.0);
            let mut j = 0;
            while j < CHAINS {
                total = total.add(sums[j]);
                j += 1;
            }
            *self.sum = total.sum();
            *self.lanes = V::LANES;
        }
    }
}
