//! Prompts that are computed here: the same bits as through prefill, whatever they share rounds with and however they end.

use super::*;

/// All that came of a sequence whose prompt was computed here: its name, its tokens, what was found, and its end.
fn answer(inbox: &mut Inbox) -> (TicketId, Vec<Sampled>, usize, SequenceEvent) {
    let Some(SequenceEvent::Reserved { incarnation: 7, name }) = next(inbox) else {
        panic!("no reservation")
    };
    let Some(SequenceEvent::FirstToken { sampled, cached_tokens, .. }) = next(inbox) else {
        panic!("no first token")
    };
    let mut tokens = vec![sampled];
    let (others, end) = drain(inbox);
    tokens.extend(others);
    (name, tokens, cached_tokens, end)
}

fn demo_rig() -> Rig {
    let engine = || support::engine_of(support::DEMO);
    let mut rig = Rig::with(engine(), engine(), Arc::default());
    if let Some(speculation) = &mut rig.worker.speculation {
        speculation.always = true;
    }
    rig
}

/// A block and a bit, whole blocks, less than a block, one token; beside sequences that were handed over.
#[test]
fn they_give_the_bits_of_single_runs_beside_others() {
    let rigs = [(Rig::new(), engine()), (demo_rig(), support::engine_of(support::DEMO))];
    for (mut rig, mut oracle) in rigs {
        let shapes = [(70, 12), (128, 9), (5, 20), (1, 10), (60, 10)];
        let mut running = Vec::new();
        for (seed, (prompt_tokens, max_tokens)) in (1..).zip(shapes) {
            let sequence = request(&oracle, seed, prompt_tokens, max_tokens);
            let handed = (seed % 2 == 0).then(|| rig.start(&sequence));
            let here = handed.is_none().then(|| rig.submit_to(&sequence, EVENTS_MAX, true));
            rig.round();
            running.push((sequence, handed, here));
        }
        rig.rounds_until_empty();
        for (sequence, handed, here) in running {
            let expect = single_run(&mut oracle, &sequence);
            if let Some((mut inbox, first)) = handed {
                assert_same_bits(&[first], &expect[..1]);
                assert_same_bits(&drain(&mut inbox).0, &expect[1..]);
            }
            if let Some(mut inbox) = here {
                let (_, tokens, _, end) = answer(&mut inbox);
                assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }), "{end:?}");
                assert_same_bits(&tokens, &expect);
            }
        }
        assert_eq!(rig.worker.metrics.prompt_tokens.get(), 70 + 5 + 60);
    }
}

/// Prompt and answer of each turn are found in the next, and drafts stand as well behind them as anywhere.
#[test]
fn the_next_turn_finds_prompt_and_answer() {
    let mut rig = demo_rig();
    let mut oracle = support::engine_of(support::DEMO);
    let mut sequence = request(&oracle, 31, 70, 80);
    for (turn, expect_cached) in [0, 128, 192].into_iter().enumerate() {
        let expect = single_run(&mut oracle, &sequence);
        let mut inbox = rig.submit_to(&sequence, 256, true);
        rig.round();
        rig.rounds_until_empty();
        let (_, tokens, cached_tokens, _) = answer(&mut inbox);
        assert_same_bits(&tokens, &expect);
        assert_eq!(cached_tokens, expect_cached, "turn {turn}");
        sequence.prompt.extend(expect.iter().map(|sampled| sampled.token));
        sequence.prompt.extend((0..10).map(|at| TokenId(3 + at)));
        sequence.stopping.max_tokens = 60;
    }
}

#[test]
fn the_first_token_may_end_one() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 1, 30, 1);
    let mut inbox = rig.submit_to(&sequence, EVENTS_MAX, true);
    rig.round();
    rig.rounds_until_empty();
    let (_, tokens, _, end) = answer(&mut inbox);
    assert_same_bits(&tokens, &single_run(&mut engine(), &sequence));
    assert!(matches!(end, SequenceEvent::Finished { finish: Finish::Length, .. }));
}

#[test]
fn cancelled_failed_stopped_or_overdue_they_leave_nothing_behind() {
    let mut rig = Rig::new();
    let sequence = request(&rig.prefill.engine, 3, 70, 30);
    let cancelled = rig.submit_to(&sequence, EVENTS_MAX, true);
    rig.round();
    assert_eq!((rig.worker.scheduler.runnable(), rig.worker.scheduler.running()), (1, 0), "a chunk is done");
    drop(cancelled);
    rig.round();
    rig.assert_baseline();

    // Its chunk fails, and nobody else's step.
    let (mut handed, _) = rig.start(&sequence);
    rig.round();
    let mut failed = rig.submit_to(&request(&rig.prefill.engine, 4, 70, 30), EVENTS_MAX, true);
    rig.worker.receive();
    rig.failing.store(true, Ordering::Relaxed);
    rig.worker.prefill();
    rig.failing.store(false, Ordering::Relaxed);
    assert!(matches!(next(&mut failed), Some(SequenceEvent::Reserved { .. })));
    assert_eq!(failure_code(next(&mut failed).expect("an end")), Code::Unavailable);
    rig.rounds_until_empty();
    assert_same_bits(&drain(&mut handed).0, &single_run(&mut engine(), &sequence)[1..]);

    // The router's name for one whose text has ended.
    let mut stopped = rig.submit_to(&request(&rig.prefill.engine, 5, 10, 40), EVENTS_MAX, true);
    rig.round();
    rig.round();
    let Some(SequenceEvent::Reserved { name, .. }) = next(&mut stopped) else { panic!("no reservation") };
    rig.finish.try_send(name).expect("room");
    rig.rounds_until_empty();
    assert!(matches!(next(&mut stopped), Some(SequenceEvent::FirstToken { .. })));
    let (_, end) = drain(&mut stopped);
    assert!(matches!(end, SequenceEvent::Finished { finish: Finish::StopString, .. }), "{end:?}");
}
