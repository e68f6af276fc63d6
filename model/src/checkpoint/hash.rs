//! The hash by which two workers know that they serve the same weights.
//!
//! xxh3-128 over config.json and, by tensor name, each tensor's name, dtype and shape and a sample of its bytes. It is
//! made to tell checkpoints apart (another model, another fine-tune, another quantisation) in milliseconds at any size;
//! it does not authenticate anything. How the tensors are spread over shards does not enter.

use xxhash_rust::xxh3::Xxh3;

use super::shards::Shards;

/// Windows of a tensor's bytes that are read, spread evenly from its first byte to its last.
const WINDOWS: usize = 4;
/// A cache line: what a read costs anyway.
const WINDOW_BYTES: usize = 64;
/// With more tensors, every n-th is sampled. Each sample may be a page read from disk, and V3 has 91,000 tensors;
/// a fine-tune changes every one of them.
const SAMPLED_TENSORS_MAX: usize = 4096;

pub(super) fn weights_hash(config_json: &str, shards: &Shards) -> [u8; 16] {
    let mut hash = Xxh3::new();
    let mut field = |bytes: &[u8]| {
        // Length first, so that no two lists of fields read alike.
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    field(config_json.as_bytes());
    let every = shards.tensors.len().div_ceil(SAMPLED_TENSORS_MAX).max(1);
    for (index, (name, (file, entry))) in shards.tensors.iter().enumerate() {
        field(name.as_bytes());
        field(entry.dtype.name().as_bytes());
        for n in &entry.shape {
            field(&(*n as u64).to_le_bytes());
        }
        if index % every == 0 {
            let data = &shards.files[*file].bytes[entry.range.clone()];
            windows(data).for_each(&mut field);
        }
    }
    hash.digest128().to_be_bytes()
}

/// The whole of a small tensor, else evenly spread windows.
fn windows(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let spread = data.len().saturating_sub(WINDOW_BYTES);
    let (count, window) =
        if spread <= (WINDOWS - 1) * WINDOW_BYTES { (1, data.len()) } else { (WINDOWS, WINDOW_BYTES) };
    (0..count).map(move |i| {
        let begin = if count == 1 { 0 } else { spread * i / (count - 1) };
        &data[begin..begin + window]
    })
}

#[cfg(test)]
mod tests;
