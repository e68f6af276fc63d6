//! Checkpoints opened whole: the demo model and every fixture, and what is said of damaged ones.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use model::{Checkpoint, Dtype, ModelError, TensorError, schema};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

const FIXTURES: [&str; 5] = ["v2_group", "v2_lite", "v3_bf16", "v3_fp8_aligned", "v3_fp8_mtp"];
const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fixture(name: &str) -> PathBuf {
    root().join("../fixtures").join(name)
}

/// A copy of a fixture's checkpoint, to be damaged.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(fixture(name)).expect("a fixture") {
        let path = entry.expect("an entry").path();
        let file = path.file_name().and_then(|f| f.to_str()).expect("a name");
        if file.starts_with("model") || file.ends_with("config.json") {
            fs::copy(&path, dir.path().join(file)).expect("copies");
        }
    }
    dir
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).expect("reads")).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("writes");
}

/// Rewrites a safetensors file's header, leaving the data.
fn edit_header(path: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(path).expect("reads");
    let (prefix, rest) = bytes.split_first_chunk::<8>().expect("a prefix");
    let (header, data) = rest.split_at(u64::from_le_bytes(*prefix) as usize);
    let mut value: Value = serde_json::from_slice(header).expect("a header");
    change(&mut value);
    let header = value.to_string();
    let parts = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data];
    fs::write(path, parts.concat()).expect("writes");
}

fn open_error(dir: &TempDir) -> ModelError {
    Checkpoint::open(dir.path()).expect_err("a damaged checkpoint")
}

/// The error is about `tensor` in `file`, and its message names both.
#[track_caller]
fn expect_tensor_error(dir: &TempDir, file: &str, tensor: &str) -> TensorError {
    let error = open_error(dir);
    let message = error.to_string();
    assert!(message.contains(file) && message.contains(&format!("`{tensor}`")), "{message}");
    match error {
        ModelError::Tensor { source, .. } => source,
        other => panic!("not a tensor's error: {other:?}"),
    }
}

#[test]
fn the_demo_model_and_every_fixture_open() {
    for dir in FIXTURES.map(fixture).into_iter().chain([root().join("tiny")]) {
        let checkpoint = Checkpoint::open(&dir).expect("opens");
        assert_eq!(checkpoint.dir(), dir);
        assert!(checkpoint.tensors().len() > 100, "{}", dir.display());
    }
    let tiny = Checkpoint::open(root().join("tiny")).expect("opens");
    assert_eq!(tiny.tensors().len(), 617);
    let mtp = schema::layer(tiny.config(), 5).mtp.expect("an MTP layer");
    assert!(tiny.plain_if_stored(&mtp.embed_tokens).expect("may be absent").is_none());
    assert!(tiny.plain_if_stored(&mtp.eh_proj).expect("is there").is_some());
}

/// Bytes, dtype and shape of every tensor, against the reference reader of the format.
#[test]
fn tensors_are_what_the_safetensors_crate_reads() {
    for name in FIXTURES {
        let checkpoint = Checkpoint::open(fixture(name)).expect("opens");
        let mut files: HashMap<&Path, Vec<u8>> = HashMap::new();
        for info in checkpoint.tensors() {
            let bytes = files.entry(info.file).or_insert_with(|| fs::read(info.file).expect("reads"));
            let theirs = SafeTensors::deserialize(bytes).expect("sound");
            let theirs = theirs.tensor(info.name).expect(info.name);
            let ours = checkpoint.tensor(info.name).expect(info.name);
            assert_eq!(ours.data, theirs.data(), "{name} {}", info.name);
            assert_eq!(ours.shape, theirs.shape(), "{name} {}", info.name);
            assert_eq!(ours.dtype.name(), format!("{}", theirs.dtype()), "{name} {}", info.name);
        }
        let stored: usize = files.values().map(|b| SafeTensors::deserialize(b).expect("sound").len()).sum();
        assert_eq!(checkpoint.tensors().len(), stored, "{name}");
    }
}

