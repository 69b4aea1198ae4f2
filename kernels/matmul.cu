// y = row_scale * (x w^T + v b^T) + bias for 16-bit x, by tensor cores. Sums are f32.
//
// A block takes 128 rows of w, 32 per warp, and `Tokens` tokens, and walks along k in slices of 64 that cp.async brings to
// shared memory some steps ahead.

#include "tile.cuh"

constexpr uint32_t kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * kWarpRows;

// Puts the sums into shared memory, where the low-rank branch is added and lanes find neighbouring outputs to store.
template <typename T, int Groups>
__device__ __forceinline__ void finish(const Params& p, uint8_t* memory, uint32_t first_row, uint32_t first_token, const float (&sums)[2][Groups][4]) {
    constexpr uint32_t kPitch = kRows + 4;
    const uint32_t lane = threadIdx.x % 32, column = threadIdx.x / 32 * kWarpRows;
    float* staging = reinterpret_cast<float*>(memory);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < Groups; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const uint32_t token = m * 8 + lane % 4 * 2 + e % 2;
            staging[token * kPitch + column + e / 2 * 8 + lane / 4] = sums[e / 4][m][e % 4];
        }
    }
    if (p.branch.adapters.entries != nullptr) {
        // The blocks that share the sum share the branch.
        add_low_rank<T, 8 * Groups, kRows>(p.branch, first_token, p.tokens, first_row, p.n, staging, kPitch, blockIdx.y, p.splits);
    }
    __syncthreads();
    const uint32_t row = first_row + threadIdx.x;
    if (row >= p.n) return;
    const Column<T> output(p.output, p.n, row);
    for (uint32_t m = 0; m < Groups * 8 && first_token + m < p.tokens; ++m) {
        output.store(first_token + m, staging[m * kPitch + threadIdx.x], blockIdx.y, p.tokens);
    }
}

template <typename T, template <typename, int, int> class Tile, int Tokens, int Stages>
__device__ __forceinline__ void matmul(const Params& p) {
    using Weights = Tile<T, kRows, kThreads>;
    constexpr uint32_t kInputs = Tokens * kTileRow, kStage = kInputs + Weights::kBytes;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t shared = ptx::shared_address(memory), lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows;
    const uint32_t token_tiles = (p.tokens - 1) / Tokens + 1;
    const uint32_t first_row = blockIdx.x / token_tiles * kRows, first_token = blockIdx.x % token_tiles * Tokens;
    const Range range((p.k + kSlice - 1) / kSlice, blockIdx.y, p.splits);

    const RowCopier<Tokens, kTileRow, kThreads> inputs(p.x, first_token, p.tokens, p.k);
    Weights weights(p, first_row, first_row + row);
    const auto copy = [&](uint32_t slice) {
        if (slice < range.end) {
            const uint32_t stage = shared + slice % Stages * kStage;
            inputs.copy(stage, slice, tile_offset);
            weights.copy(stage + kInputs, slice);
        }
        ptx::commit_copies();
    };

    float sums[2][Tokens / 8][4] = {};
#pragma unroll
    for (uint32_t i = 0; i < Stages - 1; ++i) copy(range.begin + i);
    weights.fetch_scales(p, range.begin, lane);
#pragma unroll 1
    for (uint32_t slice = range.begin; slice < range.end; ++slice) {
        ptx::wait_copies<Stages - 2>();
        __syncthreads();
        copy(slice + Stages - 1);
        const uint32_t stage = shared + slice % Stages * kStage;
        weights.begin(p, stage + kInputs, slice, row, lane);
        weights.fetch_scales(p, slice + 1, lane);
        multiply_slice<T>(weights, stage, lane, sums);
    }
    ptx::wait_copies<0>();
    finish<T>(p, memory, first_row, first_token, sums);
}

// For rows that are not aligned to 16 bytes (or, of codes, do not end with 32): the tiles are filled element by element,
// codes in aligned pieces, one step at a time.
template <typename T, bool Codes, int Tokens>
__device__ __forceinline__ void matmul_ragged(const Params& p) {
    using Weights = DenseTile<T, kRows, kThreads>;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t token_tiles = (p.tokens - 1) / Tokens + 1;
    const uint32_t first_row = blockIdx.x / token_tiles * kRows, first_token = blockIdx.x % token_tiles * Tokens;
    const Range range((p.k + kSlice - 1) / kSlice, blockIdx.y, p.splits);

    const WarpDecoder decoder(p.weight.codebook);
    Weights weights(p, first_row, 0);
    float sums[2][Tokens / 8][4] = {};
    uint8_t *inputs = memory, *tile = memory + Tokens * kTileRow;
#pragma unroll 1
    for (uint32_t step = range.begin; step < range.end; ++step) {
        __syncthreads();
        fill_tile<Tokens, kThreads>(inputs, static_cast<const T*>(p.x), first_token, p.tokens, step * kSlice, p.k);
        if constexpr (Codes) {
            decode_tile<kRows, kThreads, T>(tile, p, decoder, first_row, step * kSlice);
        } else {
            fill_tile<kRows, kThreads>(tile, static_cast<const T*>(p.weight.data), first_row, p.n, step * kSlice, p.k);
        }
        __syncthreads();
        weights.begin(p, ptx::shared_address(tile), step, warp * kWarpRows, lane);
        multiply_slice<T>(weights, ptx::shared_address(inputs), lane, sums);
    }
    finish<T>(p, memory, first_row, first_token, sums);
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

#define ENTRY(NAME, ...)                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(const __grid_constant__ Params p) { \
        __VA_ARGS__(p);                                                                             \
    }
#define TILES(KIND, T, TILE, STAGES, CODES)                              \
    ENTRY(matmul_##KIND##_##T##_t16, matmul<T, TILE, 16, STAGES>)        \
    ENTRY(matmul_##KIND##_##T##_t32, matmul<T, TILE, 32, STAGES>)        \
    ENTRY(matmul_##KIND##_##T##_t64, matmul<T, TILE, 64, STAGES>)        \
    ENTRY(matmul_##KIND##_##T##_t128, matmul<T, TILE, 128, STAGES>)      \
    ENTRY(matmul_##KIND##_##T##_t64_ragged, matmul_ragged<T, CODES, 64>)

typedef float f32;
TILES(nf4, f16, CodeTile, 4, true)
TILES(nf4, bf16, CodeTile, 4, true)
TILES(dense, f16, DenseTile, 3, false)
TILES(dense, bf16, DenseTile, 3, false)
ENTRY(matmul_finish_f32, matmul_finish<f32>)
ENTRY(matmul_finish_f16, matmul_finish<f16>)
ENTRY(matmul_finish_bf16, matmul_finish<bf16>)
