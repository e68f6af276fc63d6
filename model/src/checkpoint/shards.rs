//! From a directory to every tensor in it: one file, or the shards that an index names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use serde::Deserialize;

use super::header::{self, Entry, Problem};
use super::map;
use crate::error::{ModelError, TensorError};
use crate::files;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// V3 has 91,000 tensors in an index of 9 MB.
const INDEX_BYTES_MAX: u64 = 256 << 20;
/// V3 has 163; each costs one open file at load.
const SHARDS_MAX: usize = 4096;

/// All weights files of a directory, mapped, and where each tensor lies.
pub(super) struct Shards {
    /// In the order of their names.
    pub files: Vec<Shard>,
    /// By tensor name: index into `files`, and the entry.
    pub tensors: BTreeMap<String, (usize, Entry)>,
}

pub(super) struct Shard {
    pub path: PathBuf,
    pub bytes: Bytes,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Shards {
    /// As transformers does: a single file wins over an index.
    pub(super) fn open(dir: &Path) -> Result<Self, ModelError> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let (shard, entries) = open_shard(single)?;
            let tensors = entries.into_iter().map(|e| (e.name.clone(), (0, e))).collect();
            return Ok(Self { files: vec![shard], tensors });
        }
        let index_path = dir.join(INDEX);
        let text = files::read_if_present(&index_path, INDEX_BYTES_MAX)?
            .ok_or_else(|| ModelError::NoWeights { dir: dir.to_owned() })?;
        let Index { weight_map } = serde_json::from_str(&text)
            .map_err(|source| ModelError::Json { file: index_path.clone(), source })?;
        Self::open_indexed(dir, &index_path, &weight_map)
    }

    /// The index decides: a tensor that a shard has and the index does not name, or names elsewhere, is not read.
    fn open_indexed(
        dir: &Path,
        index_path: &Path,
        weight_map: &HashMap<String, String>,
    ) -> Result<Self, ModelError> {
        if let Some((tensor, shard)) = weight_map.iter().find(|(_, shard)| !is_plain_name(shard)) {
            let (tensor, shard) = (tensor.clone(), shard.chars().take(128).collect());
            return Err(ModelError::ShardName { file: index_path.to_owned(), tensor, shard });
        }
        let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        if names.len() > SHARDS_MAX {
            let (file, shards) = (index_path.to_owned(), names.len());
            return Err(ModelError::TooManyShards { file, shards, shards_max: SHARDS_MAX });
        }
        let mut files = Vec::with_capacity(names.len());
        let mut tensors = BTreeMap::new();
        for name in names {
            let (shard, entries) = open_shard(dir.join(name))?;
            let promised = |e: &Entry| weight_map.get(&e.name).is_some_and(|shard| shard == name);
            let here = entries.into_iter().filter(promised);
            tensors.extend(here.map(|e| (e.name.clone(), (files.len(), e))));
            files.push(shard);
        }
        match weight_map.iter().find(|(tensor, _)| !tensors.contains_key(*tensor)) {
            Some((tensor, shard)) => Err(ModelError::Tensor {
                file: dir.join(shard),
                tensor: tensor.clone(),
                source: TensorError::NotInShard,
            }),
            None => Ok(Self { files, tensors }),
        }
    }
}

fn open_shard(path: PathBuf) -> Result<(Shard, Vec<Entry>), ModelError> {
    let bytes = map::map(&path)?;
    match header::parse(&bytes) {
        Ok(entries) => Ok((Shard { path, bytes }, entries)),
        Err(Problem::Header(source)) => Err(ModelError::Header { file: path, source }),
        Err(Problem::Tensor { name, error }) => {
            Err(ModelError::Tensor { file: path, tensor: name, source: error })
        }
    }
}

/// A shard must lie in the checkpoint's own directory: an index is data, and must not choose which files we open.
fn is_plain_name(shard: &str) -> bool {
    let mut components = Path::new(shard).components();
    let one = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    // Components forgive a trailing separator, and a backslash separates on other systems.
    one && shard.ends_with(".safetensors") && !shard.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests;