#[test]
fn an_fp8_matrix_and_its_scales_may_lie_in_different_shards() {
    let checkpoint = Checkpoint::open(fixture("v3_fp8_mtp")).expect("opens");
    let spec = schema::layer(checkpoint.config(), 0).attention.kv_b_proj;
    let matrix = checkpoint.matrix(&spec).expect("is there");
    let scales = matrix.scales.expect("is FP8");
    assert_eq!((matrix.weight.dtype, matrix.weight.shape), (Dtype::F8E4m3, vec![320, 64]));
    assert_eq!((scales.dtype, scales.shape.clone()), (Dtype::F32, vec![3, 1]));
    assert!(scales.to_f32().expect("numbers").iter().all(|s| s.is_finite() && *s > 0.0));
    let file_of =
        |name: &str| checkpoint.tensors().find(|t| t.name == name).expect("is there").file.to_owned();
    assert_ne!(file_of(&spec.name), file_of(&spec.scale_name()));
}

#[test]
fn bf16_widens_exactly() {
    let checkpoint = Checkpoint::open(fixture("v3_bf16")).expect("opens");
    let norm = checkpoint.plain(&schema::global(checkpoint.config()).norm).expect("is there");
    let values = norm.to_f32().expect("BF16");
    assert_eq!(values.len(), norm.elements());
    for (value, pair) in values.iter().zip(norm.data.chunks(2)) {
        assert_eq!(value.to_le_bytes(), [0, 0, pair[0], pair[1]]);
    }
}

#[test]
fn expect_checks_dtype_and_shape() {
    let checkpoint = Checkpoint::open(fixture("v3_bf16")).expect("opens");
    checkpoint.expect("model.norm.weight", &[Dtype::Bf16], &[160]).expect("as it is");
    for (name, dtypes, shape) in [
        ("model.norm.weight", &[Dtype::F32][..], &[160][..]),
        ("model.norm.weight", &[Dtype::Bf16], &[161]),
        ("no.such.weight", &[Dtype::Bf16], &[160]),
    ] {
        let error = checkpoint.expect(name, dtypes, shape).expect_err(name).to_string();
        assert!(error.contains(name) && error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn a_tensor_outlives_its_checkpoint() {
    let checkpoint = Checkpoint::open(fixture("v2_lite")).expect("opens");
    let tensor = checkpoint.tensor("model.norm.weight").expect("is there");
    let before = tensor.data.to_vec();
    drop(checkpoint);
    assert_eq!(tensor.data, before);
}

#[test]
fn ends_of_sequence_of_both_files_count() {
    let dir = copy("v2_lite");
    edit_json(&dir.path().join("generation_config.json"), |g| g["eos_token_id"] = json!([433, 1]));
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    let ids: Vec<u32> = checkpoint.config().eos_token_ids.iter().map(|id| id.0).collect();
    assert_eq!(ids, [1, 433]);
}

#[test]
fn the_hash_knows_weights_and_configuration_and_not_the_sharding() {
    let mut hashes: Vec<_> =
        FIXTURES.map(|name| Checkpoint::open(fixture(name)).expect("opens").weights_hash()).into();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), FIXTURES.len());

    let original = Checkpoint::open(fixture("v3_fp8_mtp")).expect("opens");
    let dir = copy("v3_fp8_mtp");
    assert_eq!(Checkpoint::open(dir.path()).expect("opens").weights_hash(), original.weights_hash());

    // The same tensors in one file.
    let merged = tempfile::tempdir().expect("a directory");
    let shards = [SHARD_1, SHARD_2].map(|shard| fs::read(dir.path().join(shard)).expect("reads"));
    let shards = shards.each_ref().map(|bytes| SafeTensors::deserialize(bytes).expect("sound"));
    let tensors: Vec<_> = shards.iter().flat_map(|shard| shard.tensors()).collect();
    let bytes = safetensors::serialize(tensors, None).expect("writes");
    fs::write(merged.path().join("model.safetensors"), bytes).expect("writes");
    fs::copy(dir.path().join("config.json"), merged.path().join("config.json")).expect("copies");
    assert_eq!(Checkpoint::open(merged.path()).expect("opens").weights_hash(), original.weights_hash());

    // One byte at the end of a shard, which is the last byte of a tensor.
    let shard = dir.path().join(SHARD_2);
    let mut bytes = fs::read(&shard).expect("reads");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(&shard, bytes).expect("writes");
    assert_ne!(Checkpoint::open(dir.path()).expect("opens").weights_hash(), original.weights_hash());

    let dir = copy("v3_fp8_mtp");
    edit_json(&dir.path().join("config.json"), |config| config["routed_scaling_factor"] = json!(2.25));
    assert_ne!(Checkpoint::open(dir.path()).expect("opens").weights_hash(), original.weights_hash());
}

#[test]
fn mtp_weights_that_were_left_out_count_as_no_mtp() {
    let dir = copy("v3_fp8_mtp");
    edit_json(&dir.path().join(INDEX), |index| {
        let map = index["weight_map"].as_object_mut().expect("an object");
        map.retain(|name, _| !name.starts_with("model.layers.4."));
    });
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(checkpoint.config().num_nextn_predict_layers, 0);
}

#[test]
fn a_directory_without_weights_or_configuration_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    assert!(open_error(&dir).to_string().contains("config.json"));
    fs::copy(fixture("v3_bf16").join("config.json"), dir.path().join("config.json")).expect("copies");
    assert!(matches!(open_error(&dir), ModelError::NoWeights { .. }));
}

