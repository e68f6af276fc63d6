//! A UDP relay that can be cut and joined again: one rail's network.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::pair::Result;

/// Carries datagrams between whoever calls and one server, until dropped.
pub struct Relay {
    address: SocketAddr,
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    cut: AtomicBool,
    over: AtomicBool,
    caller: Mutex<Option<SocketAddr>>,
}

impl Relay {
    /// In front of `server`, a `quic://` address.
    pub fn to(server: &str) -> Result<Self> {
        let server: SocketAddr = server.trim_start_matches("quic://").parse()?;
        let front = UdpSocket::bind("127.0.0.1:0")?;
        let back = UdpSocket::bind("127.0.0.1:0")?;
        back.connect(server)?;
        let (address, state) = (front.local_addr()?, Arc::new(State::default()));
        for socket in [&front, &back] {
            // How soon the end is noticed.
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        }
        let (to_server, from_caller) = (back.try_clone()?, front.try_clone()?);
        let calls = carry(Arc::clone(&state), move |state, datagram| {
            let (bytes, caller) = from_caller.recv_from(datagram).ok()?;
            *state.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(caller);
            state.passes().then(|| to_server.send(&datagram[..bytes]).ok())?
        });
        let answers = carry(Arc::clone(&state), move |state, datagram| {
            let bytes = back.recv(datagram).ok()?;
            let caller = (*state.caller.lock().unwrap_or_else(PoisonError::into_inner))?;
            state.passes().then(|| front.send_to(&datagram[..bytes], caller).ok())?
        });
        Ok(Self { address, state, threads: vec![calls, answers] })
    }

    /// Where to call.
    pub fn address(&self) -> String {
        format!("quic://{}", self.address)
    }

    /// Nothing passes, or everything does.
    pub fn set_cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::Relaxed);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl State {
    fn passes(&self) -> bool {
        !self.cut.load(Ordering::Relaxed)
    }
}

fn carry(
    state: Arc<State>,
    mut one: impl FnMut(&State, &mut [u8]) -> Option<usize> + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut datagram = vec![0; 1 << 16];
        while !state.over.load(Ordering::Relaxed) {
            // Nothing has come for a moment, or it was dropped on the way, as datagrams are.
            let _ = one(&state, &mut datagram);
        }
    })
}
