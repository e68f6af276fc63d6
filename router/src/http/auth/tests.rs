use super::ApiKeys;

/// SHA-256 of "secret".
const SECRET: &str = "2BB80D537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

#[test]
fn only_a_configured_key_opens() {
    let keys = ApiKeys::new(&["00".repeat(32), SECRET.to_owned()]);
    assert!(keys.accept(Some(b"Bearer secret")).is_some());
    assert!(keys.accept(Some(b"bearer secret")).is_some());
    for wrong in [
        None,
        Some(&b""[..]),
        Some(b"secret"),
        Some(b"Bearer "),
        Some(b"Bearer secret "),
        Some(b"Basic secret"),
    ] {
        assert_eq!(keys.accept(wrong), None, "{wrong:?}");
    }
}

#[test]
fn without_keys_everybody_may() {
    let keys = ApiKeys::new(&[]);
    assert!(keys.accept(None).is_some());
    assert_eq!(keys.accept(None), keys.accept(Some(b"Bearer secret")), "they are one tenant");
}

#[test]
fn every_key_has_a_salt_of_its_own_and_keeps_it() {
    // SHA-256 of "other".
    let other = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa";
    let keys = ApiKeys::new(&[SECRET.to_owned(), other.to_owned()]);
    let again = ApiKeys::new(&[other.to_owned(), SECRET.to_owned()]);
    let salt =
        |keys: &ApiKeys, key: &str| keys.accept(Some(format!("Bearer {key}").as_bytes())).expect("accepted");
    let salts = [salt(&keys, "secret"), salt(&keys, "other")];
    assert_ne!(salts[0], salts[1]);
    assert_eq!(salts, [salt(&again, "secret"), salt(&again, "other")], "whatever their order");
    assert!(!salts.contains(&ApiKeys::new(&[]).accept(None).expect("nobody is asked")));
}
