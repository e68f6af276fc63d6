//! A UDP relay that can be cut: the network, from the point of view of an end whose peer was stopped.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Forwards between one client and a server until cut or dropped.
pub struct Relay {
    front: SocketAddr,
    server: Arc<Mutex<SocketAddr>>,
    cut: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Listens on a free port and forwards to `server`, a `quic://` address.
    pub fn to(server: &str) -> Self {
        let server = Arc::new(Mutex::new(socket_address(server)));
        let bind = || Arc::new(UdpSocket::bind("127.0.0.1:0").expect("a free port"));
        let (front, back) = (bind(), bind());
        let address = front.local_addr().expect("a bound address");
        let (cut, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let client = Arc::new(Mutex::new(None));
        let to_server = {
            let (back, client, server) = (Arc::clone(&back), Arc::clone(&client), Arc::clone(&server));
            forward(Arc::clone(&front), &cut, &stop, move |datagram, sender| {
                *client.lock().expect("not poisoned") = Some(sender);
                drop(back.send_to(datagram, *server.lock().expect("not poisoned")));
            })
        };
        let current = Arc::clone(&server);
        let to_client = forward(back, &cut, &stop, move |datagram, sender| {
            if let Some(client) = *client.lock().expect("not poisoned")
                && sender == *current.lock().expect("not poisoned")
            {
                drop(front.send_to(datagram, client));
            }
        });
        Self { front: address, server, cut, stop, threads: vec![to_server, to_client] }
    }

    pub fn address(&self) -> String {
        format!("quic://{}", self.front)
    }

    /// From now on another server is behind the same address, as after a restart.
    pub fn retarget(&self, server: &str) {
        *self.server.lock().expect("not poisoned") = socket_address(server);
    }

    /// From now on nothing passes in either direction.
    pub fn cut(&self) {
        self.cut.store(true, SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn socket_address(address: &str) -> SocketAddr {
    address.strip_prefix("quic://").and_then(|a| a.parse().ok()).expect("a QUIC address")
}

/// Hands what arrives at `from` on, until told to stop.
fn forward(
    from: Arc<UdpSocket>,
    cut: &Arc<AtomicBool>,
    stop: &Arc<AtomicBool>,
    deliver: impl Fn(&[u8], SocketAddr) + Send + 'static,
) -> JoinHandle<()> {
    from.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
    let (cut, stop) = (Arc::clone(cut), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut datagram = vec![0; 65_535];
        while !stop.load(SeqCst) {
            if let Ok((bytes, sender)) = from.recv_from(&mut datagram)
                && !cut.load(SeqCst)
            {
                deliver(&datagram[..bytes], sender);
            }
        }
    })
}
