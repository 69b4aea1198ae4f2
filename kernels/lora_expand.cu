// y[m] += v[m] b^T with the adapter of token m, for engines with a base product of their own. One rounding to y's type;
// a token without an adapter keeps its bits.

#include "epilogue.cuh"

struct Params {
    void* y;         // [tokens, n]
    LowRank branch;
    uint32_t tokens;
    uint32_t n;
};
static_assert(sizeof(Params) == 56, "the Rust twin has this size");

constexpr int kThreads = 128, kTokens = 8, kRows = 64;

template <typename T>
__device__ __forceinline__ void lora_expand(const Params& p) {
    __shared__ float delta[kTokens][kRows];
    // One dimension: neither the number of tokens nor n is bounded by the grid's y.
    const uint32_t row_tiles = (p.n - 1) / kRows + 1;
    const uint32_t first_token = blockIdx.x / row_tiles * kTokens, first_row = blockIdx.x % row_tiles * kRows;
    low_rank<T, kTokens, kRows>(p.branch, first_token, p.tokens, first_row, p.n, delta);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kTokens * kRows; i += kThreads) {
        const uint32_t token = first_token + i / kRows, row = first_row + i % kRows;
        if (token >= p.tokens || row >= p.n || p.branch.adapters.of(token) == -1) continue;
        T* y = static_cast<T*>(p.y) + size_t(token) * p.n + row;
        *y = from_f32<T>(to_f32(*y) + delta[i / kRows][i % kRows]);
    }
}

#define ENTRY(T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads) lora_expand_##T(const __grid_constant__ Params p) { \
        lora_expand<T>(p);                                                                                    \
    }

typedef float f32;
ENTRY(f32)
ENTRY(f16)
ENTRY(bf16)
