//! One layer's experts for the rows of several sources: the products of all of them together.

use bytes::{Bytes, BytesMut};
use compute::{Activations, Cpu};
use engine::{ExpertBank, ExpertGroup, ExpertJobs, ExpertScratch, ExpertsError};
use fabric::PeerId;
use model::ExpertId;
use proto::v1::DispatchHead;

use crate::wire::WireFormats;

/// A dispatch that has passed [`crate::wire::check_dispatch`].
pub(crate) struct Dispatch {
    pub peer: PeerId,
    pub head: DispatchHead,
    pub body: Bytes,
}

impl Dispatch {
    pub(crate) fn layer(&self) -> u32 {
        self.head.layer
    }

    /// (token, expert) pairs.
    pub(crate) fn vectors(&self) -> usize {
        self.head.experts.len()
    }
}

/// One (token, expert) pair of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Assignment {
    expert: u16,
    /// Row in the batch's activations.
    row: u32,
    /// Where its vector goes, counted over all dispatches of the batch.
    vector: u32,
}

/// The experts, the device, and buffers that grow to the largest batch and then stay.
pub(crate) struct Step {
    bank: ExpertBank,
    cpu: Cpu,
    wire: WireFormats,
    scratch: ExpertScratch,
    rows_bytes: Vec<u8>,
    activations: Activations,
    assignments: Vec<Assignment>,
    rows: Vec<u32>,
    groups: Vec<ExpertGroup>,
    results: Vec<f32>,
}

impl Step {
    pub(crate) fn new(bank: ExpertBank, cpu: Cpu, wire: WireFormats) -> Self {
        Self {
            activations: bank.activations(),
            bank,
            cpu,
            wire,
            scratch: ExpertScratch::default(),
            rows_bytes: Vec::new(),
            assignments: Vec::new(),
            rows: Vec::new(),
            groups: Vec::new(),
            results: Vec::new(),
        }
    }

    /// Computes checked dispatches of one layer; gives one combine body per dispatch, in order.
    pub(crate) fn run(&mut self, batch: &[Dispatch]) -> Result<Vec<Bytes>, ExpertsError> {
        let Some(layer) = batch.first().map(|dispatch| dispatch.layer() as usize) else {
            return Ok(Vec::new());
        };
        self.gather(layer, batch)?;
        let row_bytes = self.wire.result_row_bytes();
        let hidden = self.wire.hidden;
        let mut combined = BytesMut::zeroed(self.assignments.len() * row_bytes);
        self.results.resize(self.assignments.len() * hidden, 0.0);
        let jobs =
            ExpertJobs { layer, activations: &self.activations, rows: &self.rows, groups: &self.groups };
        self.bank.forward(&self.cpu, &mut self.scratch, jobs, &mut self.results)?;
        for (assignment, result) in self.assignments.iter().zip(self.results.chunks_exact(hidden)) {
            let at = assignment.vector as usize * row_bytes;
            self.wire.write_result(result, &mut combined[at..at + row_bytes]);
        }
        // Each source's vectors lie together, so its body is a slice of the one buffer.
        let bodies = batch.iter().map(|dispatch| combined.split_to(dispatch.vectors() * row_bytes).freeze());
        Ok(bodies.collect())
    }

    /// Lays the rows of all dispatches one after another and sorts their pairs by expert.
    fn gather(&mut self, layer: usize, batch: &[Dispatch]) -> Result<(), ExpertsError> {
        self.rows_bytes.clear();
        self.assignments.clear();
        let (mut row, mut vector) = (0, 0);
        for Dispatch { head, body, .. } in batch {
            self.rows_bytes.extend_from_slice(body);
            let mut experts = head.experts.iter();
            for &count in &head.experts_per_token {
                for &expert in experts.by_ref().take(count as usize) {
                    // Checked: every id is one of the placement's, which has 16 bits.
                    self.assignments.push(Assignment { expert: expert as u16, row, vector });
                    vector += 1;
                }
                row += 1;
            }
        }
        self.assignments.sort_unstable();
        self.rows.clear();
        self.rows.extend(self.assignments.iter().map(|assignment| assignment.row));
        self.groups.clear();
        self.groups.extend(
            self.assignments
                .chunk_by(|a, b| a.expert == b.expert)
                .map(|group| ExpertGroup { expert: ExpertId(group[0].expert), rows: group.len() }),
        );
        let WireFormats { hidden, activation, .. } = self.wire;
        self.activations
            .read_wire(activation, row as usize, hidden, &self.rows_bytes)
            .map_err(|error| ExpertsError::Rejected { layer, detail: error.to_string() })
    }
}
