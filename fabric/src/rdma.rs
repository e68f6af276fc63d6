//! Frames over RDMA, through NIXL: one-sided writes into staging memory that the receiver has granted.
//!
//! An attachment to a QUIC connection, as [`crate::shared`] is: the connection has authenticated the peer, and over it the two
//! exchange what NIXL needs to know ([`wire`]), then each proves that it can write to the other ([`pump`]). Whatever fails
//! before both have confirmed leaves them with QUIC, which stays beside for liveness.
//!
//! A sender places a frame in its own [`staging`] memory and writes it to the same place of the receiver's, whose notice says
//! where it lies; a place is used again when the receiver has given it back ([`crate::places`]). No peer is ever given a key to
//! anything but its connection's staging memory: a device thread copies out of it after its own checks, as it does from
//! shared memory. With the connection its memory ends as a target, see [`staging`]; nothing waits for a late write.
//!
//! The library ([`library`]) is opened at run time, and where it is absent there is no RDMA and no error, unless the
//! configuration insists on it. RDMA is not encrypted: it is for networks that are trusted with the KV cache.

mod agent;
mod library;
mod link;
mod pump;
mod staging;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::error::LibraryError;
use crate::event::PeerId;
use crate::frame::Channel;
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::stats::Counters;
use crate::sync::lock;
use library::Library;
use link::{Command, Link};
pub(crate) use link::{Producer, StagedBody};
pub(crate) use pump::Ended;
use pump::{Control, Start};
pub(crate) use wire::{OFFER_BYTES_MAX, Offer};

/// Where the loader finds it by itself.
const LIBRARY: &str = "libnixl_capi.so";
/// One entry for each RDMA device.
const DEVICES: &str = "/sys/class/infiniband";
/// From two offers to the proof that each end reaches the other.
const PROOF_MAX: Duration = Duration::from_millis(1000);

/// Whether frames may go over RDMA, and through what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RdmaOptions {
    /// When it is used.
    pub when: RdmaUse,
    /// NIXL's C library; `None`: where the loader finds `libnixl_capi.so`.
    pub library: Option<PathBuf>,
}

/// When RDMA is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RdmaUse {
    /// Never.
    Off,
    /// Where this host has an RDMA device and the library is there.
    #[default]
    Auto,
    /// Also without a device, over what UCX has instead; the library must be there.
    On,
}

/// An end's side of RDMA: the library, and the threads of its connections.
pub(crate) struct Rdma {
    library: Arc<Library>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Rdma {
    /// Opens the library if it is to be used.
    ///
    /// # Errors
    /// It must be there and is not, or lacks a function.
    pub fn open(options: &RdmaOptions) -> Result<Option<Arc<Self>>, LibraryError> {
        let insisted = match options.when {
            RdmaUse::Off => return Ok(None),
            RdmaUse::Auto if !has_device(Path::new(DEVICES)) => return Ok(None),
            RdmaUse::Auto => options.library.is_some(),
            RdmaUse::On => true,
        };
        match Library::open(options.library.as_deref().unwrap_or(Path::new(LIBRARY))) {
            Ok(library) => Ok(Some(Arc::new(Self { library: Arc::new(library), threads: Mutex::default() }))),
            Err(error) if insisted => Err(error),
            Err(error) => {
                tracing::warn!(%error, "an RDMA device, but no library for it: frames go over QUIC");
                Ok(None)
            }
        }
    }

    /// Waits for the threads of connections that have ended.
    pub fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a connection's RDMA thread panicked");
            }
        }
    }

    fn keep(&self, thread: JoinHandle<()>) {
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// Starts a connection's thread and waits for its offer. `None`: NIXL refuses.
    pub async fn prepare(
        &self,
        name: &str,
        limits: &Limits,
        inboxes: Arc<[Inbox; 2]>,
        counters: Arc<Counters>,
    ) -> Option<(Prepared, Offer)> {
        let (link, commands) = match pump::link(limits) {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!(%error, "no staging memory for RDMA");
                return None;
            }
        };
        let start = Start {
            library: Arc::clone(&self.library),
            name: format!("{name}-{:016x}", rand::random::<u64>()),
            limits: limits.clone(),
            inboxes,
            counters,
            link: Arc::clone(&link),
            commands,
        };
        let ((offered, offer), (say_ended, ended)) = (oneshot::channel(), oneshot::channel());
        let thread = pump::spawn(start, offered, say_ended).ok()?;
        self.keep(thread);
        let prepared = Prepared { link: Running(link), ended };
        // Dropped by a thread that has failed.
        let offer = offer.await.ok()?;
        Some((prepared, offer))
    }
}

fn has_device(devices: &Path) -> bool {
    std::fs::read_dir(devices).is_ok_and(|mut entries| entries.next().is_some())
}

/// A connection's thread before the peer is known to reach us.
pub(crate) struct Prepared {
    link: Running,
    ended: oneshot::Receiver<Ended>,
}

impl Prepared {
    /// Whether we have written to the peer and it to us.
    pub async fn prove(&self, theirs: Offer) -> bool {
        let (proven, proof) = oneshot::channel();
        self.link.control(Control::Meet(theirs, proven));
        matches!(tokio::time::timeout(PROOF_MAX, proof).await, Ok(Ok(())))
    }

    /// What sends, and what is watched while the connection lives.
    pub fn attach(self, theirs: (u64, u64), limits: &Limits) -> ([Producer; 2], Attached) {
        let (arena_bytes, frames_max) = theirs;
        let producer =
            |channel| Producer::new(Arc::clone(&self.link.0), channel, limits, arena_bytes, frames_max);
        let producers = Channel::ALL.map(producer);
        (producers, Attached { link: self.link, ended: self.ended })
    }
}

/// A connection's thread. Told to end with the drop.
struct Running(Arc<Link>);

impl Running {
    fn control(&self, control: Control) {
        // Full: the thread is behind, and on its way here.
        if let Err(error) =
            self.0.commands.send_timeout(Command::Control(control), Duration::from_millis(100))
        {
            tracing::debug!(%error, "an RDMA thread does not listen");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control(Control::Stop(oneshot::channel().0));
    }
}

/// A connection's RDMA while it lives.
pub(crate) struct Attached {
    link: Running,
    ended: oneshot::Receiver<Ended>,
}

impl Attached {
    /// From here on frames are delivered, as `peer`'s.
    pub fn deliver_as(&self, peer: PeerId) {
        self.link.control(Control::Deliver(peer));
    }

    /// Waits until the link ends by itself.
    pub async fn ended(&mut self) -> Ended {
        match (&mut self.ended).await {
            Ok(ended) => ended,
            Err(_) => Ended::Failed("its thread ended".to_owned()),
        }
    }

    /// Stops delivering: no frame of the peer follows.
    pub async fn stop(&self) {
        let (quiet, silence) = oneshot::channel();
        self.link.control(Control::Stop(quiet));
        // The thread may have ended by itself: then it is silent as well.
        let _ = silence.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_an_error_only_where_it_is_asked_for() {
        let nowhere = Some(PathBuf::from("/nowhere/libnixl_capi.so"));
        let open = |when| Rdma::open(&RdmaOptions { when, library: nowhere.clone() });
        assert!(open(RdmaUse::Off).is_ok_and(|rdma| rdma.is_none()));
        let error = open(RdmaUse::On).err().expect("it is asked for").to_string();
        assert!(error.contains("/nowhere/libnixl_capi.so"), "{error}");
        let empty = std::env::temp_dir().join(format!("trireme-no-devices-{}", std::process::id()));
        assert!(!has_device(&empty));
    }
}
