use model::{KvFormat, KvLayout};

use super::{Extent, Violation};
use crate::wire::Run;

/// Rows of 16 bytes: two f32 of latent, two of rope. Blocks of 4 rows, 3 layers.
fn layout() -> KvLayout {
    KvLayout { format: KvFormat::F32, layers: 3, latent: 2, rope: 2, block_tokens: 4 }
}

fn extent(first_block: usize, prompt_tokens: usize) -> Extent {
    Extent::new(&layout(), first_block, prompt_tokens).expect("a sound reservation")
}

fn run(layer: u32, first_block: u32, blocks: u32, last_rows: u32) -> Run {
    Run { layer, first_block, blocks, last_rows, checksums: vec![0; blocks as usize] }
}

#[test]
fn sizes_follow_from_the_prompt() {
    // (first block, prompt) -> (blocks, pieces, bytes per layer)
    let cases = [
        ((0, 1), (1, 3, 16)),
        ((0, 4), (1, 3, 64)),
        ((0, 5), (2, 6, 80)),
        ((1, 10), (2, 6, 96)),
        ((2, 10), (1, 3, 32)),
        ((3, 10), (0, 0, 0)),
    ];
    for ((first_block, prompt_tokens), expected) in cases {
        let extent = extent(first_block, prompt_tokens);
        let found = (extent.blocks(), extent.pieces(), extent.bytes_per_layer());
        assert_eq!(found, expected, "{prompt_tokens} tokens from block {first_block}");
    }
}

#[test]
fn reservations_without_sense_are_refused() {
    for (first_block, prompt_tokens) in [(0, 0), (4, 10), (0, u32::MAX as usize + 1), (usize::MAX, 1)] {
        let refused = Extent::new(&layout(), first_block, prompt_tokens);
        assert!(refused.is_err(), "{prompt_tokens} tokens from block {first_block}");
    }
}

#[test]
fn pieces_have_distinct_places() {
    let extent = extent(1, 14);
    let mut places: Vec<usize> = (0..3)
        .flat_map(|layer| (1..4).map(move |block| (layer, block)))
        .map(|(layer, block)| extent.index(layer, block))
        .collect();
    places.sort_unstable();
    assert_eq!(places, (0..extent.pieces()).collect::<Vec<_>>());
}

#[test]
fn a_run_is_checked_against_the_ticket() {
    // Blocks 1 and 2 of a prompt of 10: the last has two rows.
    let extent = extent(1, 10);
    let check = |run: Run, bytes| extent.check(&run, bytes);
    assert_eq!(check(run(0, 1, 2, 2), 96), Ok(()));
    assert_eq!(check(run(2, 1, 1, 4), 64), Ok(()));
    assert_eq!(check(run(2, 2, 1, 2), 32), Ok(()));

    assert!(matches!(check(run(3, 1, 1, 4), 64), Err(Violation::Layer { .. })));
    assert!(matches!(check(run(0, 0, 1, 4), 64), Err(Violation::Blocks { .. })));
    assert!(matches!(check(run(0, 1, 3, 4), 192), Err(Violation::Blocks { .. })));
    assert!(matches!(check(run(0, 1, 0, 4), 0), Err(Violation::Blocks { .. })));
    let overflowing = Run { blocks: u32::MAX, ..run(0, 2, 1, 2) };
    assert!(matches!(check(overflowing, 32), Err(Violation::Blocks { .. })));
    assert!(matches!(check(run(0, 1, 1, 2), 32), Err(Violation::LastRows { expected: 4, .. })));
    assert!(matches!(check(run(0, 1, 2, 4), 128), Err(Violation::LastRows { expected: 2, .. })));
    assert!(matches!(check(run(0, 1, 2, 2), 95), Err(Violation::BodyBytes { expected: 96, .. })));
    let bare = Run { checksums: vec![0], ..run(0, 1, 2, 2) };
    assert!(matches!(check(bare, 96), Err(Violation::Checksums { .. })));
}
