use std::sync::Arc;

use model::{ExecutionFingerprint, Numerics};
use proptest::prelude::*;

use super::{Need, Pair, PlacementError, StepLoad, Tier, WorkerLoad, decode_order, place, prefill_order};
use crate::worker::WorkerKey;

fn key(id: &str) -> WorkerKey {
    WorkerKey { id: Arc::from(id), incarnation: 1 }
}

fn fingerprint(backend: u8) -> Option<Arc<ExecutionFingerprint>> {
    Some(Arc::new(ExecutionFingerprint {
        weights: [0; 16],
        numerics: Numerics::Fp8,
        kv_layout_digest: 1,
        backend: format!("cpu/{backend}"),
        arithmetic_revision: 1,
    }))
}

fn worker(id: &str, tier: Tier) -> WorkerLoad {
    WorkerLoad {
        key: key(id),
        tier,
        fingerprint: fingerprint(0),
        draining: false,
        sequences: 0,
        waiting_tokens: 0,
        kv_blocks_free: 100,
        kv_blocks_max: 100,
        kv_block_tokens: 64,
        queued: 0,
        prompt_tokens_per_s: 0,
        step: StepLoad::default(),
        matched_tokens: 0,
    }
}

const NEED: Need<'static> =
    Need { prompt_tokens: 100, lifetime_tokens: 200, only_prefill: false, excluded: &[] };

#[track_caller]
fn chosen(workers: &[WorkerLoad], need: &Need<'_>, prefill: &str, decode: &str) {
    assert_eq!(place(workers, need), Ok(Pair { prefill: key(prefill), decode: key(decode) }));
}

#[test]
fn the_least_loaded_win_and_ties_go_to_the_smaller_id() {
    let mut workers = vec![
        worker("p1", Tier::Prefill),
        worker("p0", Tier::Prefill),
        worker("d1", Tier::Decode),
        worker("d0", Tier::Decode),
        worker("e0", Tier::Expert),
    ];
    chosen(&workers, &NEED, "p0", "d0");
    workers[1].waiting_tokens = 1;
    workers[3].sequences = 1;
    chosen(&workers, &NEED, "p1", "d1");
    workers[2].kv_blocks_free = 3;
    chosen(&workers, &NEED, "p1", "d1");
    workers[2].kv_blocks_free = 1;
    chosen(&workers, &NEED, "p1", "d0");
    workers[3].queued = 1;
    workers[3].sequences = 2;
    chosen(&workers, &NEED, "p1", "d1");
    workers[2].draining = true;
    chosen(&workers, &NEED, "p1", "d0");
}

#[test]
fn a_conversation_goes_where_its_kv_is_until_that_costs_more_than_it_saves() {
    let need = Need { prompt_tokens: 2000, lifetime_tokens: 2200, ..NEED };
    let mut workers = vec![
        worker("p0", Tier::Prefill),
        worker("p1", Tier::Prefill),
        worker("d0", Tier::Decode),
        worker("d1", Tier::Decode),
    ];
    workers[1].matched_tokens = 1920;
    workers[3].matched_tokens = 1920;
    chosen(&workers, &need, "p1", "d1");
    // Work in front of it, and a larger batch, are worth less than the prefix, up to a point.
    workers[1].waiting_tokens = 1900;
    workers[3].sequences = 3;
    chosen(&workers, &need, "p1", "d1");
    workers[1].waiting_tokens = 1921;
    workers[3].sequences = 4;
    chosen(&workers, &need, "p0", "d0");
    // Whoever has no room is no place for anybody, whatever it holds.
    workers[3].sequences = 0;
    workers[3].queued = 1;
    chosen(&workers, &need, "p0", "d0");
}

#[test]
fn says_what_is_missing() {
    let prefill = worker("p0", Tier::Prefill);
    let mut decode = worker("d0", Tier::Decode);
    assert_eq!(place(std::slice::from_ref(&decode), &NEED), Err(PlacementError::NoPrefill));
    assert_eq!(place(std::slice::from_ref(&prefill), &NEED), Err(PlacementError::NoDecode));
    let excluded = [key("d0")];
    let need = Need { excluded: &excluded, ..NEED };
    assert_eq!(place(&[prefill.clone(), decode.clone()], &need), Err(PlacementError::NoDecode));

    let long = Need { lifetime_tokens: 6401, ..NEED };
    assert_eq!(
        place(&[prefill.clone(), decode.clone()], &long),
        Err(PlacementError::TooLong { lifetime_tokens: 6401 })
    );
    decode.fingerprint = fingerprint(1);
    let Err(PlacementError::Fingerprints(found)) = place(&[prefill, decode], &NEED) else {
        panic!("two back ends are no pair");
    };
    let found = (found.field.as_str(), found.prefill_value.as_str(), found.decode_value.as_str());
    assert_eq!(found, ("backend", "cpu/0", "cpu/1"));
}

fn any_worker(index: usize) -> impl Strategy<Value = WorkerLoad> {
    let tier = prop::sample::select(Tier::ALL.to_vec());
    (tier, 0..2_u8, prop::bool::weighted(0.2), 0..4_u64, 0..4_u64, 0..6_u64).prop_map(
        move |(tier, backend, draining, sequences, waiting, free)| WorkerLoad {
            fingerprint: fingerprint(backend),
            draining,
            sequences,
            waiting_tokens: waiting * 100,
            kv_blocks_free: free,
            kv_blocks_max: 5,
            matched_tokens: (sequences * 64).min(128),
            ..worker(&format!("w{index}"), tier)
        },
    )
}

fn any_workers() -> impl Strategy<Value = Vec<WorkerLoad>> {
    (0..10_usize).prop_flat_map(|count| (0..count).map(any_worker).collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn a_pair_is_allowed_best_and_found_when_there_is_one(
        workers in any_workers(),
        lifetime_tokens in 1..400_u64,
        excluded in prop::collection::vec(0..10_usize, 0..3),
    ) {
        let excluded: Vec<_> = excluded.into_iter().map(|index| key(&format!("w{index}"))).collect();
        let need = Need { prompt_tokens: lifetime_tokens.div_ceil(2), lifetime_tokens, excluded: &excluded, ..NEED };
        let open = |tier| {
            let excluded = &excluded;
            workers.iter().filter(move |w: &&WorkerLoad| w.tier == tier && !w.draining && !excluded.contains(&w.key))
        };
        let prefills = open(Tier::Prefill).filter(|w| w.blocks_for(need.prompt_tokens) <= w.kv_blocks_max);
        let allowed: Vec<_> = prefills
            .flat_map(|prefill| open(Tier::Decode).map(move |decode| (prefill, decode)))
            .filter(|(prefill, decode)| prefill.fingerprint == decode.fingerprint)
            .filter(|(_, decode)| decode.blocks_for(lifetime_tokens) <= decode.kv_blocks_max)
            .collect();
        let best = allowed
            .iter()
            .min_by_key(|(prefill, decode)| (prefill_order(prefill, &need), decode_order(decode, &need)));
        let expected = best.map(|(p, d)| Pair { prefill: p.key.clone(), decode: d.key.clone() });
        prop_assert_eq!(place(&workers, &need).ok(), expected);
    }

    #[test]
    fn the_order_of_the_snapshot_means_nothing(workers in any_workers(), turn in 0..10_usize) {
        let mut turned = workers.clone();
        turned.rotate_left(turn.min(workers.len()));
        prop_assert_eq!(place(&workers, &NEED), place(&turned, &NEED));
    }
}
