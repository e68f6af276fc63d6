//! Routed experts in the engine's own process: the reference implementation of the seam.

use compute::Cpu;
use model::ExpertId;

use super::{ExpertBank, ExpertBatch, ExpertGroup, ExpertJobs, ExpertScratch, Experts, ExpertsError};

/// Computes a batch in [`Experts::dispatch`] and hands it over in [`Experts::combine`].
///
/// It is what the distributed implementation is compared with bit by bit, so it takes the same inputs (tokens in the
/// wire format) and rounds in the same places. Its buffers grow to the largest batch and then stay.
pub struct LocalExperts {
    bank: ExpertBank,
    scratch: ExpertScratch,
    /// Assignments `(expert, index into expert_ids)`, sorted: each expert's rows lie together, tokens ascending.
    assignments: Vec<(u16, u32)>,
    /// Token of each assignment.
    rows: Vec<u32>,
    /// How many assignments each expert has, in their order.
    groups: Vec<ExpertGroup>,
    /// Where each of the batch's pairs stands in `assignments`.
    places: Vec<u32>,
    /// Results in the order of `assignments`, `[tokens * topk, hidden]`.
    results: Vec<f32>,
}

impl LocalExperts {
    /// Experts that are all in `bank`.
    pub fn new(bank: ExpertBank) -> Self {
        Self {
            bank,
            scratch: ExpertScratch::default(),
            assignments: Vec::new(),
            rows: Vec::new(),
            groups: Vec::new(),
            places: Vec::new(),
            results: Vec::new(),
        }
    }

    /// Puts the batch's assignments in the order of experts.
    fn sort(&mut self, batch: &ExpertBatch<'_>) {
        self.assignments.clear();
        self.assignments.extend(batch.expert_ids.iter().zip(0u32..).map(|(&expert, index)| (expert, index)));
        self.assignments.sort_unstable();
        self.rows.clear();
        self.rows.extend(self.assignments.iter().map(|&(_, index)| index / batch.topk as u32));
        self.groups.clear();
        self.groups.extend(
            self.assignments
                .chunk_by(|a, b| a.0 == b.0)
                .map(|group| ExpertGroup { expert: ExpertId(group[0].0), rows: group.len() }),
        );
        self.places.resize(self.assignments.len(), 0);
        for (&(_, index), place) in self.assignments.iter().zip(0u32..) {
            self.places[index as usize] = place;
        }
    }
}

impl Experts for LocalExperts {
    fn dispatch(&mut self, cpu: &Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        self.sort(batch);
        self.results.resize(self.assignments.len() * self.bank.hidden_size(), 0.0);
        let jobs = ExpertJobs {
            layer: batch.layer,
            activations: batch.activations,
            rows: &self.rows,
            groups: &self.groups,
        };
        self.bank.forward(cpu, &mut self.scratch, jobs, &mut self.results)
    }

    fn combine(&mut self, cpu: &Cpu, out: &mut [f32]) -> Result<(), ExpertsError> {
        cpu.gather_rows(&self.results, self.bank.hidden_size(), &self.places, out);
        Ok(())
    }
}
