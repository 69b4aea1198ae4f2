// v[m, 0..rank) = scaling * x[m] a^T in f32, with the adapter of token m; zeros from there to the end of the row.
//
// A block takes `Tokens` tokens and `Ranks` rows of a. Its threads split k; their sums are added in a fixed order that
// does not depend on the tile, so a token's v has the same bits whatever is beside it.

#include "adapter.cuh"
#include "dtype.cuh"
#include "reduce.cuh"
#include "vector.cuh"

struct Params {
    const void* x;         // [tokens, k]
    float* v;              // [tokens, adapters.pitch]
    Adapters adapters;
    uint32_t tokens;
    uint32_t k;
    uint32_t vectors;      // rows of x and a are aligned to 16 bytes
    uint32_t padding;
};
static_assert(sizeof(Params) == 56, "the Rust twin has this size");

constexpr int kThreads = 256;

// sums[j * Ranks + i] += this thread's share of x[first + j] . a[r + i]: pieces of `Width` elements, one per
// `kThreads`.
template <int Width, int Tokens, int Ranks, typename T, typename A>
__device__ __forceinline__ void add_products(const Params& p, const Adapter& adapter, uint32_t first, uint32_t r,
                                             float (&sums)[Tokens * Ranks]) {
    const T* x = static_cast<const T*>(p.x);
    const A* a = static_cast<const A*>(adapter.a);
#pragma unroll 2
    for (uint32_t k = threadIdx.x * Width; k < p.k; k += kThreads * Width) {
        float weights[Ranks][Width];
#pragma unroll
        for (int i = 0; i < Ranks; ++i) load_vector(a + size_t(min(r + i, adapter.rank - 1)) * p.k + k, weights[i]);
#pragma unroll
        for (int j = 0; j < Tokens; ++j) {
            float values[Width];
            load_vector(x + size_t(min(first + j, p.tokens - 1)) * p.k + k, values);
#pragma unroll
            for (int i = 0; i < Ranks; ++i) {
#pragma unroll
                for (int e = 0; e < Width; ++e) {
                    sums[j * Ranks + i] = fmaf(values[e], weights[i][e], sums[j * Ranks + i]);
                }
            }
        }
    }
}

template <typename T, typename A, int Tokens, int Ranks>
__device__ __forceinline__ void lora_shrink(const Params& p) {
    constexpr int kSums = Tokens * Ranks;
    constexpr int kWarps = kThreads / 32;
    __shared__ float partial[kWarps][kSums];
    __shared__ Choice<Tokens> choice;
    const uint32_t first = blockIdx.x * Tokens, r = blockIdx.y * Ranks;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    choice.load(p.adapters, first, p.tokens);
    __syncthreads();

    // Thread i < kSums owns v[first + i / Ranks, r + i % Ranks].
    const uint32_t token = first + threadIdx.x / Ranks, column = r + threadIdx.x % Ranks;
    const bool owner = threadIdx.x < kSums && token < p.tokens && column < p.adapters.pitch;
    const int32_t own = owner ? choice.adapter[token - first] : -1;
    float result = p.adapters.is_wrong(own) ? nan_value() : 0.0f;

#pragma unroll 1
    for (int j = 0; j < Tokens; ++j) {
        const int32_t current = choice.adapter[j];
        if (!p.adapters.exists(current) || !choice.is_first(j)) continue;
        const Adapter adapter = p.adapters.entries[current];
        if (r >= adapter.rank) continue;
        float sums[kSums] = {};
        if (p.vectors) {
            add_products<16 / sizeof(T), Tokens, Ranks, T, A>(p, adapter, first, r, sums);
        } else {
            add_products<1, Tokens, Ranks, T, A>(p, adapter, first, r, sums);
        }
        const float sum = warp_sums<kSums>(sums, lane);
        __syncthreads();
        if (lane % (32 / kSums) == 0) partial[warp][lane / (32 / kSums)] = sum;
        __syncthreads();
        if (own == current && column < adapter.rank) {
            float total = partial[0][threadIdx.x];
#pragma unroll
            for (int w = 1; w < kWarps; ++w) total += partial[w][threadIdx.x];
            result = adapter.scaling * total;
        }
    }
    if (owner) p.v[size_t(token) * p.adapters.pitch + column] = result;
}

#define ENTRY(T, A, TOKENS, RANKS)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) lora_shrink_##T##_##A##_t##TOKENS(const __grid_constant__ Params p) { \
        lora_shrink<T, A, TOKENS, RANKS>(p);                                                                             \
    }
#define TILES(T, A)    \
    ENTRY(T, A, 1, 2)  \
    ENTRY(T, A, 8, 4)

typedef float f32;
TILES(f32, f32)
TILES(f16, f16)
TILES(f16, f32)
TILES(bf16, bf16)
TILES(bf16, f32)
