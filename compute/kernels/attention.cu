// What attention reads and writes, as the host passes it; put before every kernel of attention.

struct Attention {
    const u8 *pool;
    // Block tables, one after the other; where its sequence's starts and how many cache rows it sees, for each query row.
    const u32 *tables, *starts, *contexts;
    // bf16 bits; mla_attention.cu's are f32.
    const u16 *q_latent, *q_rope;
    u16 *out;
    u64 layer_offset, block_stride;
    u32 row_bytes, block_tokens, blocks, table_len;
    u32 heads, latent, rope;
    float scale;
    // The first row that is seen; the matrix kernels' parts that there is room for, and that a block computes.
    u32 first, splits, block_parts;
    // Theirs too: [rows, heads, splits, 512] weighted means in f16, and their (reference score, sum of weights).
    u16 *parts;
    float2 *part_sums;
};
