use super::*;

fn refused(field: &str, change: impl FnOnce(&mut SamplingParams)) {
    let mut params = SamplingParams::default();
    change(&mut params);
    let error = params.validate().expect_err(field);
    assert_eq!(error.field, field, "{error}");
}

#[test]
fn defaults_and_greedy_are_valid() {
    SamplingParams::default().validate().expect("default");
    SamplingParams::greedy().validate().expect("greedy");
    assert!(SamplingParams::greedy().is_greedy() && !SamplingParams::default().is_greedy());
}

#[test]
fn every_bound_is_held_and_named() {
    for bad in [f32::NAN, f32::INFINITY, -0.1, 2.1] {
        refused("temperature", |p| p.temperature = bad);
    }
    for bad in [f32::NAN, 0.0, 1.1] {
        refused("top_p", |p| p.top_p = bad);
    }
    for bad in [f32::NAN, -0.1, 1.1] {
        refused("min_p", |p| p.min_p = bad);
    }
    for bad in [f32::NAN, 0.0, 2.1, f32::INFINITY] {
        refused("repetition_penalty", |p| p.repetition_penalty = bad);
    }
    for bad in [f32::NAN, -2.1, 2.1] {
        refused("presence_penalty", |p| p.presence_penalty = bad);
        refused("frequency_penalty", |p| p.frequency_penalty = bad);
        refused("logit_bias", |p| p.logit_bias = vec![(TokenId(1), bad * 50.0)]);
    }
    refused("logit_bias", |p| p.logit_bias = vec![(TokenId(1), 1.0), (TokenId(2), 1.0), (TokenId(1), 2.0)]);
    refused("logit_bias", |p| p.logit_bias = (0..1025).map(|id| (TokenId(id), 1.0)).collect());
    refused("logprobs", |p| p.logprobs = Some(21));
}

#[test]
fn stopping_bounds_are_held_and_named() {
    let sound =
        Stopping { max_tokens: 5, min_tokens: 5, ignore_eos: false, stop_token_ids: vec![TokenId(447)] };
    sound.validate().expect("sound");
    sound.validate_tokens(448).expect("in the vocabulary");
    assert_eq!(sound.validate_tokens(447).expect_err("beyond it").field, "stop_token_ids");
    let check = |field: &str, stopping: Stopping| {
        assert_eq!(stopping.validate().expect_err(field).field, field);
    };
    check("max_tokens", Stopping { max_tokens: 0, min_tokens: 0, ..sound.clone() });
    check("min_tokens", Stopping { min_tokens: 6, ..sound.clone() });
    check("stop_token_ids", Stopping { stop_token_ids: vec![TokenId(0); 65], ..sound });
}

#[test]
fn biased_tokens_must_be_in_the_vocabulary() {
    let params = SamplingParams { logit_bias: vec![(TokenId(448), 1.0)], ..SamplingParams::default() };
    params.validate_tokens(449).expect("in the vocabulary");
    assert_eq!(params.validate_tokens(448).expect_err("beyond it").field, "logit_bias");
}
