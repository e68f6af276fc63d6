//! How quinn is tuned for the path it runs on.
//!
//! The figures are measurements on this project's CPUs over loopback. The datagram size decides: 0.75 GB/s with quinn's
//! defaults, 2.4–2.75 with 9,000-byte frames, 3.0–3.7 with loopback's. Four combinations make quinn fail, and each has
//! its line below: a segmented send over 65,507 bytes, a datagram size over the congestion window, a handshake packet
//! over 16 KiB, and windows over the receiver's socket buffer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::congestion::Uncontrolled;
use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::error::FabricError;
use crate::limits::Limits;

/// The largest UDP payload over IPv4, and what one segmented send may hold at most.
pub(crate) const UDP_PAYLOAD_BYTES_MAX: u16 = 65_507;
/// What QUIC asks of every path.
const PAYLOAD_BYTES_MIN: u16 = 1200;
/// The same as the largest over IPv6 on loopback, whose MTU is 65,536.
const UDP6_PAYLOAD_BYTES_MAX: u16 = 65_488;
/// 9,000-byte Ethernet less the IPv6 and UDP headers.
const JUMBO_PAYLOAD_BYTES: u16 = 8_952;
/// What quinn pads the handshake's datagrams to, and falls back to when large ones are lost, on a path that is known. Not
/// loopback's full size: a handshake packet's length field ends at 16,383, and quinn panics beyond.
const KNOWN_FLOOR_BYTES: u16 = 16_000;

/// From a peer's last packet until it is given up, at most. Of the 2 s that the design allows from a fault until both sides are
/// at their baseline, the rest is for those who act on it.
pub const SILENCE_MAX: Duration = Duration::from_millis(1500);
/// Six lost in a row before a live peer is taken for dead.
const KEEP_ALIVE: Duration = Duration::from_millis(200);
/// QUIC's idle time starts anew with the first packet that is sent after one was received: a keep-alive later than the peer's
/// last word.
pub(crate) const IDLE: Duration = SILENCE_MAX.saturating_sub(KEEP_ALIVE);
/// quinn's 333 ms would repeat a lost first packet after a second only; within a site 25 ms is plenty.
const INITIAL_RTT: Duration = Duration::from_millis(25);

/// What a connection may keep unacknowledged: UDP has no back-pressure, and what the receiver's socket cannot hold is lost
/// and sent again. Our own buffer stands for the peer's, which is set up alike; the rest of it is for what else arrives.
pub(crate) fn in_flight_bytes(limits: &Limits, socket_buffer_bytes: usize) -> u64 {
    limits.in_flight_bytes_max.min(socket_buffer_bytes / 4 * 3) as u64
}

/// The kind of network below an end, told by the address it is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    /// Datagram payload that is aimed at.
    pub mtu_bytes: u16,
    /// Known beforehand: used from the first packet on, instead of being searched for.
    known: bool,
    /// Nobody else's packets are in the way.
    loopback: bool,
}

impl Path {
    /// The path below `bound`, on which `configured` bytes are known to pass.
    pub fn of(bound: SocketAddr, configured: Option<u16>) -> Result<Self, FabricError> {
        let (most, loopback) = match bound {
            SocketAddr::V6(_) => (UDP6_PAYLOAD_BYTES_MAX, bound.ip().is_loopback()),
            SocketAddr::V4(_) => (UDP_PAYLOAD_BYTES_MAX, bound.ip().is_loopback()),
        };
        match configured {
            Some(mtu_bytes) if (PAYLOAD_BYTES_MIN..=most).contains(&mtu_bytes) => {
                Ok(Self { mtu_bytes, known: true, loopback })
            }
            Some(got) => Err(FabricError::DatagramBytes { got, min: PAYLOAD_BYTES_MIN, max: most }),
            None if loopback => Ok(Self { mtu_bytes: most, known: true, loopback }),
            None => Ok(Self { mtu_bytes: JUMBO_PAYLOAD_BYTES, known: false, loopback }),
        }
    }

