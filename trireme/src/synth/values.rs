//! Random weights at the speed of a disk.
//!
//! A normal value is the quantile of 16 random bits, so a tensor's 65,536 possible values are encoded once and then
//! looked up: four weights a random word, whatever the format. Pieces are drawn by all cores, each from a seed of its own
//! made of (seed, tensor, piece), so the bytes do not depend on their number.

use std::{io, sync::OnceLock};

use compute::fp8;
use model::Dtype;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::calibration::{CONSTANT_CHANNEL, Skew};
use super::plan::{Fill, Planned, ROUTER_DEVIATION, element_bytes};

/// Elements that share a seed.
const PIECE: usize = 1 << 18;
/// Pieces in memory at a time: 16 MB of BF16.
const PIECES_MAX: usize = 32;
/// Different values of a normal variable: quantiles of 16 bits.
const QUANTILES: usize = 1 << 16;
/// The outermost quantile, in standard deviations; what an FP8 block's largest code stands for.
const OUTERMOST: f64 = 4.17;

/// Where weights come from.
pub struct Draw<'a> {
    /// The command's seed.
    pub seed: u64,
    /// What routers prefer.
    pub skew: &'a Skew,
}

impl Draw<'_> {
    /// The tensor's bytes, little endian, piece by piece in order.
    pub fn tensor(&self, tensor: &Planned, write: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let seed = xxh3_64_with_seed(tensor.name.as_bytes(), self.seed);
        match tensor.fill {
            Fill::Normal(deviation) => normal(tensor, seed, deviation, None, write),
            Fill::Embedding => normal(tensor, seed, 1.0, self.skew.constant_channel(), write),
            Fill::Router(layer) => {
                let deviation = ROUTER_DEVIATION / (tensor.shape[1] as f64).sqrt();
                let mut bytes = Vec::new();
                normal(tensor, seed, deviation, None, &mut |piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                })?;
                if let Some(column) = self.skew.router_column(layer) {
                    let row_bytes = 2 * tensor.shape[1];
                    for (row, value) in bytes.chunks_exact_mut(row_bytes).zip(column) {
                        let at = 2 * CONSTANT_CHANNEL;
                        row[at..at + 2].copy_from_slice(&fp8::to_bf16(value).to_le_bytes());
                    }
                }
                write(&bytes)
            }
            Fill::Bias(layer) => {
                let bias = self.skew.bias(layer);
                write(&bias.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
            }
            Fill::Norm => {
                let mut random = SplitMix(seed);
                let quantiles = quantiles();
                let value = |_| fp8::to_bf16(1.0 + 0.1 * quantiles[random.word() as usize % QUANTILES]);
                let bytes = (0..tensor.elements()).map(value).flat_map(u16::to_le_bytes);
                write(&bytes.collect::<Vec<u8>>())
            }
            Fill::Scales(deviation) => {
                let mut random = SplitMix(seed);
                let nominal = deviation * OUTERMOST / f64::from(fp8::E4M3_MAX);
                // A fifth up or down from block to block, as trained weights have it: a scale that is applied to the wrong
                // block then shows.
                let scale = |_| (nominal * (0.4 * (random.uniform() - 0.5)).exp2()) as f32;
                write(&(0..tensor.elements()).map(scale).flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
            }
        }
    }
}

