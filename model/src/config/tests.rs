use serde_json::{Value, json};

use super::*;

/// V3's config.json, as published.
fn v3() -> Value {
    serde_json::from_str(V3).expect("JSON")
}

/// V2-Lite's config.json, as published.
fn v2_lite() -> Value {
    serde_json::from_str(V2_LITE).expect("JSON")
}

fn parse(config: &Value) -> ModelConfig {
    ModelConfig::from_json(&config.to_string()).expect("a sound configuration")
}

/// `v3` with the value at a JSON pointer replaced, or removed where `value` is `None`.
fn v3_with(pointer: &str, value: Option<Value>) -> Value {
    let mut config = v3();
    let (outer, field) = pointer.rsplit_once('/').expect("a pointer");
    let object = config.pointer_mut(outer).and_then(Value::as_object_mut).expect("an object");
    match value {
        Some(value) => object.insert(field.to_owned(), value),
        None => object.remove(field),
    };
    config
}

fn close(actual: f64, expected: f64) {
    let relative = (actual - expected).abs() / expected.abs();
    assert!(relative < 5e-7, "{actual:e} is not {expected:e}");
}

#[test]
fn v3_as_published() {
    let config = parse(&v3());
    assert_eq!(config.architecture, Architecture::V3);
    assert_eq!((config.q_head_dim(), config.layers_with_mtp()), (192, 62));
    assert_eq!((config.scoring, config.topk_method), (Scoring::Sigmoid, TopkMethod::NoauxTc));
    assert_eq!(config.quantization, Some(Fp8Quantization { scale_format: ScaleFormat::F32 }));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(TokenId(0)), &[TokenId(1)][..]));
    assert!(!config.is_moe_layer(2) && config.is_moe_layer(3) && config.is_moe_layer(61));
    assert_eq!(config.moe_layers().collect::<Vec<_>>(), (3..62).collect::<Vec<_>>());
}

#[test]
fn v2_lite_as_published() {
    let config = parse(&v2_lite());
    assert_eq!(config.architecture, Architecture::V2);
    assert_eq!(config.q_lora_rank, None);
    assert_eq!((config.scoring, config.topk_method), (Scoring::Softmax, TopkMethod::Greedy));
    assert_eq!((config.norm_topk_prob, config.shared_intermediate_size()), (false, 2816));
    assert_eq!((config.quantization, config.num_nextn_predict_layers), (None, 0));
}

/// Golden values: derived by hand from the formulas, and agreeing with the published attention scales.
#[test]
fn yarn_frequencies() {
    let frequencies = parse(&v3()).rope_frequencies();
    assert_eq!(frequencies.len(), 32);
    for (i, expected) in [
        (0, 1.0),
        (9, 7.498942e-2),
        (10, 5.623413e-2),
        (11, 3.900693e-2),
        (15, 8.334509e-3),
        (16, 5.5e-3),
        (20, 7.905694e-4),
        (22, 1.778279e-4),
        (23, 3.333804e-5),
        (31, 3.333804e-6),
    ] {
        close(frequencies[i], expected);
    }
}

#[test]
fn yarn_softmax_scale() {
    close(f64::from(parse(&v3()).softmax_scale()), 0.13523378);
    close(f64::from(parse(&v2_lite()).softmax_scale()), 0.11472139);
    let plain = v3_with("/rope_scaling", None);
    close(f64::from(parse(&plain).softmax_scale()), 0.07216878);
}

#[test]
fn the_rotary_gain_is_one_in_released_models_and_the_ratio_of_the_mscales_otherwise() {
    assert_eq!(parse(&v3()).rope_gain(), 1.0);
    assert_eq!(parse(&v2_lite()).rope_gain(), 1.0);
    let absent = v3_with("/rope_scaling/mscale_all_dim", None);
    close(parse(&absent).rope_gain(), 0.1 * 40f64.ln() + 1.0);
    close(f64::from(parse(&absent).softmax_scale()), 0.07216878);
}

#[test]
fn without_yarn_frequencies_are_plain() {
    let frequencies = parse(&v3_with("/rope_scaling", None)).rope_frequencies();
    close(frequencies[31], 10_000f64.powf(-62.0 / 64.0));
}

/// transformers 5 writes `rope_parameters`, theta included.
#[test]
fn rope_parameters_mean_the_same() {
    let mut config = v3();
    let object = config.as_object_mut().expect("an object");
    object.remove("rope_theta");
    let mut rope = object.remove("rope_scaling").expect("is there");
    rope["rope_type"] = json!("yarn");
    rope["rope_theta"] = json!(10_000.0);
    rope.as_object_mut().expect("an object").remove("type");
    object.insert("rope_parameters".into(), rope);
    assert_eq!(parse(&config), parse(&v3()));

    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e4});
    assert_eq!(parse(&config).rope, RopeConfig { theta: 5e4, yarn: None });
}

#[test]
fn v3_1_rounds_activation_scales_to_powers_of_two() {
    let config = parse(&v3_with("/quantization_config/scale_fmt", Some(json!("ue8m0"))));
    assert_eq!(config.quantization, Some(Fp8Quantization { scale_format: ScaleFormat::Ue8m0 }));
}

