use super::ApiKeys;

/// SHA-256 of "secret".
const SECRET: &str = "2BB80D537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

#[test]
fn only_a_configured_key_opens() {
    let keys = ApiKeys::new(&["00".repeat(32), SECRET.to_owned()]);
    assert!(keys.accept(Some(b"Bearer secret")));
    assert!(keys.accept(Some(b"bearer secret")));
    for wrong in [
        None,
        Some(&b""[..]),
        Some(b"secret"),
        Some(b"Bearer "),
        Some(b"Bearer secret "),
        Some(b"Basic secret"),
    ] {
        assert!(!keys.accept(wrong), "{wrong:?}");
    }
}

#[test]
fn without_keys_everybody_may() {
    assert!(ApiKeys::new(&[]).accept(None));
}
