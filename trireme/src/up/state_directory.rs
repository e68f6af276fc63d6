//! The folder of a running `trireme up`: only its user's, and gone when it ends well.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// `up`'s own folder: configuration, certificates and logs; gone when it ends well.
pub(super) struct StateDirectory {
    pub(super) path: PathBuf,
    keep: std::cell::Cell<bool>,
}

impl StateDirectory {
    pub(super) fn create() -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        remove_stale_folders();
        let path = std::env::temp_dir().join(format!("trireme-{}", std::process::id()));
        // A stale folder of a process that had our number: not ours to read, so never reused.
        if path.exists() {
            std::fs::remove_dir_all(&path)
                .with_context(|| format!("removing the stale {}", path.display()))?;
        }
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { path, keep: std::cell::Cell::new(false) })
    }

    pub(super) fn keep(&self) {
        self.keep.set(true);
    }
}

/// What an `up` that was killed left behind: a folder of ours whose process is gone.
fn remove_stale_folders() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("trireme-")?.parse::<u32>().ok());
        let gone = pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
        let ours = entry.path().join("cluster.toml").is_file();
        // Best effort: another user's folder cannot be removed, and need not be.
        if gone && ours {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        if self.keep.get() {
            eprintln!("Logs are kept in {}", self.path.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the state folder");
        }
    }
}
