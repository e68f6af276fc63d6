// Log-probability of one token per row of logits [m, vocab]: of the given one, or of the largest (the lowest on a tie).
// A block of 1,024 threads per row; NaN never wins and does not count for the largest.
extern "C" __global__ void __launch_bounds__(1024)
logprob(const float *logits, u32 vocab, const u32 *given, u32 *tokens, float *logprobs) {
    previous_done();
    __shared__ float shared[32];
    __shared__ u32 winner;
    logits += (u64)blockIdx.x * vocab;
    float largest = -INFINITE;
    for (u32 i = threadIdx.x; i < vocab; i += 1024) largest = fmaxf(largest, logits[i]);
    largest = block_max(largest, shared);
    if (threadIdx.x == 0) winner = ALL;
    __syncthreads();
    float sum = 0.0f;
    u32 lowest = ALL;
    for (u32 i = threadIdx.x; i < vocab; i += 1024) {
        if (logits[i] == largest) lowest = min(lowest, i);
        sum += expf(logits[i] - largest);
    }
    atomicMin(&winner, lowest);
    sum = block_sum(sum, shared);
    if (threadIdx.x != 0) return;
    u32 token = given ? given[blockIdx.x] : winner == ALL ? 0 : winner;
    require(token < vocab);
    tokens[blockIdx.x] = token;
    logprobs[blockIdx.x] = logits[token] - largest - logf(sum);
}
