use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// A file with this header and `data_bytes` bytes of data.
fn file(header: &Value, data_bytes: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 7);
    file
}

fn entry(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
}

fn tensor_error(header: &Value, data_bytes: usize) -> (String, TensorError) {
    match parse(&file(header, data_bytes)) {
        Err(Problem::Tensor { name, error }) => (name, error),
        other => panic!("not a tensor's error: {other:?}"),
    }
}

#[test]
fn reads_what_the_safetensors_crate_writes() {
    use safetensors::tensor::{Dtype as TheirDtype, TensorView};
    let data: Vec<u8> = (0..24).collect();
    let view = |dtype, shape: &[usize], range: Range<usize>| {
        TensorView::new(dtype, shape.to_vec(), &data[range]).expect("a sound view")
    };
    let tensors = [
        ("b", view(TheirDtype::BF16, &[2, 3], 0..12)),
        ("a", view(TheirDtype::F32, &[2], 12..20)),
        ("c", view(TheirDtype::F8_E4M3, &[4], 20..24)),
        ("empty", view(TheirDtype::F32, &[0, 5], 0..0)),
        ("scalar", view(TheirDtype::F32, &[], 4..8)),
    ];
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let file = safetensors::serialize(tensors.clone(), Some(metadata)).expect("writes");
    let entries = parse(&file).expect("reads");
    assert_eq!(entries.len(), tensors.len());
    for (name, view) in tensors {
        let entry = entries.iter().find(|e| e.name == name).expect(name);
        assert_eq!(entry.shape, view.shape(), "{name}");
        assert_eq!(&file[entry.range.clone()], view.data(), "{name}");
    }
}

#[test]
fn a_file_shorter_than_its_header_is_truncated() {
    let whole = file(&json!({"a": entry("F32", &[2], 0, 8)}), 8);
    assert!(parse(&whole).is_ok());
    let header_end = whole.len() - 8;
    for len in 0..header_end {
        let problem = parse(&whole[..len]);
        assert!(
            matches!(problem, Err(Problem::Header(HeaderError::Truncated { .. }))),
            "{len} bytes: {problem:?}"
        );
    }
}

#[test]
fn data_shorter_than_the_last_tensor_names_it() {
    let header = json!({"a": entry("F32", &[2], 0, 8), "b": entry("F32", &[2], 8, 16)});
    for bytes in 8..16 {
        let (name, error) = tensor_error(&header, bytes);
        assert_eq!((name.as_str(), error), ("b", TensorError::Truncated { end: 16, bytes: bytes as u64 }));
    }
}

#[test]
fn a_header_length_beyond_reason_is_refused_before_it_is_believed() {
    for bytes in [HEADER_BYTES_MAX + 1, u64::MAX, u64::MAX - 7] {
        let problem = parse(&[bytes.to_le_bytes().as_slice(), &[0; 64]].concat());
        assert!(matches!(problem, Err(Problem::Header(HeaderError::TooLarge { .. }))), "{problem:?}");
    }
}

#[test]
fn every_lie_about_a_tensor_is_refused_by_its_name() {
    let check = |second: Value, expected: TensorError| {
        let header = json!({"a": entry("F32", &[2], 0, 8), "b": second});
        assert_eq!(tensor_error(&header, 16), ("b".to_owned(), expected));
    };
    let max = u64::MAX;
    check(entry("F32", &[2], 4, 12), TensorError::Overlap { other: "a".into() });
    check(entry("F32", &[1], 12, 16), TensorError::Hole { bytes: 4 });
    check(entry("F32", &[2], 16, 8), TensorError::InvertedRange { begin: 16, end: 8 });
    check(entry("F32", &[3], 8, 16), TensorError::WrongLength { found: 8, expected: 12 });
    check(entry("F32", &[2], 8, max), TensorError::Truncated { end: max, bytes: 16 });
    check(entry("I64", &[1], 8, 16), TensorError::UnsupportedDtype { found: "I64".into() });
    check(entry("F32", &[max, max], 8, 16), TensorError::ImpossibleShape { found: vec![max, max] });
    check(entry("F32", &[1; 9], 8, 16), TensorError::ImpossibleShape { found: vec![1; 8] });
}

#[test]
fn a_name_given_twice_is_refused() {
    let a = entry("F32", &[1], 0, 4);
    let again = entry("F32", &[1], 4, 8);
    let header = format!("{{\"a\":{a},\"a\":{again}}}");
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&[0; 8]);
    let problem = parse(&file);
    assert!(
        matches!(&problem, Err(Problem::Tensor { name, error: TensorError::Duplicate }) if name == "a"),
        "{problem:?}"
    );
}

#[test]
fn bytes_behind_the_last_tensor_are_refused() {
    let problem = parse(&file(&json!({"a": entry("F32", &[2], 0, 8)}), 9));
    assert!(matches!(problem, Err(Problem::Header(HeaderError::TrailingBytes { bytes: 1 }))), "{problem:?}");
}

#[test]
fn headers_of_another_form_are_refused() {
    for header in [
        json!([]),
        json!({"a": 1}),
        json!({"a": {"dtype": "F32"}}),
        json!({"a": entry("F32", &[2], 0, 8), "b": null}),
    ] {
        let problem = parse(&file(&header, 8));
        assert!(matches!(problem, Err(Problem::Header(HeaderError::Json(_)))), "{header}: {problem:?}");
    }
}

proptest! {
    /// Whatever is done to a file, parsing ends in entries that keep the invariant, or in an error.
    #[test]
    fn mutated_files_never_break_the_invariant(
        edits in prop::collection::vec((0usize..400, any::<u8>()), 0..12),
        cut in prop::option::of(0usize..400),
    ) {
        let header = json!({
            "__metadata__": {"format": "pt"},
            "model.norm.weight": entry("BF16", &[8], 0, 16),
            "lm_head.weight": entry("F8_E4M3", &[4, 8], 16, 48),
            "lm_head.weight_scale_inv": entry("F32", &[1, 1], 48, 52),
        });
        let mut bytes = file(&header, 52);
        for (at, value) in edits {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        if let Ok(entries) = parse(&bytes) {
            for pair in entries.windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
            for entry in entries {
                let expected = entry.shape.iter().product::<usize>() * entry.dtype.bytes();
                prop_assert_eq!(bytes[entry.range].len(), expected);
            }
        }
    }

    /// The same for numbers: the digits are where offsets and shapes live, and random bytes seldom hit them well.
    #[test]
    fn hostile_numbers_never_break_the_invariant(
        shape in prop::collection::vec(prop_oneof![0u64..5, any::<u64>()], 0..4),
        begin in prop_oneof![0u64..70, any::<u64>()],
        end in prop_oneof![0u64..70, any::<u64>()],
        length in prop::option::of(any::<u64>()),
    ) {
        let header = json!({"a": entry("F32", &[4], 0, 16), "b": entry("BF16", &shape, begin, end)});
        let mut bytes = file(&header, 48);
        if let Some(length) = length {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        if let Ok(entries) = parse(&bytes) {
            for entry in entries {
                let expected = entry.shape.iter().product::<usize>() * entry.dtype.bytes();
                prop_assert_eq!(bytes[entry.range].len(), expected);
            }
        }
    }
}