/// transformers' own configuration class writes neither, and derived models have a model type of their own.
#[test]
fn defaults_follow_the_class() {
    let mut config = v3();
    let object = config.as_object_mut().expect("an object");
    for field in ["scoring_func", "topk_method", "norm_topk_prob", "moe_layer_freq", "num_key_value_heads"] {
        object.remove(field);
    }
    object.insert("model_type".into(), json!("kimi_k2"));
    assert_eq!(parse(&config), parse(&v3()));
}

#[test]
fn zero_q_lora_rank_means_none() {
    assert_eq!(parse(&v3_with("/q_lora_rank", Some(json!(0)))).q_lora_rank, None);
}

#[test]
fn several_ends_of_sequence() {
    let config = parse(&v3_with("/eos_token_id", Some(json!([7, 1, 7]))));
    assert_eq!(config.eos_token_ids, [TokenId(1), TokenId(7)]);
}

/// Each hostile value is refused, and the message names the field.
#[test]
fn refusals_name_the_field() {
    let check = |pointer: &str, value: Value| {
        let config = v3_with(pointer, Some(value.clone()));
        let error = ModelConfig::from_json(&config.to_string()).expect_err(pointer).to_string();
        let field = pointer[1..].replace('/', ".");
        assert!(error.contains(&format!("`{field}`")), "{pointer} = {value}: {error}");
    };
    for dimension in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "max_position_embeddings",
    ] {
        let pointer = format!("/{dimension}");
        for hostile in
            [json!(0), json!(-1), json!(1u64 << 62), json!(1e300), json!(2.5), json!("8"), json!([8])]
        {
            check(&pointer, hostile);
        }
        let error =
            ModelConfig::from_json(&v3_with(&pointer, None).to_string()).expect_err(&pointer).to_string();
        assert_eq!(error, format!("`{dimension}` is missing"));
    }
    check("/q_lora_rank", json!(-1));
    check("/n_shared_experts", json!(1_000_000));
    check("/first_k_dense_replace", json!(62));
    check("/moe_layer_freq", json!(0));
    check("/num_nextn_predict_layers", json!(1000));
    check("/qk_rope_head_dim", json!(63));
    check("/n_group", json!(7));
    check("/n_group", json!(256));
    check("/topk_group", json!(9));
    check("/num_experts_per_tok", json!(129));
    check("/scoring_func", json!("tanh"));
    check("/topk_method", json!("random"));
    check("/norm_topk_prob", json!(1));
    check("/routed_scaling_factor", json!(0));
    check("/rms_norm_eps", json!(0));
    check("/rope_theta", json!(0.5));
    check("/rope_scaling", json!("yarn"));
    check("/rope_scaling/type", json!("linear"));
    check("/rope_scaling/factor", json!(0.5));
    check("/rope_scaling/original_max_position_embeddings", json!(0));
    check("/rope_scaling/beta_fast", json!(0.5));
    check("/rope_scaling/mscale", json!("1"));
    check("/rope_scaling/attention_factor", json!(1.2));
    check("/rope_scaling/truncate", json!(false));
    check("/bos_token_id", json!(129_280));
    check("/eos_token_id", json!([1, 129_280]));
    check("/eos_token_id", json!("1"));
    check("/eos_token_id", json!(vec![1; 65]));
    check("/quantization_config/quant_method", json!("awq"));
    check("/quantization_config/weight_block_size", json!([64, 128]));
    check("/quantization_config/activation_scheme", json!("static"));
    check("/quantization_config/fmt", json!("e5m2"));
    check("/quantization_config/scale_fmt", json!("ue4m3"));
    check("/hidden_act", json!("gelu"));
    check("/attention_bias", json!(true));
    check("/tie_word_embeddings", json!(true));
    check("/rope_interleave", json!(false));
    check("/num_key_value_heads", json!(8));
    check("/architectures", json!(["DeepseekV2ForCausalLM"]));
    check("/architectures", json!("DeepseekV3ForCausalLM"));
}

#[test]
fn another_architecture_is_refused_by_its_name() {
    let mut config = v3();
    config["model_type"] = json!("deepseek_v32");
    config["architectures"] = json!(["DeepseekV32ForCausalLM"]);
    let error = ModelConfig::from_json(&config.to_string()).expect_err("another class").to_string();
    assert_eq!(error, "`model_type` is \"deepseek_v32\", must be `deepseek_v3` or `deepseek_v2`");
    let error = ModelConfig::from_json("{}").expect_err("nothing").to_string();
    assert_eq!(error, "`model_type` is missing");
}

#[test]
fn what_is_no_json_object_is_refused() {
    for text in ["", "[", "[]", "17", "null", "{\"vocab_size\": 1", "\u{0}"] {
        assert!(ModelConfig::from_json(text).is_err(), "{text:?}");
    }
    // Deeper than any parser's stack.
    assert!(ModelConfig::from_json(&"[".repeat(1 << 20)).is_err());
}

#[test]
fn a_long_hostile_value_is_shortened_in_the_message() {
    let config = v3_with("/scoring_func", Some(json!("x".repeat(1 << 16))));
    let error = ModelConfig::from_json(&config.to_string()).expect_err("unknown").to_string();
    assert!(error.len() < 200, "{} bytes", error.len());
}

const V3: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "attention_bias": false, "attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": false,
    "bos_token_id": 0, "eos_token_id": 1,
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]}
}"#;

const V2_LITE: &str = r#"{
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "bos_token_id": 100000, "eos_token_id": 100001,
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
    "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false, "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
}"#;
