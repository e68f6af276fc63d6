//! Which checkpoint a measurement reads when none is named.

use std::path::{Path, PathBuf};

use anyhow::bail;

/// `named`, or the demo model of this repository where the binary was built in a clone of it.
pub(crate) fn model_folder(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let beside_sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tiny");
    for path in [PathBuf::from("model/tiny"), beside_sources] {
        if path.join("config.json").is_file() {
            return Ok(path);
        }
    }
    bail!("the demo model (model/tiny) is not here; name a checkpoint with --model DIR")
}
