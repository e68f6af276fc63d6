//! The UDP socket: buffers as large as the system lets us have, and segmented sends within what UDP can carry.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};

use super::path::{Path, UDP_PAYLOAD_BYTES_MAX};

/// UDP drops what the receive buffer cannot hold; the system's 208 KiB default loses packets on loopback already.
pub(crate) const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Binds a socket with buffers of `wanted` bytes, and says which address it got and how large the smaller buffer is.
pub(crate) fn bind(address: SocketAddr, wanted: usize) -> io::Result<(UdpSocket, SocketAddr, usize)> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(wanted)?;
    socket.set_send_buffer_size(wanted)?;
    // Linux answers with twice what it granted, to account for its own overhead.
    let overhead = if cfg!(target_os = "linux") { 2 } else { 1 };
    let (receive, send) = (socket.recv_buffer_size()? / overhead, socket.send_buffer_size()? / overhead);
    if receive < wanted || send < wanted {
        tracing::warn!(
            wanted,
            receive,
            send,
            "small UDP buffers: less is kept in flight; raise net.core.rmem_max and net.core.wmem_max"
        );
    }
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    let bound = socket.local_addr()?;
    Ok((socket, bound, receive.min(send)))
}

/// Hands the socket to quinn. To be called on the I/O thread's runtime.
pub(crate) fn register(socket: UdpSocket, path: Path) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    Ok(Arc::new(Capped { inner, path }))
}

/// A socket whose segmented sends and receives stay within one UDP payload.
struct Capped {
    inner: Arc<dyn AsyncUdpSocket>,
    path: Path,
}

impl AsyncUdpSocket for Capped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.path.segments_max())
    }

    /// quinn sizes its receive buffer by this times the payload limit times 32: with the kernel's 64 that is 134 MB
    /// for loopback's payload. What the kernel joins never exceeds one UDP payload, so this many are enough.
    fn max_receive_segments(&self) -> usize {
        let enough = usize::from(UDP_PAYLOAD_BYTES_MAX).div_ceil(usize::from(self.path.mtu_bytes));
        self.inner.max_receive_segments().min(enough)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

impl fmt::Debug for Capped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capped").field("path", &self.path).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_the_system_does_not_grant_is_told_with_its_size() {
        let address = ([127, 0, 0, 1], 0).into();
        let (_, bound, granted) = bind(address, 64 << 10).expect("a socket");
        assert!(bound.port() != 0 && granted == 64 << 10, "{granted}");
        // More than any system lets an unprivileged socket have, or as much as one may ask for.
        let (_, _, granted) = bind(address, 1 << 30).expect("a socket");
        assert!(granted > 64 << 10 && granted <= 1 << 30, "{granted}");
    }
}
