//! Drafts change when tokens come and never which, whatever ends a sequence in the middle of a run.

use super::*;
use model::Stopping;

/// A worker over the demo model, most of whose drafts stand.
fn rig() -> Rig {
    let engine = || support::engine_of(support::DEMO);
    let mut rig = Rig::with(engine(), engine(), Arc::default());
    if let Some(speculation) = &mut rig.worker.speculation {
        speculation.always = true;
    }
    rig
}

fn metric(rig: &Rig, name: &str) -> u64 {
    let text = rig.worker.metrics.text();
    let line =
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    line.trim().parse().expect("a count")
}

/// Greedy and sampled, with penalties, bias and a least length; together and in turns.
#[test]
fn sequences_that_draft_give_the_bits_of_single_runs() {
    let mut rig = rig();
    let mut oracle = support::engine_of(support::DEMO);
    let mut running = Vec::new();
    let eos = oracle.config().eos_token_ids.clone();
    for seed in 0..6 {
        let mut sequence = request(&oracle, seed, 20 + 22 * seed as usize, 60 - 3 * seed as u32);
        let sampling = &mut sequence.sampling;
        if seed % 2 == 0 {
            sampling.temperature = 0.0;
        }
        if seed % 3 == 0 {
            (sampling.repetition_penalty, sampling.presence_penalty) = (1.0, 0.0);
        }
        sampling.top_p = if seed == 1 { 0.9 } else { 1.0 };
        sampling.logit_bias = vec![(TokenId(300 + seed as u32), 1.5)];
        let (inbox, _) = rig.start(&sequence);
        running.push((sequence, inbox));
    }
    rig.rounds_until_empty();
    for (sequence, mut inbox) in running {
        let (tokens, end) = drain(&mut inbox);
        assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }), "{end:?}");
        assert_same_bits(&tokens, &single_run(&mut oracle, &sequence)[1..]);
    }
    assert!(!eos.is_empty());
    let (drafted, accepted) = (
        metric(&rig, "decode_drafted_tokens_total{position=\"1\"}"),
        metric(&rig, "decode_accepted_tokens_total{position=\"1\"}"),
    );
    assert!(accepted * 2 > drafted && drafted > 20, "{accepted} of {drafted} stood");
    assert!(rig.worker.metrics.steps.get() < rig.worker.metrics.tokens.get());
}

/// On a device that prefill shares, while a prompt is awaited.
#[test]
fn drafts_wait_for_prompts_on_the_same_device() {
    for beside in [false, true] {
        let mut rig = rig();
        rig.worker.speculation = rig.worker.speculation.take().map(|s| s.beside_prefill(beside));
        let oracle = support::engine_of(support::DEMO);
        let (_inbox, _) = rig.start(&request(&oracle, 1, 20, 60));
        let awaited = rig.reserve(&request(&oracle, 2, 20, 10), EVENTS_MAX);
        for _ in 0..6 {
            rig.round();
        }
        let name = "decode_drafted_tokens_total{position=\"1\"}";
        assert_eq!(metric(&rig, name) == 0, beside, "beside prefill: {beside}");
        drop(awaited);
        for _ in 0..6 {
            rig.round();
        }
        assert!(metric(&rig, name) > 0);
        rig.rounds_until_empty();
    }
}

/// Every way for a sequence to end, at every place of a run.
#[test]
fn a_run_ends_where_its_sequence_does() {
    let mut rig = rig();
    let mut oracle = support::engine_of(support::DEMO);
    let mut sequence = request(&oracle, 40, 30, 24);
    sequence.sampling.temperature = 0.0;
    let expect = single_run(&mut oracle, &sequence);
    for at in 2..24 {
        // By length.
        sequence.stopping = Stopping { max_tokens: at as u32, ..sequence.stopping.clone() };
        let (mut by_length, _) = rig.start(&sequence);
        // By a token, where it comes for the first time.
        let stop = expect[at - 1].token;
        let first = expect.iter().position(|sampled| sampled.token == stop).expect("it is in there") + 1;
        let mut stopping = sequence.clone();
        stopping.stopping = Stopping { max_tokens: 24, stop_token_ids: vec![stop], ..stopping.stopping };
        let (mut by_token, _) = rig.start(&stopping);
        rig.rounds_until_empty();
        let (tokens, end) = drain(&mut by_length);
        assert_same_bits(&tokens, &expect[1..at]);
        assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }), "{end:?}");
        let (tokens, end) = drain(&mut by_token);
        assert_same_bits(&tokens, &expect[1..first]);
        assert!(
            matches!(end, SequenceEvent::Finished { finish: Finish::StopToken(token), .. } if token == stop)
        );
    }
}

/// A run is never longer than its reader's queue has room for.
#[test]
fn a_slow_reader_gets_every_token_of_a_run() {
    let mut rig = rig();
    let sequence = request(&rig.prefill.engine, 41, 10, 40);
    let (mut slow, ticket) = rig.reserve(&sequence, 4);
    rig.prefill.push(&sequence, ticket);
    let mut tokens = Vec::new();
    let end = loop {
        match next(&mut slow) {
            Some(SequenceEvent::Token(token, _)) => tokens.push(token),
            Some(SequenceEvent::HandedOff { .. }) => {}
            Some(end) => break end,
            None => assert!(rig.round()),
        }
    };
    assert!(matches!(end, SequenceEvent::Finished { .. }));
    let mut oracle = support::engine_of(support::DEMO);
    assert_same_bits(&tokens, &single_run(&mut oracle, &sequence)[1..]);
    rig.assert_baseline();
}

/// What is reported adds up: each draft was accepted or rejected, and accepted ones are among the tokens.
#[test]
fn drafts_are_accounted_for() {
    let mut rig = rig();
    let sequence = request(&rig.prefill.engine, 42, 70, 50);
    let (mut inbox, _) = rig.start(&sequence);
    rig.rounds_until_empty();
    let (mut accepted, mut rejected, mut tokens) = (0, 0, 0);
    while let Some(event) = next(&mut inbox) {
        if let SequenceEvent::Token(_, drafts) = event {
            (accepted, rejected, tokens) =
                (accepted + drafts.accepted, rejected + drafts.rejected, tokens + 1);
        }
    }
    let sum = |name: &str| -> u64 {
        (1..=8)
            .map(|place| metric(&rig, &format!("decode_{name}_tokens_total{{position=\"{place}\"}}")))
            .sum()
    };
    assert_eq!(u64::from(accepted + rejected), sum("drafted"));
    assert_eq!(u64::from(accepted), sum("accepted"));
    assert!(0 < accepted && accepted < tokens);
}
