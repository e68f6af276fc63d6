use super::*;

fn v3(format: KvFormat) -> KvLayout {
    KvLayout { format, layers: 62, latent: 512, rope: 64, block_tokens: KvLayout::BLOCK_TOKENS }
}

/// 512 e4m3 + 4 f32 + 64 bf16, as the field stores it.
#[test]
fn a_v3_row_has_656_bytes() {
    let layout = v3(KvFormat::Fp8);
    assert_eq!((layout.latent_bytes(), layout.scales_per_row(), layout.rope_offset()), (512, 4, 528));
    assert_eq!((layout.rope_bytes(), layout.row_bytes()), (128, 656));
    assert_eq!((layout.layer_stride(), layout.block_bytes()), (656 * 64, 656 * 64 * 62));
    assert_eq!(v3(KvFormat::Bf16).row_bytes(), 1152);
    assert_eq!(v3(KvFormat::F32).row_bytes(), 2304);
}

#[test]
fn odd_widths_are_padded_and_a_partial_group_has_its_scale() {
    let layout = KvLayout { latent: 130, rope: 6, ..v3(KvFormat::Fp8) };
    assert_eq!((layout.scales_per_row(), layout.rope_offset()), (2, 138));
    assert_eq!(layout.row_bytes(), 160);
}

#[test]
fn blocks_for_tokens() {
    let layout = v3(KvFormat::Fp8);
    assert_eq!([0, 1, 64, 65].map(|tokens| layout.blocks_for(tokens)), [0, 1, 1, 2]);
}

/// The digest is on the wire: a change to it makes old and new workers refuse each other, and must be meant.
#[test]
fn the_canonical_text_is_frozen() {
    let layout = v3(KvFormat::Fp8);
    assert_eq!(
        layout.describe(),
        "format=fp8 layers=62 latent=512 rope=64 block_tokens=64 scale_group=128 scales=4 rope_pairs=interleaved \
         rope_offset=528 row_bytes=656 layer_stride=41984 block_bytes=2603008 pool=block,layer,token"
    );
    assert_eq!(layout.digest(), xxh3_64(layout.describe().as_bytes()));
}

#[test]
fn every_field_is_in_the_digest() {
    let base = v3(KvFormat::Fp8);
    for other in [
        KvLayout { format: KvFormat::Bf16, ..base.clone() },
        KvLayout { layers: 61, ..base.clone() },
        KvLayout { latent: 511, ..base.clone() },
        KvLayout { rope: 62, ..base.clone() },
        KvLayout { block_tokens: 32, ..base.clone() },
    ] {
        assert_ne!(other.digest(), base.digest(), "{other:?}");
    }
}
