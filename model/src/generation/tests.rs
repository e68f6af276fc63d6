use super::*;

#[test]
fn reads_what_deepseek_publishes() {
    let text = r#"{"_from_model_config": true, "bos_token_id": 0, "eos_token_id": 1, "do_sample": true,
                   "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.46.3"}"#;
    let expected = GenerationDefaults {
        temperature: Some(0.6),
        top_p: Some(0.95),
        eos_token_ids: vec![TokenId(1)],
        ..GenerationDefaults::default()
    };
    assert_eq!(GenerationDefaults::from_json(text, 448).expect("sound"), expected);
    assert_eq!(GenerationDefaults::from_json("{}", 448).expect("sound"), GenerationDefaults::default());
}

#[test]
fn refusals_name_the_field() {
    for (field, value) in [
        ("temperature", "-0.1"),
        ("temperature", "\"hot\""),
        ("top_p", "0"),
        ("top_p", "1.1"),
        ("top_k", "-1"),
        ("min_p", "2"),
        ("repetition_penalty", "0"),
        ("eos_token_id", "448"),
    ] {
        let error =
            GenerationDefaults::from_json(&format!("{{\"{field}\": {value}}}"), 448).expect_err(field);
        assert!(error.to_string().contains(&format!("`{field}`")), "{error}");
    }
}
