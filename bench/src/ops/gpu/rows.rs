//! What is done to rows between the products.

use compute::cuda::{Activations, CudaError, InputFormat, NormRows, Routing};
use compute::{RoutingRule, ScaleFormat, Scoring, Selection};

use super::{Bench, Work};

/// DeepSeek-V3's rule.
const RULE: RoutingRule = RoutingRule {
    scoring: Scoring::Sigmoid,
    selection: Selection::NoauxTc,
    top_k: 8,
    groups: 8,
    groups_kept: 4,
    normalise: true,
    scale: 2.5,
};

/// 128 tokens; peers are sglang's kernels.
pub(super) fn all(bench: &mut Bench<'_>) -> Result<(), CudaError> {
    let device = bench.device;
    let (m, k, experts) = (128, 7168, 256);
    let format = InputFormat::Fp8(ScaleFormat::F32);
    let mut normal = |len: usize| {
        let mut values = device.alloc(len)?;
        device.fill_normal(&mut values.view_mut(), bench.seed(), 0.0, 1.0)?;
        Ok::<_, CudaError>(values)
    };
    let (mut x, add, w, gate_up) = (normal(m * k)?, normal(m * k)?, normal(k)?, normal(2 * m * k)?);
    let mut y = device.alloc(m * k)?;
    let mut rounded = Activations::new(device, format, m, k)?;
    let moves = |bytes, peer_us| Work { bytes, operations: 0.0, fp8: false, peer_us };
    bench.time(format!("rms_norm [{m}, {k}]"), moves(8 * m * k, 2.8), |_| {
        device.rms_norm(x.view(), w.view(), 1e-6, &mut y.view_mut())
    })?;
    // The peers' add and norm takes 3.4 µs and its rounding 2.2.
    bench.time(format!("add, norm, quantise [{m}, {k}]"), moves(13 * m * k, 5.6), |_| {
        let rows = NormRows { x: &mut x.view_mut(), stride: k, add: Some(add.view()), index: None };
        device.norm(rows, w.view(), 1e-6, None, &mut [&mut rounded])
    })?;
    bench.time(format!("quantise [{m}, {k}]"), moves(5 * m * k, 2.2), |_| {
        device.prepare(add.view(), &mut rounded)
    })?;
    bench.time(format!("swiglu, quantise [{m}, {k}]"), moves(9 * m * k, 1.8), |_| {
        device.swiglu(gate_up.view(), None, &mut rounded)
    })?;
    let (mut ids, mut weights) = (device.alloc(m * RULE.top_k)?, device.alloc(m * RULE.top_k)?);
    bench.time(format!("route [{m}, {experts}]"), moves(4 * m * experts, 14.9), |_| {
        let logits = gate_up.slice(0..m * experts);
        let routing = Routing { logits, slices: 1, experts, row_count: None, bias: None, rule: &RULE };
        device.route(routing, &mut ids.view_mut(), &mut weights.view_mut())
    })
}
