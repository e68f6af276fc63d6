//! What the suites share: the transports behind one way to open an end, and patient receiving.
//!
//! Waits are guards against a hang, not measurements: nothing is asserted about how long something took.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod certificates;
pub mod relay;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::RecvTimeoutError;
use fabric::{
    Arrivals, Channel, Event, Fabric, Frame, Hub, Limits, LossReason, PeerId, PeerInfo, QuicOptions,
    RdmaOptions, RdmaUse,
};

use certificates::{Authority, Credentials};

/// Long enough for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A way to open ends that can reach each other.
pub enum Net {
    InProcess(Hub),
    /// Between ends of one host that share no memory, as between hosts.
    Quic(Box<Authority>),
    /// Between ends of one host that do.
    Shared(Box<Authority>),
    /// The same over RDMA, with NIXL's library.
    Rdma(Box<Authority>, PathBuf),
}

impl Net {
    pub fn in_process() -> Self {
        Self::InProcess(Hub::new())
    }

    pub fn quic() -> Self {
        Self::Quic(Box::new(Authority::new()))
    }

    pub fn shared() -> Self {
        Self::Shared(Box::new(Authority::new()))
    }

    /// By the library that `TRIREME_NIXL_LIBRARY` names.
    pub fn rdma() -> Self {
        let library = std::env::var_os("TRIREME_NIXL_LIBRARY").expect("the path of libnixl_capi.so");
        Self::Rdma(Box::new(Authority::new()), library.into())
    }

    /// An end for `worker` in its first incarnation.
    pub fn open(&self, worker: &str) -> Fabric {
        self.open_with(worker, 1, Limits::default())
    }

    pub fn open_with(&self, worker: &str, incarnation: u64, limits: Limits) -> Fabric {
        match self {
            Self::InProcess(hub) => Fabric::in_process(hub, worker, incarnation, limits).expect("an end"),
            Self::Quic(authority) | Self::Shared(authority) | Self::Rdma(authority, _) => {
                let options = options(&authority.pem(), authority.issue(), worker, incarnation, limits);
                let share_memory = matches!(self, Self::Shared(_));
                let rdma = match self {
                    Self::Rdma(_, library) => {
                        RdmaOptions { when: RdmaUse::On, library: Some(library.clone()) }
                    }
                    _ => RdmaOptions { when: RdmaUse::Off, library: None },
                };
                Fabric::quic(QuicOptions { share_memory, rdma, ..options }).expect("an end")
            }
        }
    }
}

/// Options for a free loopback port.
pub fn options(
    ca_pem: &str,
    credentials: Credentials,
    worker: &str,
    incarnation: u64,
    limits: Limits,
) -> QuicOptions {
    QuicOptions {
        bind: ([127, 0, 0, 1], 0).into(),
        ca_pem: ca_pem.to_owned(),
        cert_pem: credentials.cert_pem,
        key_pem: credentials.key_pem,
        worker: worker.to_owned(),
        incarnation,
        limits,
        datagram_bytes: None,
        share_memory: false,
        rdma: Default::default(),
    }
}

/// Two connected ends, as `a` (who dialled) and `b` see each other.
pub struct Pair {
    pub a: Fabric,
    pub b: Fabric,
    pub b_at_a: PeerId,
    pub a_at_b: PeerId,
}

pub fn pair(net: &Net) -> Pair {
    pair_with(net, Limits::default())
}

pub fn pair_with(net: &Net, limits: Limits) -> Pair {
    let a = net.open_with("a", 1, limits.clone());
    let b = net.open_with("b", 1, limits);
    let b_at_a = a.connect(&b.address(), PATIENCE).expect("a connection");
    let (a_at_b, info) = up(&b.receiver(Channel::Kv));
    assert_eq!((info.worker.as_str(), info.incarnation), ("a", 1));
    assert_eq!(up(&b.receiver(Channel::Experts)).0, a_at_b, "both channels name the same peer");
    assert_eq!(up(&a.receiver(Channel::Kv)).0, b_at_a);
    assert_eq!(up(&a.receiver(Channel::Experts)).0, b_at_a);
    Pair { a, b, b_at_a, a_at_b }
}

pub fn frame(head: &[u8], body: &[u8]) -> Frame {
    Frame { head: Bytes::copy_from_slice(head), body: vec![Bytes::copy_from_slice(body)] }
}

/// Offers a frame until the queue takes it.
pub fn send(from: &Fabric, peer: PeerId, channel: Channel, mut frame: Frame) {
    let start = Instant::now();
    loop {
        match from.try_send(peer, channel, frame) {
            Ok(()) => return,
            Err(fabric::SendError::Full(back)) if start.elapsed() < PATIENCE => frame = back,
            Err(error) => panic!("cannot send: {error}"),
        }
        std::thread::yield_now();
    }
}

pub fn next(events: &Arrivals) -> Event {
    events.recv_timeout(PATIENCE).expect("an event")
}

pub fn up(events: &Arrivals) -> (PeerId, PeerInfo) {
    match next(events) {
        Event::PeerUp { peer, info } => (peer, info),
        other => panic!("expected a peer to come up, got {other:?}"),
    }
}

pub fn lost(events: &Arrivals) -> (PeerId, LossReason) {
    match next(events) {
        Event::PeerLost { peer, reason } => (peer, reason),
        other => panic!("expected a peer to be lost, got {other:?}"),
    }
}

pub fn received(events: &Arrivals) -> (PeerId, Bytes, Bytes) {
    match next(events) {
        Event::Frame { peer, head, body } => (peer, head, body.into_bytes()),
        other => panic!("expected a frame, got {other:?}"),
    }
}

/// Reads to the end of a closed end's queue.
pub fn drained(events: &Arrivals) {
    loop {
        match events.recv_timeout(PATIENCE) {
            Ok(_) => (),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => panic!("the queue of a closed end does not end"),
        }
    }
}

/// Waits for a condition that another thread brings about.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never came true: {what}");
        std::thread::yield_now();
    }
}

/// Bytes that differ by position and by seed.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}
