// Takes DoRA's scale out of the gradient of its output: dm[n] (+)= inverse_norm[n] * sum of dy[., n] * z[., n], and
// dy[m, n] = row_scale[n] * dy[m, n], rounded, in place. Two launches.
//
// A block takes 32 columns of a chunk of 512 tokens, a warp every eighth of these, in their order; then the warps are added, and
// dora_gradient_finish adds the chunks. So the bits depend on the column and the number of tokens alone.

#include "dtype.cuh"

struct Params {
    void* dy;                   // T [tokens, n]
    const void* z;              // T [tokens, n]
    const float* row_scale;     // [n]
    const float* inverse_norm;  // [n]
    float* dm;                  // [n]
    float* sums;                // [chunks, n]: between the launches
    uint32_t tokens, n, chunks, accumulate;
};
static_assert(sizeof(Params) == 64, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kChunk = 512;

template <typename T>
__device__ __forceinline__ void sum(const Params& p) {
    __shared__ float sums[kWarps][32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t chunk = blockIdx.x % p.chunks, column = blockIdx.x / p.chunks * 32 + lane;
    const uint32_t end = min(p.tokens, (chunk + 1) * kChunk);
    float sum = 0.0f;
    if (column < p.n) {
        const float scale = p.row_scale[column];
#pragma unroll 4
        for (uint32_t token = chunk * kChunk + warp; token < end; token += kWarps) {
            T* dy = static_cast<T*>(p.dy) + size_t(token) * p.n + column;
            const float gradient = to_f32(*dy);
            sum = fmaf(gradient, to_f32(static_cast<const T*>(p.z)[size_t(token) * p.n + column]), sum);
            *dy = from_f32<T>(__fmul_rn(scale, gradient));
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= p.n) return;
#pragma unroll
    for (uint32_t i = 1; i < kWarps; ++i) sum = __fadd_rn(sum, sums[i][lane]);
    p.sums[size_t(chunk) * p.n + column] = sum;
}

#define ENTRY(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads) dora_gradient_sum_##T(const __grid_constant__ Params p) {     \
        sum<T>(p);                                                                                                      \
    }

typedef float f32;
ENTRY(f32)
ENTRY(f16)
ENTRY(bf16)

extern "C" __global__ void __launch_bounds__(kThreads) dora_gradient_finish(const __grid_constant__ Params p) {
    const uint32_t column = blockIdx.x * kThreads + threadIdx.x;
    if (column >= p.n) return;
    float sum = p.sums[column];
    for (uint32_t chunk = 1; chunk < p.chunks; ++chunk) sum = __fadd_rn(sum, p.sums[size_t(chunk) * p.n + column]);
    sum = __fmul_rn(p.inverse_norm[column], sum);
    p.dm[column] = p.accumulate ? __fadd_rn(p.dm[column], sum) : sum;
}
