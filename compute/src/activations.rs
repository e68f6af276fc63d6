//! Activations on their way into a matrix: rounded or quantised, in memory and on the wire.

use std::ops::Range;

use crate::aligned::Aligned;
use crate::cpu::{Cpu, Disjoint, ScaleRule, part};
use crate::fp8::{self, BLOCK, ScaleFormat};

/// Values of a task when rows are taken in: some 3 µs, twice that with SwiGLU.
const TASK_VALUES: usize = 4 * 1024;
/// What a value counts for when it is decided whether to wake other threads: quantising one takes eight times a copy.
const VALUE_WORK: usize = 8;

/// What activations are rounded to before a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationFormat {
    /// As they are.
    F32,
    /// Rounded to bf16.
    Bf16,
    /// E4M3 per token and 128 channels, with a scale of the given format.
    Fp8(ScaleFormat),
}

impl ActivationFormat {
    /// Bytes of one row of `k` channels on the wire: for FP8 `k` codes, then `ceil(k/128)` f32 scales; else the values.
    /// All little endian.
    pub fn wire_row_bytes(self, k: usize) -> usize {
        match self {
            Self::F32 => 4 * k,
            Self::Bf16 => 2 * k,
            Self::Fp8(_) => k + 4 * k.div_ceil(BLOCK),
        }
    }
}

/// Bytes that are no activations of the announced shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Wrong length.
    #[error("{rows} activation rows of {channels} channels take {expected} bytes, got {got}")]
    Length {
        /// Rows announced.
        rows: usize,
        /// Channels announced.
        channels: usize,
        /// Bytes that they take.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
}

/// Where rows come from, `[m, k]`.
#[derive(Clone, Copy)]
enum Rows<'a> {
    Plain(&'a [f32]),
    /// `silu(gate) · up`
    SwiGlu {
        gate: &'a [f32],
        up: &'a [f32],
    },
}

/// A reusable buffer of activation rows `[m, k]` in one format.
///
/// Rows start at cache lines. FP8 rows are kept as codes for the wire and as bf16 for the product; the conversion is
/// exact.
pub struct Activations {
    format: ActivationFormat,
    rows: usize,
    channels: usize,
    pub(crate) f32: Aligned<f32>,
    pub(crate) bf16: Aligned<u16>,
    codes: Vec<u8>,
    pub(crate) scales: Vec<f32>,
    /// Whether codes are expanded for a product on the CPU.
    expands: bool,
    /// Room is made for so many rows at least.
    rows_max: usize,
}

impl Default for Activations {
    fn default() -> Self {
        Self::new()
    }
}

impl Activations {
    /// An empty buffer. It grows to the largest batch it is given and stays there.
    pub fn new() -> Self {
        Self {
            format: ActivationFormat::F32,
            rows: 0,
            channels: 0,
            f32: Aligned::new(),
            bf16: Aligned::new(),
            codes: Vec::new(),
            scales: Vec::new(),
            expands: true,
            rows_max: 0,
        }
    }

    /// A buffer that makes room for `rows_max` rows when it takes its first ones, and allocates nothing from then on: not even for
    /// the first large batch after many small ones.
    pub fn with_rows(rows_max: usize) -> Self {
        Self { rows_max, ..Self::new() }
    }

    /// A buffer whose FP8 rows are kept as codes only: on their way to another device or worker. The CPU cannot multiply
    /// by them, nor [`Self::value`] show them.
    pub fn in_transit() -> Self {
        Self { expands: false, ..Self::new() }
    }

    /// Codes `[m, k]` and scales `[m, ceil(k/128)]` of FP8 rows; of others, nothing.
    pub(crate) fn codes(&self) -> (&[u8], &[f32]) {
        (&self.codes, &self.scales)
    }

    /// Takes rows `x` `[m, k]`, rounding or quantising them: FP8 per row and 128 channels with
    /// `scale = max(amax, 1e-4) / 448`, nearest even.
    ///
    /// # Panics
    /// If `x` is not `m * k` long.
    pub fn prepare(&mut self, cpu: &Cpu, x: &[f32], m: usize, k: usize, format: ActivationFormat) {
        assert_eq!(x.len(), m * k, "activations [{m}, {k}]");
        self.take_rows(cpu, Rows::Plain(x), [m, k], format);
    }

