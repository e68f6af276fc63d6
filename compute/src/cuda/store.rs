//! Where built kernels are found: a folder that was shipped, a cache on disk, or the compiler.
//!
//! A file's name carries the hash of everything that went into it, so that a stale one is never found rather than
//! detected; its last 16 bytes are a checksum, so that a torn one is compiled anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::kernels::{SOURCES, Source};
use super::{CudaError, nvrtc};

/// Bytes of the checksum at a file's end.
const CHECKSUM: usize = size_of::<u128>();

/// Folders with built kernels.
#[derive(Clone, Debug)]
pub struct KernelStore {
    /// Read only, looked into first: what [`Self::build`] wrote, here or elsewhere. Any compiler's version is accepted.
    pub prebuilt: Option<PathBuf>,
    /// Written after compilation; entries are per compiler version. None compiles at every start.
    pub cache: Option<PathBuf>,
}

impl Default for KernelStore {
    /// Prebuilt kernels in the folder `kernels` beside the program, where there is one: what is shipped together is found
    /// together. The cache in `$XDG_CACHE_HOME/trireme/kernels`, else `~/.cache/trireme/kernels`.
    fn default() -> Self {
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
        let program = std::env::current_exe().ok();
        Self {
            prebuilt: program.and_then(|program| Some(program.parent()?.join("kernels"))),
            cache: base.map(|base| base.join("trireme/kernels")),
        }
    }
}

/// Where a kernel came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Prebuilt,
    Cache,
    Compiler,
}

impl KernelStore {
    /// Machine code of one kernel file.
    pub(super) fn find(&self, source: &Source, architecture: &str) -> Result<(Vec<u8>, Origin), CudaError> {
        if let Some(folder) = &self.prebuilt
            && let Some(cubin) = read(&folder.join(file_name(source, architecture, None)))
        {
            return Ok((cubin, Origin::Prebuilt));
        }
        let cached = self.cache.as_ref().and_then(|folder| {
            nvrtc::version().map(|version| folder.join(file_name(source, architecture, Some(version))))
        });
        if let Some(cubin) = cached.as_deref().and_then(read) {
            return Ok((cubin, Origin::Cache));
        }
        if nvrtc::version().is_none() {
            let looked_in = self.prebuilt.clone();
            return Err(CudaError::NoNvrtc { kernel: source.name, looked_in });
        }
        let cubin = nvrtc::compile(source, architecture, false)?.cubin;
        if let Some(path) = cached
            && let Err(error) = write(&path, &cubin)
        {
            // Costs a compilation at the next start, nothing more.
            tracing::warn!(path = %path.display(), %error, "cannot cache a compiled kernel");
        }
        Ok((cubin, Origin::Compiler))
    }

    /// Compiles every kernel for `architecture` into `folder`, to be shipped as [`Self::prebuilt`]. `report` gets each
    /// kernel's name and the compiler's log. No device is needed.
    pub fn build(
        folder: &Path,
        architecture: &str,
        mut report: impl FnMut(&'static str, &str),
    ) -> Result<(), BuildError> {
        let compiled = in_parallel(SOURCES, |source| nvrtc::compile(source, architecture, true));
        for (source, compiled) in SOURCES.iter().zip(compiled) {
            let compiled = compiled?;
            report(source.name, &compiled.log);
            let path = folder.join(file_name(source, architecture, None));
            write(&path, &compiled.cubin).map_err(|source| BuildError::Write { path, source })?;
        }
        Ok(())
    }
}

/// What `work` makes of each item, in their order; as many at once as the machine has cores. A kernel file is compiled by
/// one thread, and takes up to a second.
pub(super) fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let worker = || {
        let mut done = Vec::new();
        while let index = next.fetch_add(1, Ordering::Relaxed)
            && let Some(item) = items.get(index)
        {
            done.push((index, work(item)));
        }
        done
    };
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(worker)).collect();
        let own = worker();
        let joined = others.into_iter().flat_map(|other| match other.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        own.into_iter().chain(joined).collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Why kernels could not be built into a folder.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The compiler's part.
    #[error(transparent)]
    Compile(#[from] CudaError),
    /// The file's part.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn file_name(source: &Source, architecture: &str, compiler: Option<(u32, u32)>) -> String {
    let mut hash = Xxh3::new();
    hash.update(source.text.as_bytes());
    for option in nvrtc::OPTIONS {
        hash.update(option.as_bytes());
        hash.update(b"\0");
    }
    if let Some((major, minor)) = compiler {
        hash.update(&major.to_le_bytes());
        hash.update(&minor.to_le_bytes());
    }
    format!("{}-{architecture}-{:016x}.cubin", source.name, hash.digest())
}

/// A file's contents if it is there and whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let len = bytes.len().checked_sub(CHECKSUM)?;
    let whole = len > 0 && bytes[len..] == xxh3_128(&bytes[..len]).to_le_bytes();
    if !whole {
        tracing::warn!(path = %path.display(), "a built kernel is damaged");
        return None;
    }
    bytes.truncate(len);
    Some(bytes)
}

/// Writes beside and renames: another process sees the whole file or none.
fn write(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension(format!("{}.partial", std::process::id()));
    let mut bytes = cubin.to_vec();
    bytes.extend(xxh3_128(cubin).to_le_bytes());
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests;
