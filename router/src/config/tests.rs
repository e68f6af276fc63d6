use super::Config;

#[track_caller]
fn refused(change: impl FnOnce(&mut Config), field: &str) {
    let mut config = Config::default();
    change(&mut config);
    let error = config.validate().expect_err("must be refused");
    assert_eq!(error.field, field);
}

#[test]
fn defaults_hold() {
    Config::default().validate().expect("defaults are usable");
}

#[test]
fn unusable_values_are_named() {
    refused(|c| c.api_keys_sha256 = vec!["secret".into()], "api_keys_sha256");
    refused(|c| c.tenant_weights = [("00".repeat(32), 2)].into(), "tenant_weights");
    refused(|c| c.connections_max = 0, "connections_max");
    refused(|c| c.head_wait_ms_max = 0, "head_wait_ms_max");
    refused(|c| c.body_bytes_max = 1, "body_bytes_max");
    refused(|c| c.sequences_per_request_max = 15, "sequences_per_request_max");
    refused(|c| c.sequences_max = 63, "sequences_max");
    refused(|c| c.deadline_ms_max = 0, "deadline_ms_max");
    refused(|c| c.lease_ms = 250, "lease_ms");
    refused(|c| c.stall_ms_max = 1000, "stall_ms_max");
    refused(|c| c.expert_workers_min = 5000, "expert_workers_min");
}

#[test]
fn unknown_keys_are_refused() {
    let error = serde_json::from_str::<Config>(r#"{"queue_maximum": 3}"#).expect_err("unknown key");
    assert!(error.to_string().contains("queue_maximum"), "{error}");
}