/// Normal values; where `constant` is given, it stands in the constant channel of every row.
fn normal(
    tensor: &Planned,
    seed: u64,
    deviation: f64,
    constant: Option<f32>,
    write: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let table = match tensor.dtype {
        Dtype::F8E4m3 => Table::Bytes(codes()),
        Dtype::Bf16 | Dtype::F32 => {
            Table::Halves(quantiles().iter().map(|q| fp8::to_bf16(q * deviation as f32)).collect())
        }
    };
    debug_assert_ne!(tensor.dtype, Dtype::F32, "no f32 tensor holds normal values");
    let width = element_bytes(tensor.dtype) as usize;
    let row = tensor.shape.last().copied().unwrap_or(1);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut buffer = Vec::new();
    let mut start = 0;
    while start < tensor.elements() {
        let count = (tensor.elements() - start).min(PIECE * PIECES_MAX);
        buffer.resize(count * width, 0);
        let share = count.div_ceil(threads).next_multiple_of(PIECE);
        std::thread::scope(|scope| {
            for (i, part) in buffer.chunks_mut(share * width).enumerate() {
                let first = start + i * share;
                let table = &table;
                let mut work = move || {
                    for (j, piece) in part.chunks_mut(PIECE * width).enumerate() {
                        table.fill(&mut SplitMix(mixed(seed, (first / PIECE + j) as u64)), piece);
                    }
                };
                // Most tensors of a small model are one piece: not worth a thread.
                if count <= PIECE { work() } else { drop(scope.spawn(work)) }
            }
        });
        if let Some(constant) = constant {
            let bits = fp8::to_bf16(constant).to_le_bytes();
            for index in (start..start + count).filter(|index| index % row == CONSTANT_CHANNEL) {
                buffer[(index - start) * 2..][..2].copy_from_slice(&bits);
            }
        }
        write(&buffer)?;
        start += count;
    }
    Ok(())
}

/// Encoded quantiles.
enum Table {
    Bytes(&'static [u8]),
    Halves(Vec<u16>),
}

impl Table {
    fn fill(&self, random: &mut SplitMix, out: &mut [u8]) {
        match self {
            Self::Bytes(table) => {
                for four in out.chunks_mut(4) {
                    let word = random.word();
                    for (i, byte) in four.iter_mut().enumerate() {
                        *byte = table[(word >> (16 * i)) as usize % QUANTILES];
                    }
                }
            }
            Self::Halves(table) => {
                for four in out.chunks_mut(8) {
                    let word = random.word();
                    for (i, half) in four.chunks_exact_mut(2).enumerate() {
                        half.copy_from_slice(&table[(word >> (16 * i)) as usize % QUANTILES].to_le_bytes());
                    }
                }
            }
        }
    }
}

/// E4M3 codes of the quantiles: one table for all, since a matrix's scales carry its deviation.
fn codes() -> &'static [u8] {
    static CODES: OnceLock<Vec<u8>> = OnceLock::new();
    let unit = fp8::E4M3_MAX / OUTERMOST as f32;
    CODES.get_or_init(|| quantiles().iter().map(|q| fp8::encode(q * unit)).collect())
}

/// Quantiles of the standard normal distribution at the middles of 65,536 equal parts.
pub fn quantiles() -> &'static [f32] {
    static QUANTILES_F32: OnceLock<Vec<f32>> = OnceLock::new();
    QUANTILES_F32.get_or_init(|| {
        (0..QUANTILES).map(|i| quantile((i as f64 + 0.5) / QUANTILES as f64) as f32).collect()
    })
}

/// The inverse of the normal distribution function by bisection of its series: exact to f32, and needs no table of
/// anybody's coefficients.
fn quantile(p: f64) -> f64 {
    if p > 0.5 {
        return -quantile(1.0 - p);
    }
    let (mut low, mut high) = (-5.0, 0.0);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if below(middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// The normal distribution function for `-5 <= x <= 0`: Φ(x) = 1/2 + φ(x) (x + x³/3 + x⁵/15 + …).
fn below(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-14 {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

/// Steele, Lea and Flood's SplitMix64: a counter through a mixer, so any seed is a good one.
pub struct SplitMix(pub u64);

impl SplitMix {
    /// 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Uniform in `0..1`.
    pub fn uniform(&mut self) -> f64 {
        (self.word() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A normal value of deviation one.
    pub fn normal(&mut self) -> f32 {
        quantiles()[self.word() as usize % QUANTILES]
    }
}

/// A seed from a seed and a number.
pub fn mixed(seed: u64, number: u64) -> u64 {
    mix(seed ^ mix(number.wrapping_add(0x9E37_79B9_7F4A_7C15)))
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
