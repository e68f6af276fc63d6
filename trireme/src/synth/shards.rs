//! Weights files: a safetensors header, then the tensors' bytes as they are drawn.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    ops::Range,
    path::Path,
};

use model::Dtype;
use serde_json::{Map, Value, json};

use super::plan::Planned;
use super::values::Draw;

/// Which tensors go into which file: in order, as many as fit, at least one.
pub fn divide(tensors: &[Planned], bytes_max: u64) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && bytes + tensor.bytes() > bytes_max {
            shards.push(start..index);
            (start, bytes) = (index, 0);
        }
        bytes += tensor.bytes();
    }
    shards.push(start..tensors.len());
    shards
}

/// Name of a file, as Hugging Face counts them.
pub fn file_name(number: usize, count: usize) -> String {
    format!("model-{:05}-of-{count:05}.safetensors", number + 1)
}

/// `model.safetensors.index.json`.
pub fn index(tensors: &[Planned], shards: &[Range<usize>]) -> Value {
    let mut map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = file_name(number, shards.len());
        for tensor in &tensors[shard.clone()] {
            map.insert(tensor.name.clone(), Value::from(file.as_str()));
        }
    }
    let bytes: u64 = tensors.iter().map(Planned::bytes).sum();
    json!({ "metadata": { "total_size": bytes }, "weight_map": map })
}

/// Writes one file; `written` is told the bytes of each piece.
pub fn write(
    path: &Path,
    tensors: &[Planned],
    draw: &Draw<'_>,
    written: &mut dyn FnMut(u64),
) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let header = header(tensors);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for tensor in tensors {
        draw.tensor(tensor, &mut |piece| {
            file.write_all(piece)?;
            written(piece.len() as u64);
            Ok(())
        })?;
    }
    file.into_inner()?.sync_all()
}

fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes();
        let dtype = match tensor.dtype {
            Dtype::F8E4m3 => "F8_E4M3",
            Dtype::Bf16 => "BF16",
            Dtype::F32 => "F32",
        };
        let described = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
        header.insert(tensor.name.clone(), described);
        begin = end;
    }
    let mut bytes = Value::Object(header).to_string().into_bytes();
    // The format's alignment of the data, by blanks.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}
