//! `[cache]`: where prefill and decode workers keep KV blocks that their pools have no room for.

use std::path::PathBuf;

use engine::{DiskOptions, KvTierOptions};
use serde::{Deserialize, Serialize};

use super::{ConfigError, range};

/// Disks beyond this are a mistake in the unit: 1 PiB.
const DISK_BYTES_MAX: usize = 1 << 50;

/// The second tier of the prefix cache, of each worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheSection {
    /// Bytes of host memory in each prefill and decode worker; 0: no second tier. Range 0..=2^46.
    pub host_bytes: usize,
    /// Bytes on disk of each worker, behind its host memory; 0: none. Range 0..=2^50, and enough for a few of the disk's
    /// regions, which the worker checks.
    pub disk_bytes: usize,
    /// A folder in which each worker has one of its own, by its id. What is in it outlives the worker, and is found by the next
    /// one of the same execution fingerprint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_path: Option<PathBuf>,
}

impl Default for CacheSection {
    fn default() -> Self {
        // Modest: 104 of V3's blocks of 2.6 MB, 6,700 tokens, or all that the demo model's pool holds. A machine made for
        // serving has far more to give.
        Self { host_bytes: 256 << 20, disk_bytes: 0, disk_path: None }
    }
}

impl CacheSection {
    /// Checks the fields and how they fit together.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        range("cache.host_bytes", self.host_bytes, 0, 1 << 46)?;
        range("cache.disk_bytes", self.disk_bytes, 0, DISK_BYTES_MAX)?;
        let invalid = |field: &str, reason: &str| {
            Err(ConfigError::Invalid { field: field.to_owned(), reason: reason.to_owned() })
        };
        match (self.disk_bytes, &self.disk_path) {
            (0, Some(_)) => invalid("cache.disk_bytes", "a disk_path of 0 bytes keeps nothing"),
            (1.., None) => invalid("cache.disk_path", "disk_bytes need a folder"),
            (1.., Some(_)) if self.host_bytes == 0 => {
                invalid("cache.host_bytes", "blocks reach the disk through host memory: it needs some")
            }
            _ => Ok(()),
        }
    }

    /// The tier of one worker.
    pub fn options(&self, worker_id: &str) -> KvTierOptions {
        let disk = self.disk_path.as_ref().filter(|_| self.disk_bytes > 0);
        let disk = disk.map(|path| DiskOptions { path: path.join(worker_id), bytes: self.disk_bytes });
        KvTierOptions { host_bytes: self.host_bytes, disk }
    }
}