    /// As [`Self::prepare`] of `silu(gate) · up`, which is nowhere written.
    ///
    /// # Panics
    /// If `gate` or `up` is not `m * k` long.
    pub fn prepare_swiglu(
        &mut self,
        cpu: &Cpu,
        [gate, up]: [&[f32]; 2],
        m: usize,
        k: usize,
        format: ActivationFormat,
    ) {
        assert!(gate.len() == m * k && up.len() == m * k, "gate and up [{m}, {k}]");
        self.take_rows(cpu, Rows::SwiGlu { gate, up }, [m, k], format);
    }

    fn take_rows(&mut self, cpu: &Cpu, rows: Rows<'_>, [m, k]: [usize; 2], format: ActivationFormat) {
        self.shape(m, k, format);
        if m == 0 || k == 0 {
            return;
        }
        let (stride, blocks) = (self.stride(), k.div_ceil(BLOCK));
        let (wide, bf16) = (Disjoint::new(&mut self.f32), Disjoint::new(&mut self.bf16));
        let (codes, scales) = (Disjoint::new(&mut self.codes), Disjoint::new(&mut self.scales));
        let take = |row: usize, x: &[f32]| {
            let values = row * stride..row * stride + k;
            // SAFETY: tasks have different rows, and a row's parts are taken once each.
            unsafe {
                match format {
                    ActivationFormat::F32 => wide.part(values).copy_from_slice(x),
                    ActivationFormat::Bf16 => cpu.f32_to_bf16(x, bf16.part(values)),
                    ActivationFormat::Fp8(format) => {
                        let rule = ScaleRule { amax_min: fp8::ACTIVATION_AMAX_MIN, format };
                        let codes = codes.part(row * k..(row + 1) * k);
                        cpu.quantise_row(x, rule, codes, scales.part(row * blocks..(row + 1) * blocks));
                        cpu.e4m3_to_bf16(codes, bf16.part(values));
                    }
                }
            }
        };
        let work = m * k * if format == ActivationFormat::F32 { 1 } else { VALUE_WORK };
        let rows_per_task = (TASK_VALUES / k).max(1);
        cpu.divide(m.div_ceil(rows_per_task), work, &|task| {
            for row in part(task, rows_per_task, m) {
                let values = row * k..(row + 1) * k;
                match rows {
                    Rows::Plain(x) => take(row, &x[values]),
                    Rows::SwiGlu { gate, up } => {
                        cpu.silu_mul_row(&gate[values.clone()], &up[values], |x| take(row, x));
                    }
                }
            }
        });
    }

    /// Takes `m` rows of `k` channels as [`Self::encode_rows`] wrote them. Any bytes of the right length are taken:
    /// strange values give strange numbers, nothing worse.
    pub fn read_wire(
        &mut self,
        format: ActivationFormat,
        m: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<(), WireError> {
        let row_bytes = format.wire_row_bytes(k);
        let expected = m.saturating_mul(row_bytes);
        if bytes.len() != expected {
            return Err(WireError::Length { rows: m, channels: k, expected, got: bytes.len() });
        }
        self.shape(m, k, format);
        if m == 0 || k == 0 {
            return Ok(());
        }
        let stride = self.stride();
        let blocks = k.div_ceil(BLOCK);
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            match format {
                ActivationFormat::F32 => {
                    for (out, bytes) in self.f32[row * stride..].iter_mut().zip(bytes.chunks_exact(4)) {
                        *out = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    }
                }
                ActivationFormat::Bf16 => {
                    for (out, bytes) in self.bf16[row * stride..].iter_mut().zip(bytes.chunks_exact(2)) {
                        *out = u16::from_le_bytes([bytes[0], bytes[1]]);
                    }
                }
                ActivationFormat::Fp8(_) => {
                    let (codes, scales) = bytes.split_at(k);
                    self.codes[row * k..][..k].copy_from_slice(codes);
                    if self.expands {
                        for (out, &code) in self.bf16[row * stride..].iter_mut().zip(codes) {
                            *out = fp8::E4M3_TO_BF16[usize::from(code)];
                        }
                    }
                    for (out, bytes) in self.scales[row * blocks..].iter_mut().zip(scales.chunks_exact(4)) {
                        *out = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    }
                }
            }
        }
        Ok(())
    }

