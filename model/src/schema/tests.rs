use super::*;
use crate::Checkpoint;

fn fixture(name: &str) -> Checkpoint {
    let dir = format!("{}/../fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    Checkpoint::open(dir).expect("a sound fixture")
}

/// Nothing of the fixtures is left over: the names asked for, scales included, are exactly the names stored.
#[test]
fn asks_for_every_stored_tensor() {
    for name in ["v2_group", "v2_lite", "v3_bf16", "v3_fp8_aligned", "v3_fp8_mtp"] {
        let checkpoint = fixture(name);
        let asked: std::collections::BTreeSet<_> = all(checkpoint.config())
            .flat_map(|spec| [spec.scale_name(), spec.name])
            .filter(|name| checkpoint.contains(name))
            .collect();
        let stored: std::collections::BTreeSet<_> = checkpoint.tensors().map(|t| t.name.to_owned()).collect();
        assert_eq!(asked, stored, "{name}");
    }
}

/// Published totals: 671.03 B for V3 without its MTP layer.
#[test]
fn counts_v3_s_parameters() {
    let mut config = fixture("v3_fp8_mtp").config().clone();
    config.vocab_size = 129_280;
    config.hidden_size = 7168;
    config.intermediate_size = 18_432;
    config.moe_intermediate_size = 2048;
    config.num_hidden_layers = 61;
    config.first_k_dense_replace = 3;
    config.num_attention_heads = 128;
    config.q_lora_rank = Some(1536);
    config.kv_lora_rank = 512;
    config.qk_nope_head_dim = 128;
    config.qk_rope_head_dim = 64;
    config.v_head_dim = 128;
    config.n_routed_experts = 256;
    config.num_nextn_predict_layers = 0;
    let parameters: usize = all(&config).map(|spec| spec.elements()).sum();
    assert_eq!(parameters / 10_000_000, 67_102, "{parameters}");

    let attention = layer(&config, 0).attention;
    assert_eq!(attention.kv_a_proj_with_mqa.shape, [576, 7168]);
    assert_eq!(attention.kv_a_proj_with_mqa.scale_shape(), [5, 56]);
    assert_eq!(attention.kv_b_proj.scale_shape(), [256, 4]);
    let expert = expert(&config, 3, ExpertId(255));
    assert_eq!(expert.up_proj.name, "model.layers.3.mlp.experts.255.up_proj.weight");
    assert_eq!(expert.up_proj.scale_name(), "model.layers.3.mlp.experts.255.up_proj.weight_scale_inv");
}

#[test]
fn only_mtp_copies_of_embedding_and_head_are_optional() {
    let checkpoint = fixture("v3_fp8_mtp");
    let optional: Vec<_> =
        all(checkpoint.config()).filter(|spec| spec.optional).map(|spec| spec.name).collect();
    assert_eq!(optional, ["model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"]);
}
