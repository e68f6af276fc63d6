//! Every instruction set's vectors against scalar code, lane by lane.

use super::{LANES_MAX, Operation, Vector, run};
use crate::samples::Samples;
use crate::{Isa, fp8};

/// Applies a function of vectors to whole slices, whose length is a multiple of every vector's.
struct Map<'a, F> {
    x: &'a [f32],
    y: &'a mut [f32],
    function: F,
}

/// What is tested, as a type: a closure cannot be generic.
trait Function {
    unsafe fn apply<V: Vector>(&self, x: V) -> V;
}

impl<F: Function> Operation for Map<'_, F> {
    unsafe fn run<V: Vector>(self) {
        for (x, y) in self.x.chunks_exact(V::LANES).zip(self.y.chunks_exact_mut(V::LANES)) {
            // SAFETY: `run` chose an instruction set of this machine; whole vectors.
            unsafe { self.function.apply(V::load(x.as_ptr())).store(y.as_mut_ptr()) }
        }
    }
}

fn map(isa: Isa, x: &[f32], function: impl Function) -> Vec<f32> {
    let mut padded = x.to_vec();
    padded.resize(x.len().next_multiple_of(LANES_MAX), 0.0);
    let mut y = vec![f32::NAN; padded.len()];
    run(isa, Map { x: &padded, y: &mut y, function });
    y.truncate(x.len());
    y
}

struct Exp;
impl Function for Exp {
    unsafe fn apply<V: Vector>(&self, x: V) -> V {
        // SAFETY: as promised to `apply`.
        unsafe { x.exp() }
    }
}

struct E4m3RoundTrip;
impl Function for E4m3RoundTrip {
    unsafe fn apply<V: Vector>(&self, x: V) -> V {
        let mut codes = [0; LANES_MAX];
        // SAFETY: as promised to `apply`; room for any vector.
        unsafe {
            x.store_e4m3(codes.as_mut_ptr());
            V::load_e4m3(codes.as_ptr())
        }
    }
}

struct Bf16RoundTrip;
impl Function for Bf16RoundTrip {
    unsafe fn apply<V: Vector>(&self, x: V) -> V {
        let mut bits = [0; 2 * LANES_MAX];
        // SAFETY: as promised to `apply`; room for any vector.
        unsafe {
            x.store_bf16(bits.as_mut_ptr());
            V::load_bf16(bits.as_ptr())
        }
    }
}

#[test]
fn exp_is_within_two_ulp() {
    let x: Vec<f32> = (-87_000..=88_000).map(|i| i as f32 / 1000.0).collect();
    for isa in Isa::available() {
        for (x, y) in x.iter().zip(map(isa, &x, Exp)) {
            let expected = f64::from(*x).exp();
            let ulp = f64::from(f32::EPSILON) * expected;
            assert!((f64::from(y) - expected).abs() <= 2.0 * ulp, "{isa:?} exp({x}) = {y} for {expected}");
        }
        let edges = map(isa, &[0.0, f32::NEG_INFINITY, f32::NAN, 1e30], Exp);
        assert_eq!(edges[0], 1.0);
        assert!(edges[1] >= 0.0 && edges[1] < 1.3e-38 && edges[2].is_nan() && edges[3] > 1e38, "{edges:?}");
    }
}

#[test]
fn e4m3_and_bf16_are_those_of_scalar_code() {
    let mut samples = Samples::new(5);
    let mut x = samples.floats(4096);
    // Every code, every middle between two codes and its neighbours, both signs; then the special ones.
    for code in 0..0x7E {
        let middle = (fp8::decode(code) + fp8::decode(code + 1)) / 2.0;
        for x_bits in [middle.to_bits() - 1, middle.to_bits(), middle.to_bits() + 1] {
            x.extend([f32::from_bits(x_bits), -f32::from_bits(x_bits)]);
        }
        x.extend([fp8::decode(code), -fp8::decode(code)]);
    }
    x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -1e-40, 1.004, 3e38, f32::MAX]);
    for isa in Isa::available() {
        for (x, y) in x.iter().zip(map(isa, &x, E4m3RoundTrip)) {
            let expected = fp8::decode(fp8::encode(*x));
            assert!(y.to_bits() == expected.to_bits() || y.is_nan() && expected.is_nan(), "{isa:?} {x}: {y}");
        }
        for (x, y) in x.iter().zip(map(isa, &x, Bf16RoundTrip)) {
            let expected = fp8::from_bf16(fp8::to_bf16(*x));
            assert!(y.to_bits() == expected.to_bits() || y.is_nan() && expected.is_nan(), "{isa:?} {x}: {y}");
        }
    }
}

/// The sums of [`Vector::sum4`] and [`Vector::sum4x4`] come out of one tree: a vector's place has no influence.
struct SumPlaces<'a>(&'a [f32], &'a mut Vec<f32>);

impl Operation for SumPlaces<'_> {
    unsafe fn run<V: Vector>(self) {
        // SAFETY: `run` chose an instruction set of this machine; whole vectors.
        unsafe {
            let [a, b] = [V::load(self.0.as_ptr()), V::load(self.0.as_ptr().add(V::LANES))];
            self.1.extend(V::sum4([a, a, a, a]));
            self.1.extend([V::sum4([a, b, b, b])[0], V::sum4([b, a, b, b])[1]]);
            self.1.extend([V::sum4([b, b, a, b])[2], V::sum4([b, b, b, a])[3], a.sum()]);
            for i in 0..16 {
                let mut vectors = [[b; 4]; 4];
                vectors[i / 4][i % 4] = a;
                self.1.push(V::sum4x4(vectors)[i / 4][i % 4]);
            }
            let exact: f64 = self.0[..V::LANES].iter().map(|&x| f64::from(x)).sum();
            assert!((f64::from(self.1[0]) - exact).abs() < 1e-4, "{} for {exact}", self.1[0]);
        }
    }
}

#[test]
fn lanes_are_summed_in_one_tree() {
    let mut samples = Samples::new(6);
    for isa in Isa::available() {
        for _ in 0..100 {
            let mut sums = Vec::new();
            run(isa, SumPlaces(&samples.floats(2 * LANES_MAX), &mut sums));
            assert!(sums.iter().all(|s| s.to_bits() == sums[0].to_bits()), "{isa:?} {sums:?}");
        }
    }
}
