// y = row_scale * (x w^T + v b^T) + bias for 16-bit x, by tensor cores. Sums are f32.

#include "block_product.cuh"

template <typename T, template <typename, int, int> class Tile, int Tokens, int Stages, typename P>
__device__ __forceinline__ void matmul(const P& p) {
    multiply_block<T, Tile, Tokens, Stages>(p, OfOutputs{});
}

template <typename T, bool Codes, int Tokens, typename P>
__device__ __forceinline__ void matmul_ragged(const P& p) {
    const WarpDecoder decoder(p.weight.codebook);
    const auto fill = [&](uint8_t* tile, uint32_t first_row, uint32_t first_k, uint32_t above = 0) {
        const uint32_t first = above + first_row, end = above + p.n;
        if constexpr (Codes) {
            decode_tile<kRows, kSlice, kThreads, T>(tile, p.weight, decoder, first, end, first_k, p.k, tile_offset);
        } else {
            fill_tile<kRows, kSlice, kThreads>(tile, static_cast<const T*>(p.weight.data), first, end, first_k, p.k, tile_offset);
        }
    };
    multiply_block_ragged<T, DenseTile<T, kRows, kThreads>, Tokens>(p, fill, OfOutputs{});
}

// Adds the splits of a sum, in their order.
template <typename T>
__device__ __forceinline__ void matmul_finish(const Params& p) {
    const uint64_t outputs = uint64_t(p.tokens) * p.n, i = uint64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= outputs) return;
    float sum = p.output.partial[i];
    for (uint32_t split = 1; split < p.splits; ++split) sum += p.output.partial[split * outputs + i];
    Column<T>(p.output, p.n, i % p.n).store(i / p.n, sum);
}

#define ENTRY(NAME, ...) BLOCK_ENTRY(NAME, Params, __VA_ARGS__)
#define EXPERTS(NAME, ...) BLOCK_ENTRY(NAME##_experts, ExpertParams, __VA_ARGS__)
#define TILES(KIND, T, TILE, STAGES, CODES)                              \
    ENTRY(matmul_##KIND##_##T##_t16, matmul<T, TILE, 16, STAGES>)        \
    ENTRY(matmul_##KIND##_##T##_t32, matmul<T, TILE, 32, STAGES>)        \
    ENTRY(matmul_##KIND##_##T##_t64, matmul<T, TILE, 64, STAGES>)        \
    ENTRY(matmul_##KIND##_##T##_t128, matmul<T, TILE, 128, STAGES>)      \
    ENTRY(matmul_##KIND##_##T##_t64_ragged, matmul_ragged<T, CODES, 64>)  \
    EXPERTS(matmul_##KIND##_##T##_t16, matmul<T, TILE, 16, STAGES>)       \
    EXPERTS(matmul_##KIND##_##T##_t64, matmul<T, TILE, 64, STAGES>)       \
    EXPERTS(matmul_##KIND##_##T##_t128, matmul<T, TILE, 128, STAGES>)     \
    EXPERTS(matmul_##KIND##_##T##_t64_ragged, matmul_ragged<T, CODES, 64>)

typedef float f32;
TILES(nf4, f16, CodeTile, 4, true)
TILES(nf4, bf16, CodeTile, 4, true)
TILES(dense, f16, DenseTile, 3, false)
TILES(dense, bf16, DenseTile, 3, false)
ENTRY(matmul_finish_f32, matmul_finish<f32>)
ENTRY(matmul_finish_f16, matmul_finish<f16>)
ENTRY(matmul_finish_bf16, matmul_finish<bf16>)