#[test]
fn a_field_s_error_names_file_and_field() {
    let dir = copy("v3_bf16");
    edit_json(&dir.path().join("config.json"), |config| config["hidden_size"] = json!("big"));
    let error = open_error(&dir).to_string();
    assert!(error.contains("config.json: `hidden_size` is \"big\""), "{error}");
    let dir = copy("v3_bf16");
    edit_json(&dir.path().join("generation_config.json"), |config| config["top_p"] = json!(7));
    let error = open_error(&dir).to_string();
    assert!(error.contains("generation_config.json: `top_p`"), "{error}");
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = copy("v3_fp8_mtp");
    let gone = "model.layers.3.mlp.experts.7.up_proj.weight";
    edit_json(&dir.path().join(INDEX), |index| {
        index["weight_map"].as_object_mut().expect("an object").remove(gone);
    });
    assert_eq!(expect_tensor_error(&dir, "", gone), TensorError::Missing);
}

#[test]
fn missing_scales_are_named() {
    let dir = copy("v3_fp8_mtp");
    let weight = "model.layers.0.mlp.down_proj.weight";
    edit_json(&dir.path().join(INDEX), |index| {
        index["weight_map"].as_object_mut().expect("an object").remove(&format!("{weight}_scale_inv"));
    });
    let error = expect_tensor_error(&dir, SHARD_2, weight);
    assert_eq!(error, TensorError::Fp8Without { needs: "its `weight_scale_inv` tensor" });
}

#[test]
fn fp8_weights_need_the_configuration_to_say_so() {
    let dir = copy("v3_fp8_aligned");
    edit_json(&dir.path().join("config.json"), |config| {
        config.as_object_mut().expect("an object").remove("quantization_config");
    });
    let error = expect_tensor_error(&dir, "model.safetensors", "model.layers.0.self_attn.q_a_proj.weight");
    assert!(matches!(error, TensorError::Fp8Without { .. }), "{error}");
}

#[test]
fn a_shape_that_config_json_does_not_ask_for_is_refused() {
    let dir = copy("v3_bf16");
    edit_json(&dir.path().join("config.json"), |config| config["vocab_size"] = json!(449));
    let error = expect_tensor_error(&dir, "model.safetensors", "model.embed_tokens.weight");
    assert_eq!(error, TensorError::WrongShape { found: vec![448, 160], expected: vec![449, 160] });
}

#[test]
fn a_dtype_that_means_nothing_there_is_refused() {
    let dir = copy("v3_fp8_aligned");
    let norm = "model.norm.weight";
    edit_header(&dir.path().join("model.safetensors"), |header| {
        // As many bytes, otherwise described.
        header[norm]["dtype"] = json!("F8_E4M3");
        header[norm]["shape"] = json!([512]);
    });
    let error = expect_tensor_error(&dir, "model.safetensors", norm);
    assert!(matches!(error, TensorError::WrongDtype { found: "F8_E4M3", .. }), "{error}");
}

