//! Routed experts in the engine's own process: the reference implementation of the seam.

use compute::Cpu;
use model::ExpertId;

use super::{ExpertBank, ExpertBatch, ExpertJob, ExpertScratch, Experts, ExpertsError};

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
    }
}

impl Experts for LocalExperts {
    fn dispatch(&mut self, cpu: &Cpu, batch: &ExpertBatch<'_>) -> Result<(), ExpertsError> {
        self.sort(batch);
        let hidden_size = self.bank.hidden_size();
        self.results.resize(self.assignments.len() * hidden_size, 0.0);
        let mut start = 0;
        for group in self.assignments.chunk_by(|a, b| a.0 == b.0) {
            let end = start + group.len();
            let job = ExpertJob {
                layer: batch.layer,
                expert: ExpertId(group[0].0),
                activations: batch.activations,
                rows: &self.rows[start..end],
            };
            let out = &mut self.results[start * hidden_size..end * hidden_size];
            self.bank.forward(cpu, &mut self.scratch, job, out)?;
            start = end;
        }
        Ok(())
    }

    fn combine(&mut self, _: &Cpu, out: &mut [f32]) -> Result<(), ExpertsError> {
        let hidden_size = self.bank.hidden_size();
        for (&(_, index), result) in self.assignments.iter().zip(self.results.chunks_exact(hidden_size)) {
            let start = index as usize * hidden_size;
            out[start..start + hidden_size].copy_from_slice(result);
        }
        Ok(())
    }
}
