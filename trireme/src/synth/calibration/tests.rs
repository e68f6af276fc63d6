use super::*;

#[test]
fn targets_follow_the_power_and_leave_nobody_impossible() {
    for (experts, topk, exponent) in [(32, 4, 0.5), (32, 4, 1.0), (256, 8, 1.5), (8, 8, 2.0), (4, 2, 4.0)] {
        let targets = targets_by_rank(experts, topk, exponent);
        let sum: f64 = targets.iter().sum();
        assert!((sum - topk as f64).abs() < 1e-9, "{experts} experts, top-{topk}, {exponent}: sum {sum}");
        assert!(targets.is_sorted_by(|a, b| a >= b), "{targets:?}");
        assert!(targets.iter().all(|&t| t <= 1.0), "{targets:?}");
        let (a, b) = (targets[experts - 2], targets[experts - 1]);
        if b < LOAD_MAX {
            let power = (experts as f64 / (experts as f64 - 1.0)).powf(exponent);
            assert!((a / b - power).abs() < 1e-9, "{experts} experts, top-{topk}, {exponent}: {}", a / b);
        }
    }
}

#[test]
fn every_layer_has_its_own_hot_expert_in_the_same_groups() {
    let skew = Skew {
        seed: 7,
        groups: 4,
        offsets: (0..16).map(|slot| slot as f32).collect(),
        biased: true,
        experts: 16,
    };
    let layers: Vec<_> = (0..4).map(|layer| skew.bias(layer)).collect();
    assert_eq!(skew.bias(2), layers[2]);
    assert_ne!(layers[0], layers[1]);
    for layer in layers {
        let mut groups: Vec<Vec<u32>> = layer
            .chunks_exact(4)
            .map(|group| {
                let mut group: Vec<u32> = group.iter().map(|value| *value as u32).collect();
                group.sort_unstable();
                group
            })
            .collect();
        groups.sort_unstable();
        assert_eq!(groups.concat(), (0..16).collect::<Vec<u32>>());
    }
}
