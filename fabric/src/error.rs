//! What can go wrong, by what the caller should do next.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::frame::{Frame, ProtocolError};

/// Errors of opening an end and of connecting it.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// A bound in [`Limits`](crate::Limits) makes no sense. Rejected: the configuration is wrong.
    #[error("limits.{field} {rule}")]
    Limits {
        /// The field at fault.
        field: &'static str,
        /// What it must keep to.
        rule: &'static str,
    },
    /// The configured datagram size cannot be. Rejected.
    #[error("datagram_bytes must be {min} to {max} on this address, not {got}")]
    DatagramBytes {
        /// What was configured.
        got: u16,
        /// What QUIC needs.
        min: u16,
        /// What UDP carries.
        max: u16,
    },
    /// The worker's name is empty or longer than the hello can carry. Rejected.
    #[error("a worker's name must have 1 to {max} bytes, this one has {got}")]
    WorkerName {
        /// Bytes of the name given.
        got: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// Certificates or key cannot be used. Rejected.
    #[error("the fabric's credentials cannot be used")]
    Credentials(#[from] CredentialError),
    /// The address is none of this transport. Rejected.
    #[error("`{address}` is no address here; expected {expected}")]
    Address {
        /// The address given.
        address: String,
        /// Its form on this transport.
        expected: &'static str,
    },
    /// Someone else has this address.
    #[error("`{address}` is already taken")]
    AddressInUse {
        /// The address asked for.
        address: String,
    },
    /// RDMA is asked for and cannot be had.
    #[error("no RDMA")]
    Rdma(#[from] LibraryError),
    /// The UDP socket could not be bound or set up.
    #[error("cannot bind the fabric to {address}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The I/O thread could not be started.
    #[error("cannot start the fabric's I/O thread")]
    Thread(#[source] io::Error),
    /// No connection to the peer. Unavailable: it may work later, or with another worker.
    #[error("cannot connect to `{address}`")]
    Unreachable {
        /// The address dialled.
        address: String,
        /// Why.
        #[source]
        source: DialError,
    },
    /// This end is closed.
    #[error("this end of the fabric is closed")]
    Closed,
}

/// Why NIXL's library cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    /// It cannot be opened.
    #[error("cannot open NIXL's library {path}: {detail}", path = path.display())]
    Absent {
        /// Where it was looked for.
        path: PathBuf,
        /// The loader's words.
        detail: String,
    },
    /// It is another library, or another version.
    #[error("NIXL's library has no function `{name}`; version 1.5 has")]
    Function {
        /// What is missing.
        name: &'static str,
    },
}

/// Why dialling failed. Cloned to every caller that waits for the same address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// No such host, or no address of the bound family.
    #[error("the name does not resolve")]
    Unresolved,
    /// Nobody answered in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The peer, or our own check of it, ended the handshake: wrong CA, expired certificate, other protocol.
    #[error("the handshake failed: {detail}")]
    Handshake {
        /// What the TLS or QUIC layer reported.
        detail: String,
    },
    /// The peer does not speak our wire.
    #[error("the peer breaks the protocol")]
    Protocol(#[from] ProtocolError),
    /// Too many peers, or too many events nobody reads, on this end or the other.
    #[error("too many peers or unread events")]
    Overloaded,
    /// Nobody of that name is there (in-process only: a network cannot know).
    #[error("nobody is there")]
    Absent,
    /// One of the ends closed while connecting.
    #[error("closed while connecting")]
    Closed,
}

/// Certificates or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// Not PEM, or not of the kind expected.
    #[error("{field} is not valid PEM")]
    Pem {
        /// `ca_pem`, `cert_pem` or `key_pem`.
        field: &'static str,
        /// The parser's complaint.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// PEM without a certificate in it.
    #[error("{field} holds no certificate")]
    Empty {
        /// `ca_pem` or `cert_pem`.
        field: &'static str,
    },
    /// More certificates than a handshake packet holds.
    #[error("{field} holds {bytes} bytes of certificates, at most {max} allowed")]
    TooLong {
        /// `ca_pem` or `cert_pem`.
        field: &'static str,
        /// Bytes found, without the PEM armour.
        bytes: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The TLS library refuses them, for one because key and certificate differ.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The CA cannot verify clients.
    #[error(transparent)]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Why a frame was not queued.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The peer's queue is full: offer the frame again later.
    #[error("the peer's queue is full")]
    Full(Frame),
    /// The frame is longer than [`Limits`](crate::Limits) allows: a bug of the caller, who must cut it.
    #[error("the frame is longer than the limits allow")]
    Oversized(Frame),
    /// The peer is lost, or never was.
    #[error("the peer is gone")]
    Gone,
}
