//! The generated code under `src/generated` is what the `.proto` files say, byte for byte.
//!
//! After a change to a `.proto` file: `TRIREME_REGENERATE=1 cargo test -p proto --test generated`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

const PROTOS: [&str; 4] = [
    "trireme/v1/sampling.proto",
    "trireme/v1/inference.proto",
    "trireme/v1/cluster.proto",
    "trireme/v1/fabric.proto",
];
const FILES: [&str; 2] = ["trireme.v1.rs", "descriptor.bin"];

/// Compiles [`PROTOS`] into `out`: Rust for messages and services, and the descriptor set for reflection.
fn generate(crate_dir: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new([crate_dir])?;
    compiler.include_source_info(true).include_imports(true).open_files(PROTOS)?;
    tonic_prost_build::configure()
        // Ordered maps: equal messages encode to equal bytes.
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .out_dir(out)
        .compile_fds(compiler.file_descriptor_set())?;
    // Reflection clients need no comments and no line numbers.
    compiler.include_source_info(false);
    fs::write(out.join("descriptor.bin"), compiler.encode_file_descriptor_set())?;
    Ok(())
}

#[test]
fn generated_code_is_current() -> Result<(), Box<dyn Error>> {
    let crate_dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let committed = crate_dir.join("src/generated");
    let fresh = tempfile::tempdir()?;
    generate(&crate_dir, fresh.path())?;

    let mut written: Vec<_> =
        fs::read_dir(fresh.path())?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?;
    written.sort();
    let mut expected = FILES.map(std::ffi::OsString::from);
    expected.sort();
    assert_eq!(written, expected, "the generator writes other files than this test compares");

    for file in FILES {
        let new = fs::read(fresh.path().join(file))?;
        if std::env::var_os("TRIREME_REGENERATE").is_some() {
            fs::write(committed.join(file), new)?;
        } else {
            let old = fs::read(committed.join(file))?;
            assert!(old == new, "src/generated/{file} is stale: run with TRIREME_REGENERATE=1");
        }
    }
    Ok(())
}
