//! `trireme bench ops`: the operators that a step is made of, each at the shapes of a model, beside what the machine gives.
//!
//! The ceilings (a stream of reads, chains of multiply-adds) are measured in the same run, at its begin and its end, so that a share means something
//! on a machine whose figures nobody knows. Weights come from memory, not from a cache: the calls of one figure walk over
//! as many matrices as a model has layers for. The best call counts, since other load can only slow one down; the median
//! stands in the JSON.

mod gpu;
mod machine;
mod operators;
mod shapes;
mod timing;

use std::path::PathBuf;
use std::time::Duration;

use compute::Cpu;
use model::Device;
use serde::Serialize;

pub use gpu::GpuFigure;
pub use machine::Machine;
pub use shapes::{ModelShapes, Shapes};
pub use timing::{Effort, Figure};

use crate::json_file::JsonFile;
use crate::table::{aligned, number};

/// Bytes of weights that the calls of a figure walk over: more than the last-level cache of any CPU we know.
const WEIGHT_BYTES: usize = 512 << 20;

/// Flags of `trireme bench ops`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where to run them: cpu or cuda:N (DeepSeek-V3's shapes).
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Threads, this one included. Default: all cores.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Whose shapes.
    #[arg(long, value_enum, default_value_t = ModelShapes::Synth)]
    pub model_shapes: ModelShapes,
    /// Milliseconds spent on each figure; three calls at least.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub figure_ms: u64,
    /// Write everything measured here.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What the machine gives.
    pub machine: Machine,
    /// Whose shapes.
    pub model: &'static str,
    /// One per operator and shape.
    pub figures: Vec<Figure>,
}

/// Measures, prints the table and writes the JSON file.
///
/// # Errors
/// The file cannot be written, or there is no such device.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let json = JsonFile::create(args.json.as_deref())?;
    if let Device::Cuda(ordinal) = args.device {
        return gpu::run(ordinal as usize, json);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = Cpu::new(args.threads.map_or(cores, usize::from));
    let effort = Effort { time: Duration::from_millis(args.figure_ms), weight_bytes: WEIGHT_BYTES };
    let report = measure(&cpu, args.model_shapes, effort)?;
    print!("{}", render(&report));
    if let Some(file) = json {
        file.write(&report)?;
    }
    Ok(())
}

/// Measures every operator.
///
/// # Errors
/// There is not the memory.
pub fn measure(cpu: &Cpu, model: ModelShapes, effort: Effort) -> anyhow::Result<Report> {
    eprintln!("measuring the machine …");
    let before = Machine::measure(cpu);
    let mut figures = operators::all(cpu, &model.shapes(), effort)?;
    let machine = before.better(Machine::measure(cpu));
    figures.iter_mut().for_each(|figure| figure.judge(&machine));
    Ok(Report { machine, model: model.name(), figures })
}

fn render(report: &Report) -> String {
    let Machine { threads, isa, read_gb_per_s, f32_gflop_per_s, bf16_gflop_per_s } = &report.machine;
    let mut rows = vec![
        ["operator", "shape", "rows", "µs", "GB/s", "GFLOP/s", "bound by", "share"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for figure in &report.figures {
        let share = figure.share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0));
        rows.push(vec![
            figure.operator.to_owned(),
            figure.shape.clone(),
            figure.rows.to_string(),
            number(figure.best_us),
            number(figure.gb_per_s),
            figure.gflop_per_s.map_or_else(|| "-".to_owned(), number),
            figure.bound.name().to_owned(),
            share,
        ]);
    }
    format!(
        "{} shapes; {threads} threads, {isa}: reads {} GB/s, f32 {} GFLOP/s, bf16 {} GFLOP/s\n\n{}",
        report.model,
        number(*read_gb_per_s),
        number(*f32_gflop_per_s),
        number(*bf16_gflop_per_s),
        aligned(&rows)
    )
}

#[cfg(test)]
mod tests;
