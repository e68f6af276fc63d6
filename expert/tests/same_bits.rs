//! Wherever experts sit, the same bits come back: the contract between `LocalExperts` and `RemoteExperts`.

mod support;

use compute::Cpu;
use engine::{Engine, Experts, LogitsWanted, SequenceInput};
use model::{BlockId, Checkpoint, Numerics, TokenId};
use support::{Batch, Network, PATIENCE, Worker, checkpoint, local, options, placement, remote, runtime};

const FIXTURES: [&str; 2] = ["v3_fp8_mtp", "v2_lite"];
const NUMERICS: [Numerics; 2] = [Numerics::Reference, Numerics::Fp8];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every layer, the MTP module's included, with batches of one token and of many.
fn compare(checkpoint: &Checkpoint, numerics: Numerics, workers: usize, network: &Network) {
    let placement = placement(checkpoint, workers);
    let started: Vec<Worker> = (0..workers)
        .map(|rank| {
            let fabric = network.join(&format!("expert-{rank}"), 1);
            Worker::start(checkpoint, numerics, &placement, rank, fabric)
        })
        .collect();
    let addresses = started.iter().map(|worker| worker.fabric.address()).collect();
    let source = network.join("prefill-0", 7);
    let mut remote = remote(checkpoint, numerics, &placement, addresses, source, PATIENCE);
    let mut local = local(checkpoint, numerics);
    for layer in placement.layers() {
        for tokens in [1, 2, 17] {
            let seed = (layer * 100 + tokens) as u64;
            let batch = Batch::random(checkpoint, numerics, layer, tokens, seed);
            let expected = batch.run(&mut local).expect("local experts");
            let found = batch.run(&mut remote).expect("remote experts");
            assert_eq!(
                found, expected,
                "{numerics}, {workers} workers, layer {layer}, {tokens} tokens, seed {seed}"
            );
        }
    }
}

#[test]
fn local_and_remote_agree_in_process() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    for fixture in FIXTURES {
        let checkpoint = checkpoint(fixture);
        for numerics in NUMERICS {
            for workers in 1..=3 {
                compare(&checkpoint, numerics, workers, &Network::in_process());
            }
        }
    }
}

#[test]
fn local_and_remote_agree_between_processes() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    for network in [Network::quic(), Network::shared()] {
        for fixture in FIXTURES {
            let checkpoint = checkpoint(fixture);
            for numerics in NUMERICS {
                for workers in 1..=3 {
                    compare(&checkpoint, numerics, workers, &network);
                }
            }
        }
    }
}

/// A whole forward step, two chunks of one prompt.
fn logits(checkpoint: &Checkpoint, numerics: Numerics, experts: Option<Box<dyn Experts>>) -> Vec<u32> {
    let options = options(numerics);
    let mut engine = match experts {
        Some(experts) => Engine::load(checkpoint, &options, experts, &mut |_, _| {}),
        None => Engine::load_with_experts(checkpoint, &options, &mut |_, _| {}),
    }
    .expect("an engine");
    let prompt: Vec<TokenId> = (0..40).map(|i| TokenId(3 + 7 * i % 200)).collect();
    let block_table = [BlockId(2)];
    let mut all = Vec::new();
    for (start, end) in [(0, 23), (23, 40)] {
        let input = SequenceInput {
            tokens: &prompt[start..end],
            position: start,
            block_table: &block_table,
            logits: LogitsWanted::All,
        };
        all.extend(bits(engine.step(&[input], &mut ()).expect("a step").logits));
    }
    all
}

#[test]
fn an_engine_cannot_tell_the_difference() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let checkpoint = checkpoint("v3_fp8_mtp");
    for numerics in NUMERICS {
        let network = Network::in_process();
        let placement = placement(&checkpoint, 2);
        let workers: Vec<Worker> = (0..2)
            .map(|rank| {
                let fabric = network.join(&format!("expert-{rank}"), 1);
                Worker::start(&checkpoint, numerics, &placement, rank, fabric)
            })
            .collect();
        let addresses = workers.iter().map(|worker| worker.fabric.address()).collect();
        let source = network.join("prefill-0", 7);
        let remote = remote(&checkpoint, numerics, &placement, addresses, source, PATIENCE);
        let here = logits(&checkpoint, numerics, Some(Box::new(local(&checkpoint, numerics))));
        assert_eq!(logits(&checkpoint, numerics, Some(Box::new(remote))), here, "{numerics}");
        // On a GPU these are beside the layers, and nothing passes by way of the host.
        assert_eq!(logits(&checkpoint, numerics, None), here, "{numerics}: the engine's own");
    }
}

/// Frames of several sources share a grouped product; no source may notice.
#[test]
fn sources_do_not_disturb_each_other() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let checkpoint = checkpoint("v3_fp8_mtp");
    let numerics = Numerics::Fp8;
    let network = Network::in_process();
    let placement = placement(&checkpoint, 1);
    let worker = Worker::start(&checkpoint, numerics, &placement, 0, network.join("expert-0", 1));
    let layer = placement.layers().next().expect("a MoE layer");
    let expected = |seed: u64| {
        let batch = Batch::random(&checkpoint, numerics, layer, 1 + seed as usize % 5, seed);
        let bits = batch.run(&mut local(&checkpoint, numerics)).expect("local experts");
        (batch, bits)
    };
    let cases: Vec<_> = (0..4).map(|source| expected(source as u64)).collect();
    std::thread::scope(|scope| {
        for (source, (batch, expected)) in cases.iter().enumerate() {
            let fabric = network.join(&format!("source-{source}"), 7);
            let addresses = vec![worker.fabric.address()];
            let mut remote = remote(&checkpoint, numerics, &placement, addresses, fabric, PATIENCE);
            scope.spawn(move || {
                for round in 0..50 {
                    let found = batch.run(&mut remote).expect("remote experts");
                    assert_eq!(&found, expected, "source {source}, round {round}");
                }
            });
        }
    });
}

/// The same, with all frames there before the worker looks: they become one step.
#[test]
fn frames_that_wait_are_computed_together() {
    let runtime = runtime();
    let _runtime = runtime.enter();
    let checkpoint = checkpoint("v3_fp8_mtp");
    let numerics = Numerics::Fp8;
    let network = Network::in_process();
    let placement = placement(&checkpoint, 1);
    let end = network.join("expert-0", 1);
    let cpu = Cpu::new(1);
    let layer = placement.layers().next().expect("a MoE layer");
    let mut sources: Vec<_> = (0..3)
        .map(|source| {
            let batch = Batch::random(&checkpoint, numerics, layer, 1 + 4 * source as usize, source);
            let fabric = network.join(&format!("source-{source}"), 7);
            let mut remote = remote(&checkpoint, numerics, &placement, vec![end.address()], fabric, PATIENCE);
            remote.dispatch(&cpu, &batch.as_expert_batch()).expect("dispatched");
            (batch, remote)
        })
        .collect();
    let worker = Worker::start(&checkpoint, numerics, &placement, 0, end);
    for (source, (batch, remote)) in sources.iter_mut().enumerate() {
        let mut out = batch.output();
        remote.combine(&cpu, &mut out).expect("combined");
        let alone = batch.run(&mut local(&checkpoint, numerics)).expect("local experts");
        assert_eq!(bits(&out), alone, "source {source}");
    }
    let metrics = worker.handle.metrics_text();
    for line in ["expert_steps_total 1", "expert_dispatches_total 3"] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
}
