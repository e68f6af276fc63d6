use super::*;

fn ours() -> ExecutionFingerprint {
    ExecutionFingerprint {
        weights: [1; 16],
        numerics: Numerics::Fp8,
        kv_layout_digest: 2,
        backend: "cpu/avx512".into(),
        arithmetic_revision: 3,
    }
}

#[test]
fn equal_fingerprints_have_no_mismatch() {
    assert_eq!(ours().mismatch(&ours()), None);
    assert_eq!(ours().digest(), ours().digest());
}

#[test]
fn a_mismatch_names_the_field_and_changes_the_digest() {
    for (field, theirs) in [
        ("weights", ExecutionFingerprint { weights: [9; 16], ..ours() }),
        ("numerics", ExecutionFingerprint { numerics: Numerics::Reference, ..ours() }),
        ("kv_layout_digest", ExecutionFingerprint { kv_layout_digest: 9, ..ours() }),
        ("backend", ExecutionFingerprint { backend: "cpu/avx2".into(), ..ours() }),
        ("arithmetic_revision", ExecutionFingerprint { arithmetic_revision: 9, ..ours() }),
    ] {
        assert_eq!(ours().mismatch(&theirs).map(|m| m.field), Some(field));
        assert_ne!(ours().digest(), theirs.digest(), "{field}");
    }
}

#[test]
fn the_message_shows_both_sides() {
    let theirs = ExecutionFingerprint { backend: "cpu/avx2".into(), ..ours() };
    let message = ours().mismatch(&theirs).expect("they differ").to_string();
    assert_eq!(message, "execution fingerprints differ in `backend`: ours is cpu/avx512, theirs cpu/avx2");
}
