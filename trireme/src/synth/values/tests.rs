use super::*;

#[test]
fn quantiles_are_those_of_the_normal_distribution() {
    // 0.975 → 1.959964, 0.8413447 → 1, 0.5 → 0: any table of the distribution.
    for (p, expected) in [(0.975, 1.959_964), (0.841_344_746, 1.0), (0.5, 0.0), (0.001, -3.090_232)] {
        assert!((quantile(p) - expected).abs() < 1e-5, "{p}: {}", quantile(p));
    }
    let variance: f32 = quantiles().iter().map(|q| q * q).sum::<f32>() / QUANTILES as f32;
    assert!((variance - 1.0).abs() < 1e-3, "{variance}");
    assert!(
        (f64::from(quantiles()[QUANTILES - 1]) - OUTERMOST).abs() < 0.2,
        "{}",
        quantiles()[QUANTILES - 1]
    );
}

#[test]
fn pieces_do_not_depend_on_how_they_are_written() {
    let skew = Skew::none();
    let draw = Draw { seed: 3, skew: &skew };
    let tensor = Planned {
        name: "w".to_owned(),
        dtype: Dtype::F8E4m3,
        shape: vec![3, PIECE],
        fill: Fill::Normal(0.02),
    };
    let mut bytes = Vec::new();
    draw.tensor(&tensor, &mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })
    .expect("memory takes everything");
    assert_eq!(bytes.len(), 3 * PIECE);
    let mut second = vec![0; PIECE];
    let seed = xxh3_64_with_seed(b"w", 3);
    Table::Bytes(codes()).fill(&mut SplitMix(mixed(seed, 1)), &mut second);
    assert_eq!(bytes[PIECE..2 * PIECE], second);
    assert_ne!(bytes[..PIECE], second);
    assert!(!bytes.contains(&0x7F) && !bytes.contains(&0xFF), "no NaN");
}
