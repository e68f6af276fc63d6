// Rotates pairs (x[2i], x[2i+1]) in place by the table's angles [positions_max, pairs, (cos, sin)]; a pair a thread.
extern "C" __global__ void __launch_bounds__(256)
rope_interleaved(float *x, u32 stride, u32 offset, u32 per_position, const u32 *positions, const float *table,
                 u32 positions_max, u32 pairs, u64 len) {
    previous_done();
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= len) return;
    u64 row = i / pairs;
    u32 pair = (u32)(i % pairs), position = positions[row / per_position];
    require(position < positions_max);
    const float *angle = table + ((u64)position * pairs + pair) * 2;
    float *values = x + row * stride + offset + 2 * pair;
    float a = values[0], b = values[1], cos = angle[0], sin = angle[1];
    values[0] = a * cos - b * sin;
    values[1] = a * sin + b * cos;
}
