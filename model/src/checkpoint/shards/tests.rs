use super::*;

#[test]
fn only_plain_names_of_safetensors_files_are_opened() {
    for good in ["model-00001-of-00002.safetensors", "a.safetensors", "..safetensors", "a b.safetensors"] {
        assert!(is_plain_name(good), "{good:?}");
    }
    for bad in [
        "",
        ".",
        "..",
        "model.bin",
        "../model.safetensors",
        "sub/model.safetensors",
        "./model.safetensors",
        "/etc/model.safetensors",
        "model.safetensors/",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "a\0.safetensors",
    ] {
        assert!(!is_plain_name(bad), "{bad:?}");
    }
}
