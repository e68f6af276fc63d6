//! Frames between processes of one host, through memory that both see.
//!
//! An attachment to a QUIC connection, not a transport of its own: the connection has authenticated the peer and its hello
//! names a Unix socket, and whoever is reached there with the token that only the two know, is of this host
//! ([`attach`]). Over that socket each side passes the memory that it will write ([`memory`], [`layout`]) and the bells
//! that wake it. From then on frames take the [`ring`]s; the connection stays for liveness, and the socket because the kernel
//! closes it in the moment in which the peer's process ends.
//!
//! Each side writes its own memory alone and maps the other's read-only: a receiver copies out of the sender's
//! memory after its own checks, and nobody can write into a receiver's.

mod attach;
mod layout;
mod memory;
mod ring;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use tokio::io::unix::AsyncFd;

pub(crate) use attach::{Attached, Door, Expected, Offer, Side, host_id};
pub(crate) use layout::Layout;
pub(crate) use ring::{Consumer, Producer, SharedBody, head_room};

/// Something to sleep on.
pub(crate) fn new_bell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Wakes who sleeps on it, or will next.
pub(crate) fn ring_bell(bell: &OwnedFd) {
    // It can only fail by overflowing, when it has been rung for long.
    let _ = rustix::io::write(bell.as_fd(), &1_u64.to_ne_bytes());
}

/// Before sleeping again.
pub(crate) fn silence_bell(bell: &OwnedFd) {
    // Fails where it was not rung.
    let _ = rustix::io::read(bell.as_fd(), &mut [0; 8]);
}

/// Makes a bell something that a task can wait for. On a runtime with I/O.
pub(crate) fn listen(bell: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "the constructor asks for a promise")]
    // SAFETY: the descriptor is owned, and stays the same and open until the drop.
    let registered = unsafe { AsyncFd::register(bell) };
    Ok(registered?)
}
