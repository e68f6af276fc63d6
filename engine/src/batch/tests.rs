use super::*;

const LIMITS: BatchLimits =
    BatchLimits { step_tokens_max: 8, vocab_size: 10, context_max: 200, kv_blocks_max: 6, block_tokens: 64 };

fn tokens(count: usize) -> Vec<TokenId> {
    (0..count).map(|token| TokenId(token as u32)).collect()
}

fn blocks(ids: &[u32]) -> Vec<BlockId> {
    ids.iter().copied().map(BlockId).collect()
}

#[test]
fn sequences_are_laid_end_to_end() {
    let (three, one) = (tokens(3), tokens(1));
    let (first, second) = (blocks(&[4, 2]), blocks(&[0, 1, 5]));
    let inputs = [
        SequenceInput { tokens: &three, position: 62, block_table: &first, logits: LogitsWanted::Last },
        SequenceInput { tokens: &one, position: 70, block_table: &second, logits: LogitsWanted::None },
        SequenceInput { tokens: &three, position: 0, block_table: &second[2..], logits: LogitsWanted::All },
    ];
    let mut batch = StepBatch::default();
    // Twice: nothing of the first time may show in the second.
    for _ in 0..2 {
        batch.form(RowsOf::Model, inputs.into_iter(), &LIMITS).expect("the batch is valid");
        assert_eq!(batch.positions, [62, 63, 64, 70, 0, 1, 2]);
        assert_eq!(batch.wanted, [2, 4, 5, 6]);
        let slots: Vec<_> = batch.slots.iter().map(|slot| (slot.block, slot.row)).collect();
        assert_eq!(slots, [(4, 62), (4, 63), (2, 0), (1, 6), (5, 0), (5, 1), (5, 2)]);
        let rows: Vec<_> = batch.attention_rows(Vec::new());
        let views: Vec<_> = rows.iter().map(|row| (row.block_table.to_vec(), row.context)).collect();
        assert_eq!(views[0], (vec![4, 2], 63));
        assert_eq!(views[3], (vec![0, 1], 71), "blocks past the context are left out");
        assert_eq!(views[6], (vec![5], 3));
        assert_eq!(
            rows[0].block_table.as_ptr(),
            rows[2].block_table.as_ptr(),
            "a sequence's rows share one table"
        );
    }
}

#[test]
fn recycling_keeps_the_memory() {
    let mut rows: Vec<MlaRow<'_>> = Vec::with_capacity(100);
    rows.push(MlaRow { block_table: &[1], context: 1 });
    let memory = rows.as_ptr();
    let rows: Vec<MlaRow<'static>> = recycle(rows);
    assert!(rows.is_empty());
    assert_eq!((rows.as_ptr(), rows.capacity()), (memory, 100));
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let (two, nine) = (tokens(2), tokens(9));
    let wild = [TokenId(10)];
    let (table, beyond) = (blocks(&[0, 1, 2, 3]), blocks(&[6]));
    let valid = SequenceInput { tokens: &two, position: 0, block_table: &table, logits: LogitsWanted::None };
    let check = |input: SequenceInput<'_>, expect: InvalidBatch| {
        let result = StepBatch::default().form(RowsOf::Model, [valid, input].into_iter(), &LIMITS);
        assert_eq!(result, Err(expect));
    };
    let sequence = 1;
    check(SequenceInput { tokens: &[], ..valid }, InvalidBatch::Empty { sequence });
    check(
        SequenceInput { tokens: &nine, ..valid },
        InvalidBatch::TooManyRows { rows: 11, step_tokens_max: 8 },
    );
    check(
        SequenceInput { tokens: &wild, ..valid },
        InvalidBatch::Token { sequence, token: 10, vocab_size: 10 },
    );
    check(
        SequenceInput { position: 199, ..valid },
        InvalidBatch::Context { sequence, context: 201, context_max: 200 },
    );
    check(
        SequenceInput { position: usize::MAX, ..valid },
        InvalidBatch::Context { sequence, context: usize::MAX, context_max: 200 },
    );
    check(
        SequenceInput { position: 63, block_table: &table[..1], ..valid },
        InvalidBatch::BlockTableTooShort { sequence, blocks: 1, context: 65 },
    );
    check(
        SequenceInput { block_table: &beyond, ..valid },
        InvalidBatch::Block { sequence, block: 6, blocks_max: 6 },
    );
    assert_eq!(
        StepBatch::default().form(RowsOf::Mtp, [valid].into_iter(), &LIMITS),
        Err(InvalidBatch::MtpPosition { sequence: 0 })
    );
    assert_eq!(
        StepBatch::default().form(RowsOf::Model, std::iter::empty(), &LIMITS),
        Err(InvalidBatch::Empty { sequence: 0 })
    );
}