#[test]
fn a_truncated_file_names_file_and_tensor() {
    let dir = copy("v3_fp8_mtp");
    let shard = dir.path().join(SHARD_2);
    let bytes = fs::read(&shard).expect("reads");
    fs::write(&shard, &bytes[..bytes.len() - 1]).expect("writes");
    let error = open_error(&dir);
    assert!(
        matches!(&error, ModelError::Tensor { file, source: TensorError::Truncated { .. }, .. } if *file == shard),
        "{error:?}"
    );
}

#[test]
fn an_empty_or_missing_shard_is_named() {
    let dir = copy("v3_fp8_mtp");
    fs::write(dir.path().join(SHARD_1), []).expect("writes");
    assert!(open_error(&dir).to_string().contains(SHARD_1));
    fs::remove_file(dir.path().join(SHARD_1)).expect("removes");
    assert!(open_error(&dir).to_string().contains(SHARD_1));
    fs::create_dir(dir.path().join(SHARD_1)).expect("creates");
    assert!(open_error(&dir).to_string().contains(SHARD_1));
}

#[test]
fn an_index_cannot_reach_out_of_the_directory() {
    for hostile in ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin"] {
        let dir = copy("v3_fp8_mtp");
        edit_json(&dir.path().join(INDEX), |index| index["weight_map"]["lm_head.weight"] = json!(hostile));
        let error = open_error(&dir);
        assert!(matches!(&error, ModelError::ShardName { shard, .. } if shard == hostile), "{error:?}");
        assert!(error.to_string().contains("lm_head.weight"), "{error}");
    }
}

#[test]
fn an_index_that_names_the_wrong_shard_is_refused() {
    let dir = copy("v3_fp8_mtp");
    edit_json(&dir.path().join(INDEX), |index| index["weight_map"]["lm_head.weight"] = json!(SHARD_2));
    assert_eq!(expect_tensor_error(&dir, SHARD_2, "lm_head.weight"), TensorError::NotInShard);
}

#[test]
fn an_index_of_another_form_is_refused() {
    for hostile in ["", "[]", "{}", r#"{"weight_map": 1}"#, r#"{"weight_map": {"a": 1}}"#] {
        let dir = copy("v3_fp8_mtp");
        fs::write(dir.path().join(INDEX), hostile).expect("writes");
        assert!(open_error(&dir).to_string().contains(INDEX), "{hostile}");
    }
}

/// A configuration that asks for a hundred million tensors is refused at the first one that is not there.
#[test]
fn a_configuration_beyond_the_weights_is_refused_at_once() {
    let dir = copy("v3_bf16");
    edit_json(&dir.path().join("config.json"), |config| config["num_hidden_layers"] = json!(1024));
    let error = expect_tensor_error(&dir, "model.safetensors", "model.layers.4.input_layernorm.weight");
    assert_eq!(error, TensorError::Missing);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random damage to header and length: an error or a checkpoint whose every tensor can be read, never a panic.
    #[test]
    fn damage_is_an_error_or_harmless(
        edits in prop::collection::vec((0usize..15_000, any::<u8>()), 1..8),
        cut in prop::option::of(0usize..2_699_872),
    ) {
        let dir = tempfile::tempdir().expect("a directory");
        let source = fixture("v2_lite");
        fs::copy(source.join("config.json"), dir.path().join("config.json")).expect("copies");
        let mut bytes = fs::read(source.join("model.safetensors")).expect("reads");
        for (at, value) in edits {
            bytes[at] = value;
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        fs::write(dir.path().join("model.safetensors"), bytes).expect("writes");
        match Checkpoint::open(dir.path()) {
            Ok(checkpoint) => {
                for info in checkpoint.tensors() {
                    let tensor = checkpoint.tensor(info.name).expect("is there");
                    prop_assert_eq!(tensor.data.len(), tensor.elements() * tensor.dtype.bytes());
                }
            }
            Err(error) => prop_assert!(error.to_string().contains("model.safetensors"), "{}", error),
        }
    }
}
