// What a matrix product multiplies, as the host passes it; put before every kernel of products.

struct Product {
    // Outputs 0..n1 come from `w`, n1..n from `w2`; each is [experts, its outputs, k], scales [experts, 128-blocks of its
    // outputs, 128-blocks of k].
    const void *w, *w2;
    const float *w_scales, *w2_scales;
    // Rows of `x_stride` values, a head's `x_head` further on; scales [x_rows, 128-blocks of k].
    const void *x;
    const float *x_scales;
    // Position i reads row rows[i] / rows_per of x and writes row out_rows[i] of y; null: row i.
    const u32 *rows, *out_rows;
    // Tiles of an expert's positions (expert, first, count, 0) and how many there are; null: one expert, all positions.
    const uint4 *tiles;
    const u32 *tile_count;
    // [.., heads, n], f32 or bf16.
    void *y;
    u32 x_rows, m, n, n1, k, rows_per, x_stride, x_head, heads;
    // Whether every row of w and of x starts at a multiple of four values; whether y is bf16.
    u32 w_vector, x_vector, y_bf16;
};

// A block's positions.
struct Rows {
    u32 expert, first, end;
};

// False for a block past the last tile.
__device__ __forceinline__ bool find_rows(const Product &p, u32 tile_rows, Rows &rows) {
    if (!p.tiles) {
        rows.expert = 0, rows.first = blockIdx.y * tile_rows, rows.end = min(rows.first + tile_rows, p.m);
        return true;
    }
    if (blockIdx.y >= *p.tile_count) return false;
    uint4 tile = p.tiles[blockIdx.y];
    rows.expert = tile.x, rows.first = tile.y, rows.end = tile.y + tile.z;
    return true;
}

// The matrix that output `out` comes from, and the output's number in it.
struct Weights {
    const u8 *w;
    const float *scales;
    u32 channel;
};

template <u32 BYTES = 1> __device__ __forceinline__ Weights find_weights(const Product &p, u32 expert, u32 out) {
    bool second = out >= p.n1;
    u32 n = second ? p.n - p.n1 : p.n1;
    Weights found;
    found.channel = second ? out - p.n1 : out;
    found.w = (const u8 *)(second ? p.w2 : p.w) + (u64)expert * n * p.k * BYTES;
    found.scales = (second ? p.w2_scales : p.w_scales) + (u64)expert * div_up(n, BLOCK) * div_up(p.k, BLOCK);
    return found;
}

__device__ __forceinline__ u32 input_row(const Product &p, u32 position) {
    u32 row = p.rows ? p.rows[position] / p.rows_per : position;
    require(row < p.x_rows);
    return row;
}

__device__ __forceinline__ void store_output(const Product &p, u32 position, u32 channel, float value, u32 head = 0) {
    u32 row = p.out_rows ? p.out_rows[position] : position;
    u64 at = ((u64)row * p.heads + head) * p.n + channel;
    if (p.y_bf16) ((u16 *)p.y)[at] = to_bf16(value);
    else ((float *)p.y)[at] = value;
}
