//! After a first call with the largest shapes, no operator allocates.
#![allow(unsafe_code)] // A global allocator is an unsafe trait.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use compute::{
    ActivationFormat, Activations, Cpu, HeadMatrices, KvFormat, KvGeometry, KvSlot, KvView, KvViewMut,
    Matrix, MlaRow, MlaShape, RopeRows, RopeTable, RoutingRule, ScaleFormat, Scoring, Selection,
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Buffers of one layer, and a step over them that touches every operator.
struct Step {
    cpu: Cpu,
    w: Matrix,
    heads: HeadMatrices,
    table: RopeTable,
    pool: Vec<u8>,
    geometry: KvGeometry,
    activations: Activations,
    x: Vec<f32>,
    y: Vec<f32>,
    out: Vec<f32>,
    ids: Vec<u16>,
    weights: Vec<f32>,
    wire: Vec<u8>,
}

const ROWS: usize = 9;
const WIDTH: usize = 512;
const HEADS: usize = 4;

impl Step {
    fn run(&mut self) {
        let (cpu, geometry) = (&self.cpu, self.geometry);
        cpu.rms_norm(&self.x, &self.x[..WIDTH], 1e-6, &mut self.y);
        for format in [ActivationFormat::Fp8(ScaleFormat::F32), ActivationFormat::F32] {
            self.activations.prepare(cpu, &self.y, ROWS, WIDTH, format);
            cpu.linear(&self.w, &self.activations, &mut self.out);
            cpu.linear_rows(&self.w, &self.activations, &[3, 1], &mut self.out[..2 * WIDTH]);
        }
        self.wire.clear();
        self.activations.encode_rows(0..ROWS, &mut self.wire);
        cpu.silu_mul(&self.out, &self.y, &mut self.x);
        cpu.add_in_place(&mut self.x, &self.out);
        let rows = RopeRows { per_position: 1, stride: WIDTH, offset: 0 };
        cpu.rope_interleaved(&mut self.x, rows, &[0, 1, 2, 3, 4, 5, 6, 7, 8], &self.table);
        let mut view = KvViewMut { bytes: &mut self.pool, geometry };
        for row in 0..ROWS as u32 {
            cpu.kv_write(&mut view, 0, KvSlot { block: 0, row }, &self.x[..128], &self.x[..64]);
        }
        cpu.head_matmul(&self.heads, &self.y, ROWS, &mut self.out);
        let shape = MlaShape { heads: HEADS, latent: 128, rope: 64, scale: 0.1, first: 0 };
        let rows = [MlaRow { block_table: &[0], context: ROWS as u32 }; ROWS];
        let view = KvView { bytes: &self.pool, geometry };
        cpu.mla_attention(&view, 0, shape, &rows, &self.x, &self.y[..ROWS * HEADS * 64], &mut self.out);
        let rule = RoutingRule {
            scoring: Scoring::Sigmoid,
            selection: Selection::NoauxTc,
            top_k: 8,
            groups: 8,
            groups_kept: 4,
            normalise: true,
            scale: 2.5,
        };
        cpu.route(&self.out, WIDTH, None, &rule, &mut self.ids, &mut self.weights);
    }
}

#[test]
fn a_warm_step_allocates_nothing() {
    let mut geometry = KvGeometry {
        format: KvFormat::Fp8,
        latent: 128,
        rope: 64,
        row_bytes: 0,
        layer_stride: 0,
        block_stride: 0,
        block_tokens: 64,
    };
    geometry.row_bytes = geometry.payload_bytes().next_multiple_of(16);
    geometry.layer_stride = 64 * geometry.row_bytes;
    geometry.block_stride = geometry.layer_stride;
    let mut step = Step {
        // One thread: which of several takes a task, and so warms its scratch, is chance.
        cpu: Cpu::new(1),
        w: Matrix::fp8(WIDTH, WIDTH, vec![0x30; WIDTH * WIDTH].into(), vec![1.0; 16]).expect("lengths fit"),
        heads: HeadMatrices::new(HEADS, 128, 128, vec![0.5; HEADS * 128 * 128]).expect("lengths fit"),
        table: RopeTable::new(&[1.0, 0.1], 1.0, 16),
        pool: vec![0; geometry.block_stride],
        geometry,
        activations: Activations::new(),
        x: vec![0.5; ROWS * WIDTH],
        y: vec![0.0; ROWS * WIDTH],
        out: vec![0.0; ROWS * WIDTH],
        ids: vec![0; ROWS * 8],
        weights: vec![0.0; ROWS * 8],
        wire: Vec::new(),
    };
    step.run();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    step.run();
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);

    // The pool's hand-over to other threads allocates nothing either.
    let pool = compute::ThreadPool::new(3, "test");
    // Each of the threads has to be there before what it allocated to start is behind us.
    let all = std::sync::Barrier::new(3);
    pool.run(3, &|_| {
        all.wait();
    });
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..100 {
        pool.run(16, &|_| {});
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}