    /// Datagrams in one send. quinn puts ten into one whatever their size, and drops them without a word when the
    /// kernel refuses more than 65,507 bytes.
    pub fn segments_max(self) -> usize {
        usize::from(UDP_PAYLOAD_BYTES_MAX / self.mtu_bytes).max(1)
    }

    /// quinn's settings for connections that keep at most `in_flight_bytes` unacknowledged, see [`in_flight_bytes`].
    pub fn transport(self, in_flight_bytes: u64) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();

        // Before the MTU: a window under the datagram size hangs for ever, without an error or a timer.
        let mtu_bytes = u64::from(self.mtu_bytes);
        let initial_window = (32 * mtu_bytes).min(in_flight_bytes).max(2 * mtu_bytes);
        if self.loopback {
            transport.congestion_controller_factory(Arc::new(Uncontrolled));
        } else {
            let mut cubic = CubicConfig::default();
            cubic.initial_window(initial_window);
            transport.congestion_controller_factory(Arc::new(cubic));
        }
        if self.known {
            transport.initial_mtu(self.mtu_bytes).min_mtu(self.mtu_bytes.min(KNOWN_FLOOR_BYTES));
        }
        // On a known path there is nothing to find at first, but a way back up after a fall.
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.mtu_bytes);
        transport.mtu_discovery_config(Some(discovery));

        // What is unacknowledged is bounded here, by the sender; receive windows are wide so that flow control only
        // acts when a consumer lags behind and its inbox is no longer read.
        transport
            .send_window(in_flight_bytes)
            .stream_receive_window(VarInt::from_u32(16 << 20))
            .receive_window(VarInt::from_u32(64 << 20));

        transport
            .max_concurrent_uni_streams(VarInt::from_u32(2))
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .datagram_receive_buffer_size(None)
            .initial_rtt(INITIAL_RTT)
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE.as_millis() as u32))));
        Arc::new(transport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segmented_send_never_exceeds_a_udp_payload() {
        for (bound, mtu_bytes, segments) in [
            ("127.0.0.1:0", 65_507, 1),
            ("[::1]:0", 65_488, 1),
            ("0.0.0.0:0", 8_952, 7),
            ("[::]:0", 8_952, 7),
        ] {
            let path = Path::of(bound.parse().expect("a socket address"), None).expect("a path");
            assert_eq!((path.mtu_bytes, path.segments_max()), (mtu_bytes, segments), "{bound}");
            assert!(path.segments_max() * usize::from(path.mtu_bytes) <= usize::from(UDP_PAYLOAD_BYTES_MAX));
        }
    }

    #[test]
    fn a_configured_size_is_taken_where_udp_can_carry_it() {
        let of = |bound: &str, bytes| Path::of(bound.parse().expect("a socket address"), Some(bytes));
        for (bound, bytes, segments) in
            [("127.0.0.1:0", 8_972, 7), ("[::]:0", 1_200, 54), ("0.0.0.0:0", 65_507, 1)]
        {
            let path = of(bound, bytes).expect("a path");
            assert_eq!((path.mtu_bytes, path.segments_max(), path.known), (bytes, segments, true), "{bound}");
        }
        for (bound, bytes) in [("127.0.0.1:0", 1_199), ("127.0.0.1:0", 65_508), ("[::1]:0", 65_489)] {
            let error = of(bound, bytes).expect_err("UDP cannot carry it").to_string();
            assert!(error.contains("datagram_bytes") && error.contains(&bytes.to_string()), "{error}");
        }
    }

    #[test]
    fn no_more_is_in_flight_than_a_socket_holds() {
        let limits = Limits { in_flight_bytes_max: 64 << 20, ..Limits::default() };
        assert_eq!(in_flight_bytes(&limits, 4 << 20), 3 << 20);
        assert_eq!(in_flight_bytes(&limits, 208 << 10), 156 << 10);
        assert_eq!(in_flight_bytes(&Limits::default(), 64 << 20), 3 << 20);
    }
}
