use super::machine::Arithmetic;
use super::timing::{Bound, Work};
use super::*;

fn machine() -> Machine {
    Machine {
        threads: 1,
        isa: "avx512",
        read_gb_per_s: 10.0,
        f32_gflop_per_s: 100.0,
        bf16_gflop_per_s: 200.0,
    }
}

/// A call of one millisecond against ceilings of 10 GB/s, 100 and 200 GFLOP/s.
#[test]
fn a_share_is_the_larger_floor_over_the_time() {
    let check = |bytes, operations, arithmetic, from_memory, expected: (Bound, Option<f64>)| {
        let work = Work { bytes, operations, arithmetic, from_memory };
        let times = [Duration::from_millis(1), Duration::from_millis(3), Duration::from_millis(9)];
        let mut figure = Figure::new("op", String::new(), 1, work, &times);
        figure.judge(&machine());
        assert_eq!(figure.bound, expected.0, "{work:?}");
        match (figure.share, expected.1) {
            (Some(share), Some(expected)) => assert!((share - expected).abs() < 1e-12, "{work:?}: {share}"),
            (share, expected) => assert_eq!(share, expected, "{work:?}"),
        }
        assert!((figure.median_us - 3000.0).abs() < 1e-6 && (figure.best_us - 1000.0).abs() < 1e-6);
    };
    check(5e6, 1e6, Arithmetic::F32, true, (Bound::Memory, Some(0.5)));
    check(1e6, 50e6, Arithmetic::F32, true, (Bound::Compute, Some(0.5)));
    check(1e6, 50e6, Arithmetic::Bf16, true, (Bound::Compute, Some(0.25)));
    check(5e6, 0.0, Arithmetic::F32, false, (Bound::Cache, None));
    check(5e6, 80e6, Arithmetic::F32, false, (Bound::Compute, Some(0.8)));
}

#[test]
fn a_ceiling_is_the_better_of_two() {
    let busy = Machine { read_gb_per_s: 3.0, f32_gflop_per_s: 120.0, ..machine() };
    let both = busy.better(machine());
    assert_eq!((both.read_gb_per_s, both.f32_gflop_per_s, both.bf16_gflop_per_s), (10.0, 120.0, 200.0));
}

/// `--model-shapes` against the configurations they claim to be: V3's published one and the demo model's own.
#[test]
fn shapes_are_the_models_own() {
    let v3 = ModelShapes::V3.shapes();
    let projections = v3.projections();
    assert_eq!(projections[1], ("q_b", 24_576, 1536));
    assert_eq!(projections[2], ("kv_a", 576, 7168));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tiny/config.json");
    let text = std::fs::read_to_string(path).expect("the demo model");
    let config = model::ModelConfig::from_json(&text).expect("a configuration");
    let tiny = Shapes {
        hidden: config.hidden_size,
        inner: config.intermediate_size,
        expert_inner: config.moe_intermediate_size,
        heads: config.num_attention_heads,
        query_rank: config.q_lora_rank.expect("a rank"),
        latent: config.kv_lora_rank,
        rope: config.qk_rope_head_dim,
        nope: config.qk_nope_head_dim,
        value: config.v_head_dim,
        experts: config.n_routed_experts,
        topk: config.num_experts_per_tok,
        groups: (config.n_group, config.topk_group),
        vocab: config.vocab_size,
    };
    assert_eq!(ModelShapes::Tiny.shapes(), tiny);
}

/// Every operator runs at the demo model's shapes, on one thread and on two, and has a figure that means something.
#[test]
fn every_operator_has_a_figure() {
    for threads in [1, 2] {
        let effort = Effort { time: Duration::from_micros(1), weight_bytes: 4 << 20 };
        let report = Report {
            machine: machine(),
            model: "tiny",
            figures: operators::all(&Cpu::new(threads), &ModelShapes::Tiny.shapes(), effort).expect("memory"),
        };
        for figure in &report.figures {
            let times = figure.best_us > 0.0 && figure.best_us <= figure.median_us;
            assert!(times && figure.gb_per_s.is_finite() && figure.calls >= 3, "{figure:?}");
        }
        for operator in [
            "rms_norm",
            "quantise fp8",
            "silu_mul",
            "rope + kv_write",
            "linear fp8",
            "linear bf16",
            "linear f32",
            "mla fp8",
            "route",
            "expert ffn fp8",
            "sampler",
        ] {
            assert!(report.figures.iter().any(|figure| figure.operator == operator), "{operator}");
        }
        let table = render(&report);
        assert_eq!(table.lines().count(), report.figures.len() + 4, "{table}");
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["figures"].as_array().map(Vec::len), Some(report.figures.len()));
        assert_eq!(json["figures"][0]["bound"], "cache");
    }
}
