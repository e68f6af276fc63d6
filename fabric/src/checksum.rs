//! xxh3-64 with the vectors that this machine has: a copy is checked at the speed at which it can be read.
//!
//! The `xxhash-rust` crate chooses its instructions when it is compiled, which for one binary on every x86-64 are those of
//! 2003: a third of a copy's cost instead of a tenth. So the long input's loop is here, for AVX-512 and AVX2, from the
//! algorithm's specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md); all else is left to the crate.

#![expect(unsafe_code, reason = "vector instructions; every block argues its bounds")]

mod copied;
#[cfg(target_arch = "x86_64")]
mod x86;

use xxhash_rust::xxh3::xxh3_64;

pub(crate) use copied::{Stores, SummedCopy, copy_streaming};

/// xxh3-64 of a piece. Guards gathering, scattering and staging; a forger is kept out by mutual TLS.
pub fn checksum(piece: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if piece.len() > x86::SHORT_BYTES_MAX {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions, as just asked.
            return unsafe { x86::avx512(piece) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { x86::avx2(piece) };
        }
    }
    xxh3_64(piece)
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn every_width_gives_the_same_as_the_crate() {
        let mut rng = SmallRng::seed_from_u64(3);
        let mut bytes = vec![0_u8; 70_000];
        rng.fill(&mut bytes[..]);
        let lengths = (0..2_200).chain([9_216, 41_984, 65_535, 65_536, 65_537, 70_000]);
        for length in lengths {
            // Not aligned to anything.
            let piece = &bytes[length % 61 % (bytes.len() - length + 1)..][..length];
            let expected = xxh3_64(piece);
            assert_eq!(checksum(piece), expected, "{length} bytes");
            #[cfg(target_arch = "x86_64")]
            if length > x86::SHORT_BYTES_MAX && is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has the instructions.
                assert_eq!(unsafe { x86::avx2(piece) }, expected, "{length} bytes in halves");
            }
        }
    }

    #[test]
    fn a_copy_in_any_cuts_has_the_checksum_of_the_whole() {
        let mut rng = SmallRng::seed_from_u64(4);
        let mut bytes = vec![0_u8; 70_000];
        rng.fill(&mut bytes[..]);
        for length in (0..2_200).step_by(7).chain([240, 241, 1_024, 1_025, 9_216, 41_984, 65_537, 70_000]) {
            let piece = &bytes[length % 61 % (bytes.len() - length + 1)..][..length];
            for stores in [Stores::Cached, Stores::Streaming] {
                for cuts in 0..4 {
                    let mut cuts: Vec<usize> = (0..cuts).map(|_| rng.random_range(0..=length)).collect();
                    cuts.extend([0, length]);
                    cuts.sort_unstable();
                    // On a cache line and off it.
                    let mut room = vec![0; length + 128];
                    let aligned = room.as_ptr().align_offset(64) + rng.random_range(0..2) * 9;
                    let into = &mut room[aligned..][..length];
                    let mut copy = SummedCopy::new(into, stores);
                    cuts.windows(2).for_each(|cut| copy.append(&piece[cut[0]..cut[1]]));
                    assert_eq!(copy.finish(), xxh3_64(piece), "{length} bytes, {cuts:?}, {stores:?}");
                    assert_eq!(into, piece, "{length} bytes, {cuts:?}, {stores:?}");
                }
            }
        }
    }
}
