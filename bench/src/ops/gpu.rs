//! The same question on a GPU: DeepSeek-V3's operators at the shapes that other kernels were timed at.
//!
//! A figure is the median of several replays of a recorded run of calls, between two events on the device, weights rotated
//! so that the level-2 cache is cold. A call's two floors are its bytes over the H200's measured copy bandwidth and its
//! operations over its matrix rate; the peer is the best existing kernel measured on the same kind of machine (docs/kernels.md).

mod attention;
mod products;
mod rows;

use compute::cuda::{CudaError, Device};
use serde::Serialize;

use crate::json_file::JsonFile;
use crate::table::{aligned, number};

/// Bytes per second that a device-to-device copy reads plus writes on an H200, measured.
const COPY_BYTES_PER_S: f64 = 4.2e12;
/// Dense bf16 operations per second of an H200, measured through a library; FP8 has twice that.
const BF16_PER_S: f64 = 790e12;
/// Bytes of weights that a round of calls goes through at least: twice the level-2 cache.
const ROUND_BYTES: usize = 120 << 20;
/// Milliseconds that a recorded run of calls takes, about, and how often it is replayed.
const RUN_MS: f32 = 4.0;
const REPLAYS: usize = 7;

/// One operator at one shape.
#[derive(Debug, Clone, Serialize)]
pub struct GpuFigure {
    /// The operator and its shape.
    pub operator: String,
    /// Microseconds of a call.
    pub us: f64,
    /// What its bytes take at least.
    pub bytes_floor_us: f64,
    /// What its operations take at least.
    pub operations_floor_us: f64,
    /// Bytes that have to be read and written, over its time, in terabytes per second.
    pub tb_per_s: f64,
    /// Operations over its time, a multiply-add being two.
    pub tflop_per_s: f64,
    /// Its time over that of the best existing kernel, where one was measured.
    pub times_peer: Option<f64>,
}

/// What a call has to move and to compute.
#[derive(Clone, Copy)]
struct Work {
    bytes: usize,
    operations: f64,
    /// Whether the operations are FP8's.
    fp8: bool,
    /// Microseconds of the best existing kernel, 0 where none was measured.
    peer_us: f64,
}

/// Times calls on a device.
struct Bench<'a> {
    device: &'a Device,
    figures: Vec<GpuFigure>,
    seed: u64,
}

impl Bench<'_> {
    /// Times `call(i)` for i = 0..; it may neither wait nor allocate.
    fn time(
        &mut self,
        operator: String,
        work: Work,
        mut call: impl FnMut(usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        call(0)?;
        let once = self.device.time_ms(|| call(1))?;
        let calls = ((RUN_MS / once.max(1e-3)) as usize).clamp(2, 200);
        let run = self.device.record(|| (0..calls).try_for_each(&mut call))?;
        self.device.replay(&run)?;
        let mut times = Vec::with_capacity(REPLAYS);
        for _ in 0..REPLAYS {
            times.push(self.device.time_ms(|| self.device.replay(&run))? / calls as f32);
        }
        times.sort_by(f32::total_cmp);
        let us = f64::from(times[REPLAYS / 2]) * 1e3;
        let rate = if work.fp8 { 2.0 * BF16_PER_S } else { BF16_PER_S };
        self.figures.push(GpuFigure {
            operator,
            us,
            bytes_floor_us: work.bytes as f64 / COPY_BYTES_PER_S * 1e6,
            operations_floor_us: work.operations / rate * 1e6,
            tb_per_s: work.bytes as f64 / us / 1e6,
            tflop_per_s: work.operations / us / 1e6,
            times_peer: (work.peer_us > 0.0).then_some(us / work.peer_us),
        });
        Ok(())
    }

    /// A seed that no other data has.
    fn seed(&mut self) -> u64 {
        self.seed += 1;
        self.seed
    }
}

/// Measures, prints the table and writes the JSON file.
///
/// # Errors
/// There is no such device, or it fails.
pub(super) fn run(ordinal: usize, json: Option<JsonFile>) -> anyhow::Result<()> {
    let device = Device::open(ordinal)?;
    // Each by itself: what a step gains by starting the next one early shows in `bench engine`.
    device.overlap(false);
    let mut bench = Bench { device: &device, figures: Vec::new(), seed: 0 };
    eprintln!("{} {} …", device.name(), device.architecture());
    products::dense(&mut bench)?;
    products::experts(&mut bench)?;
    products::bf16(&mut bench)?;
    rows::all(&mut bench)?;
    attention::all(&mut bench)?;
    print!("{}", render(&bench.figures));
    if let Some(file) = json {
        file.write(&bench.figures)?;
    }
    Ok(())
}

fn render(figures: &[GpuFigure]) -> String {
    let mut table = vec![
        ["operator", "µs", "bytes µs", "operations µs", "TB/s", "TFLOP/s", "share", "× peer"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for figure in figures {
        table.push(vec![
            figure.operator.clone(),
            number(figure.us),
            number(figure.bytes_floor_us),
            number(figure.operations_floor_us),
            number(figure.tb_per_s),
            number(figure.tflop_per_s),
            format!("{:.0} %", figure.bytes_floor_us.max(figure.operations_floor_us) / figure.us * 100.0),
            figure.times_peer.map_or_else(|| "-".to_owned(), |times| format!("{times:.2}")),
        ]);
    }
    aligned(&table)
}
