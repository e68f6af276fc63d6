use super::ApiKeys;
use crate::config::Config;

fn keys(hashes: &[&str]) -> ApiKeys {
    let api_keys_sha256 = hashes.iter().map(|&hash| hash.to_owned()).collect();
    ApiKeys::new(&Config { api_keys_sha256, ..Config::default() })
}

/// SHA-256 of "secret".
const SECRET: &str = "2BB80D537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

#[test]
fn only_a_configured_key_opens() {
    let known = keys(&[&"00".repeat(32), SECRET]);
    assert!(known.accept(Some(b"Bearer secret")).is_some());
    assert!(known.accept(Some(b"bearer secret")).is_some());
    for wrong in [
        None,
        Some(&b""[..]),
        Some(b"secret"),
        Some(b"Bearer "),
        Some(b"Bearer secret "),
        Some(b"Basic secret"),
    ] {
        assert_eq!(known.accept(wrong), None, "{wrong:?}");
    }
}

#[test]
fn without_keys_everybody_may() {
    let known = keys(&[]);
    assert!(known.accept(None).is_some());
    assert_eq!(known.accept(None), known.accept(Some(b"Bearer secret")), "they are one tenant");
}

#[test]
fn every_key_has_a_salt_of_its_own_and_keeps_it() {
    // SHA-256 of "other".
    let other = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa";
    let known = keys(&[SECRET, other]);
    let again = keys(&[other, SECRET]);
    let salt = |keys: &ApiKeys, key: &str| {
        keys.accept(Some(format!("Bearer {key}").as_bytes())).expect("accepted").cache_salt
    };
    let salts = [salt(&known, "secret"), salt(&known, "other")];
    assert_ne!(salts[0], salts[1]);
    assert_eq!(salts, [salt(&again, "secret"), salt(&again, "other")], "whatever their order");
    assert!(!salts.contains(&keys(&[]).accept(None).expect("nobody is asked").cache_salt));
}

#[test]
fn a_weight_goes_with_its_key() {
    let other = "00".repeat(32);
    let config = Config {
        api_keys_sha256: vec![SECRET.to_owned(), other.clone()],
        tenant_weights: [(SECRET.to_owned(), 5)].into(),
        ..Config::default()
    };
    let tenant = ApiKeys::new(&config).accept(Some(b"Bearer secret")).expect("accepted");
    assert_eq!(tenant.share.weight, 5);
    assert_ne!(tenant.share.tenant, tenant.cache_salt, "a queue's entry gives no salt away");
    assert_eq!(keys(&[SECRET]).accept(Some(b"Bearer secret")).expect("accepted").share.weight, 1);
}
