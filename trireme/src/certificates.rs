//! `trireme certificates`: what a cluster over several machines proves itself with, made once and copied to each.

use std::{os::unix::fs::DirBuilderExt as _, path::PathBuf};

use anyhow::{Context as _, ensure};

use crate::identity;

/// Flags of `trireme certificates`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The folder to make; it must not exist, so that no cluster loses the certificates that it runs with.
    #[arg(long)]
    pub out: PathBuf,
}

/// Makes an authority and a node certificate, and says what to write into `[security]`.
pub fn run(args: Args) -> anyhow::Result<()> {
    let path = &args.out;
    ensure!(!path.exists(), "--out {}: exists already", path.display());
    std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(path)
        .with_context(|| format!("--out {}", path.display()))?;
    let files = identity::store(&identity::generate()?, &path.canonicalize()?)?;
    println!("Copy this folder to every machine of the cluster and put this into its configuration:\n");
    println!("[security]\n{}", toml::to_string(&files)?);
    println!("The authority's own key was not kept: nobody, you included, can add a certificate later.");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_read_back_and_never_overwritten() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("certificates");
        run(Args { out: out.clone() }).expect("made");
        let files = identity::Config {
            ca: out.join("ca.pem"),
            cert: out.join("node.pem"),
            key: out.join("node.key"),
        };
        let identity = identity::load(&files).expect("read");
        assert!(identity.key_pem.contains("PRIVATE KEY"));
        assert!(
            run(Args { out }).is_err(),
            "a second call would cut a running cluster off from its successors"
        );
    }
}
