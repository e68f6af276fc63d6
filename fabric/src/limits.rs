//! The bounds of everything that could grow, and the relations between them.

use crate::error::FabricError;

/// Bounds of one end of the fabric. Both ends should agree on the frame sizes: a frame that is legal for its
/// sender and too long for its receiver costs the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a frame's head. 1 MiB: a dispatch of 8,192 tokens with 8 experts each stays under 300 KB.
    pub head_bytes_max: usize,
    /// Bytes of a frame's body. 64 MiB: 4,096 rows of 16 KiB.
    pub body_bytes_max: usize,
    /// Frames waiting to be sent, per peer and channel.
    pub send_frames_max: usize,
    /// Bytes waiting to be sent, per peer and channel. One frame is always taken into an empty queue.
    pub send_bytes_max: usize,
    /// Frames received and not yet dropped by their consumer, per channel.
    pub receive_frames_max: usize,
    /// Bytes received and not yet dropped by their consumer, per channel.
    pub receive_bytes_max: usize,
    /// Live connections, dialled and accepted together.
    pub peers_max: usize,
    /// Bytes sent to a peer and not yet acknowledged. UDP has no back-pressure: what exceeds the receiver's
    /// socket buffer (4 MiB where the system allows it) is lost and sent again.
    pub in_flight_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes_max: 1 << 20,
            body_bytes_max: 64 << 20,
            send_frames_max: 1024,
            send_bytes_max: 64 << 20,
            receive_frames_max: 1024,
            receive_bytes_max: 128 << 20,
            peers_max: 256,
            in_flight_bytes_max: 3 << 20,
        }
    }
}

impl Limits {
    /// Checks each bound and the relations between them; the error names the field.
    pub fn validate(&self) -> Result<(), FabricError> {
        let positive = [
            ("head_bytes_max", self.head_bytes_max),
            ("body_bytes_max", self.body_bytes_max),
            ("send_frames_max", self.send_frames_max),
            ("send_bytes_max", self.send_bytes_max),
            ("receive_frames_max", self.receive_frames_max),
            ("peers_max", self.peers_max),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(FabricError::Limits { field, rule: "must be at least 1" });
            }
        }
        // Lengths travel as u32, and the receive budget is counted in u32 permits.
        if u32::try_from(self.receive_bytes_max).is_err() {
            return Err(FabricError::Limits { field: "receive_bytes_max", rule: "must be under 4 GiB" });
        }
        if self.receive_bytes_max < self.frame_bytes_max() {
            let rule = "must hold one frame: head_bytes_max + body_bytes_max";
            return Err(FabricError::Limits { field: "receive_bytes_max", rule });
        }
        // Below this a full-size loopback datagram would never fit into the window.
        if self.in_flight_bytes_max < 128 << 10 {
            return Err(FabricError::Limits {
                field: "in_flight_bytes_max",
                rule: "must be at least 128 KiB",
            });
        }
        Ok(())
    }

    /// Bytes of the largest frame.
    pub(crate) fn frame_bytes_max(&self) -> usize {
        self.head_bytes_max.saturating_add(self.body_bytes_max)
    }
}

#[cfg(test)]
mod tests;