    /// A new buffer holding rows from the wire; see [`Self::read_wire`].
    pub fn from_wire(format: ActivationFormat, m: usize, k: usize, bytes: &[u8]) -> Result<Self, WireError> {
        let mut activations = Self::new();
        activations.read_wire(format, m, k, bytes)?;
        Ok(activations)
    }

    /// Appends one row in wire form ([`ActivationFormat::wire_row_bytes`] bytes).
    ///
    /// # Panics
    /// If there is no such row.
    pub fn encode_row(&self, row: usize, out: &mut Vec<u8>) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (k, stride) = (self.channels, self.stride());
        out.reserve(self.format.wire_row_bytes(k));
        match self.format {
            ActivationFormat::F32 => {
                out.extend(self.f32[row * stride..][..k].iter().flat_map(|x| x.to_le_bytes()));
            }
            ActivationFormat::Bf16 => {
                out.extend(self.bf16[row * stride..][..k].iter().flat_map(|x| x.to_le_bytes()));
            }
            ActivationFormat::Fp8(_) => {
                let blocks = k.div_ceil(BLOCK);
                out.extend_from_slice(&self.codes[row * k..][..k]);
                out.extend(self.scales[row * blocks..][..blocks].iter().flat_map(|x| x.to_le_bytes()));
            }
        }
    }

    /// Appends rows in wire form, one after the other.
    ///
    /// # Panics
    /// If the range reaches past the rows.
    pub fn encode_rows(&self, rows: Range<usize>, out: &mut Vec<u8>) {
        for row in rows {
            self.encode_row(row, out);
        }
    }

    /// Value `(row, channel)` as the product sees it, scale included.
    pub fn value(&self, row: usize, channel: usize) -> f32 {
        let i = row * self.stride() + channel;
        match self.format {
            ActivationFormat::F32 => self.f32[i],
            ActivationFormat::Bf16 => fp8::from_bf16(self.bf16[i]),
            ActivationFormat::Fp8(_) => {
                let scale = self.scales[row * self.channels.div_ceil(BLOCK) + channel / BLOCK];
                fp8::from_bf16(self.bf16[i]) * scale
            }
        }
    }

    /// Number of rows (`m`).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Channels of a row (`k`).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// What the rows are rounded to.
    pub fn format(&self) -> ActivationFormat {
        self.format
    }

    /// Values from one row to the next in `f32` and `bf16`: whole cache lines.
    pub(crate) fn stride(&self) -> usize {
        self.channels.next_multiple_of(64 / size_of::<u16>())
    }

    /// Sizes the buffers for `[m, k]`.
    fn shape(&mut self, m: usize, k: usize, format: ActivationFormat) {
        (self.rows, self.channels, self.format) = (m, k, format);
        let fp8 = matches!(format, ActivationFormat::Fp8(_));
        let expanded = self.expands || !fp8;
        let room = m.max(self.rows_max);
        // What a buffer once had room for stays.
        for rows in [room, m] {
            let padded = rows * self.stride();
            self.f32.set_len(if format == ActivationFormat::F32 { padded } else { 0 });
            self.bf16.set_len(if format == ActivationFormat::F32 || !expanded { 0 } else { padded });
        }
        self.codes.clear();
        self.scales.clear();
        if fp8 {
            self.codes.reserve(room * k);
            self.scales.reserve(room * k.div_ceil(BLOCK));
        }
        self.codes.resize(if fp8 { m * k } else { 0 }, 0);
        self.scales.resize(if fp8 { m * k.div_ceil(BLOCK) } else { 0 }, 0.0);
        // Products take two channels at a time: behind an odd last one there is a zero.
        if k % 2 == 1 {
            let stride = self.stride();
            self.f32.iter_mut().skip(k).step_by(stride).for_each(|value| *value = 0.0);
            self.bf16.iter_mut().skip(k).step_by(stride).for_each(|value| *value = 0);
        }
    }
}
