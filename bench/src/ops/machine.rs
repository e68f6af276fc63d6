//! What the machine gives at best.

use compute::Cpu;
use serde::Serialize;

/// The ceilings, measured with the threads and the instruction set of the operators.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Threads.
    pub threads: usize,
    /// The instruction set in use.
    pub isa: &'static str,
    /// Reading memory in order.
    pub read_gb_per_s: f64,
    /// Multiply-adds of f32, two operations each.
    pub f32_gflop_per_s: f64,
    /// Products of bf16 summed in f32, which FP8 products are made of too.
    pub bf16_gflop_per_s: f64,
}

/// What arithmetic an operator is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 multiply-adds.
    F32,
    /// Products of bf16 or FP8.
    Bf16,
}

impl Machine {
    /// Runs the probes: about a second.
    pub fn measure(cpu: &Cpu) -> Self {
        Self {
            threads: cpu.pool().threads(),
            isa: cpu.isa().name(),
            read_gb_per_s: cpu.memory_read_bandwidth() / 1e9,
            f32_gflop_per_s: cpu.peak_f32() / 1e9,
            bf16_gflop_per_s: cpu.peak_bf16() / 1e9,
        }
    }

    /// The better of two measurements: other load only ever lowers a ceiling.
    pub fn better(self, other: Self) -> Self {
        Self {
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            f32_gflop_per_s: self.f32_gflop_per_s.max(other.f32_gflop_per_s),
            bf16_gflop_per_s: self.bf16_gflop_per_s.max(other.bf16_gflop_per_s),
            ..self
        }
    }

    /// Operations per second of an arithmetic, in billions.
    pub fn peak(&self, arithmetic: Arithmetic) -> f64 {
        match arithmetic {
            Arithmetic::F32 => self.f32_gflop_per_s,
            Arithmetic::Bf16 => self.bf16_gflop_per_s,
        }
    }
}
