//! Which instruction set the kernels use. Chosen once, at start.

/// An instruction set with kernels of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C (any server since 2015).
    Avx2,
    /// AVX-512 F/BW/DQ/VL/VBMI and BF16 (Zen 4, Sapphire Rapids and later). Machines with less of it run [`Isa::Avx2`]:
    /// one name stands for one sequence of float operations.
    Avx512,
}

impl Isa {
    /// The best instruction set of this machine. `TRIREME_ISA=portable|avx2|avx512` asks for a lesser one; a better
    /// one than the machine has is not granted.
    pub fn detect() -> Self {
        let best = *Self::available().last().unwrap_or(&Self::Portable);
        match std::env::var("TRIREME_ISA").ok().and_then(|name| Self::from_name(&name)) {
            Some(asked) if asked < best => asked,
            _ => best,
        }
    }

    /// All instruction sets that this machine can run, best last.
    pub fn available() -> Vec<Self> {
        let mut available = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            use std::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                available.push(Self::Avx2);
                if has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512dq")
                    && has!("avx512vl")
                    && has!("avx512vbmi")
                    && has!("avx512bf16")
                {
                    available.push(Self::Avx512);
                }
            }
        }
        available
    }

    /// The name used in the execution fingerprint and in `TRIREME_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().find(|isa| isa.name() == name)
    }
}
