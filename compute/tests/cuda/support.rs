//! The device, random data, and comparison.

use std::sync::OnceLock;

use compute::cuda::{Buffer, CudaError, Device, Element, View};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The machine's first GPU.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| Device::open(0).expect("a CUDA device"))
}

/// Whether only a few small shapes are wanted, from `TRIREME_TEST_SMALL`: a tool that watches every access of a kernel takes a
/// hundred times as long.
pub fn small() -> bool {
    std::env::var_os("TRIREME_TEST_SMALL").is_some()
}

/// Of `count` rows those that are compared with their batch: all, or the first and the last.
pub fn compared(count: usize) -> impl Iterator<Item = usize> {
    (0..count).filter(move |&row| !small() || row == 0 || row + 1 == count)
}

/// A generator whose seed is new in every run, and printed.
pub fn fresh() -> StdRng {
    let seed = rand::rng().random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

/// Uniform in -1..1, now and then a hundred times as large, as activations are.
pub fn floats(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let x = rng.random_range(-1.0f32..1.0);
            if rng.random_range(0..50) == 0 { x * 100.0 } else { x }
        })
        .collect()
}

/// Memory of all ones: NaN as floats, and no code, id or token that a test could expect.
pub fn poisoned<T: Element>(device: &Device, len: usize) -> Buffer<T> {
    let mut buffer = device.alloc(len).expect("memory");
    device.fill(&mut buffer.view_mut(), 0xFF).expect("fill");
    buffer
}

/// Runs `operator` on a poisoned output of `len` values and gives what it wrote.
pub fn output<T: Element + Default>(
    device: &Device,
    len: usize,
    operator: impl FnOnce(&mut Buffer<T>) -> Result<(), CudaError>,
) -> Vec<T> {
    let mut buffer = poisoned(device, len);
    operator(&mut buffer).unwrap_or_else(|error| panic!("{error:?}"));
    read(device, buffer.view())
}

pub fn read<T: Element + Default>(device: &Device, view: View<'_, T>) -> Vec<T> {
    let mut values = vec![T::default(); view.len()];
    device.copy_out(view, &mut values).unwrap_or_else(|error| panic!("{error:?}"));
    values
}

/// ‖got − expected‖ / ‖expected‖ at most `tolerance`; one unwritten (NaN) or wrong value is enough to exceed it.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut got.iter().zip(expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let size = norm(&mut expected.iter().map(|&x| f64::from(x)));
    println!("{what}: distance {distance:.1e} of {size:.1e}, {tolerance:.0e} allowed");
    assert!(distance <= tolerance * size, "{what}: distance {distance:e} of {size:e}");
}

/// Bits of floats, for exact comparison.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}
