// A block's product by tensor cores: 128 rows of w, 32 per warp, and `Tokens` tokens. It walks along k in slices of 64 that
// cp.async brings to shared memory some steps ahead. What w is, a tile of weights knows.
#pragma once

#include "tile.cuh"

constexpr uint32_t kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * kWarpRows;

// Puts the sums into shared memory, where the low-rank branch is added and lanes find neighbouring outputs to store.
template <typename T, typename Weights, int Groups, typename Side, typename Share>
__device__ __forceinline__ void finish(const Params& p, uint8_t* memory, const Share& share, const float (&sums)[2][Groups][4],
                                       const Side& side) {
    constexpr uint32_t kPitch = kRows + 4;
    const uint32_t first_row = share.first_row, first_token = share.first_token;
    const uint32_t lane = threadIdx.x % 32, column = threadIdx.x / 32 * kWarpRows;
    float* staging = reinterpret_cast<float*>(memory);
    __syncthreads();
    Weights::stage(staging + column, kPitch, lane, sums);
    if (p.branch.adapters.entries != nullptr) {
        // The blocks that share the sum share the branch.
        add_low_rank<T, 8 * Groups, kRows>(p.branch, first_token, p.tokens, first_row, p.n, staging, kPitch, blockIdx.y, p.splits, side, share);
    }
    __syncthreads();
    const uint32_t row = first_row + threadIdx.x;
    if (row >= p.n) return;
    const Column<T> output(p.output, p.n, row, share.above);
    for (uint32_t m = 0; m < Groups * 8 && first_token + m < share.end(p.tokens); ++m) {
        output.store(share.row(first_token + m), staging[m * kPitch + threadIdx.x], blockIdx.y, p.tokens);
    }
}

// `P` is Params, or ExpertParams for a stack of weights.
template <typename T, template <typename, int, int> class Tile, int Tokens, int Stages, typename P, typename Side>
__device__ __forceinline__ void multiply_block(const P& p, const Side& side) {
    using Weights = Tile<T, kRows, kThreads>;
    constexpr uint32_t kInputs = Tokens * kTileRow, kStage = kInputs + Weights::kBytes;
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t shared = ptx::shared_address(memory), lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows;
    const auto share = share_of<kRows, Tokens>(p);
    if (share.template ends<T>(p)) return;
    const Range range((p.k + kSlice - 1) / kSlice, blockIdx.y, p.splits);

    const InputCopier<Tokens, kTileRow, kThreads, std::decay_t<decltype(share)>> inputs(p, share);
    Weights weights = share.template weights<Weights>(p, share.first_row + row);
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
    finish<T, Weights>(p, memory, share, sums, side);
}

// For rows that are not aligned to 16 bytes (or, of codes, do not end with 32): the tiles are filled element by element,
// codes in aligned pieces, one step at a time. `Dense` is a tile of elements that `fill(memory, row, element of k, above)` fills.
template <typename T, typename Dense, int Tokens, typename P, typename Fill, typename Side>
__device__ __forceinline__ void multiply_block_ragged(const P& p, Fill fill, const Side& side) {
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto share = share_of<kRows, Tokens>(p);
    if (share.template ends<T>(p)) return;
    const Range range((p.k + kSlice - 1) / kSlice, blockIdx.y, p.splits);

    Dense weights(p, share.first_row, 0);
    float sums[2][Tokens / 8][4] = {};
    uint8_t *inputs = memory, *tile = memory + Tokens * kTileRow;
#pragma unroll 1
    for (uint32_t step = range.begin; step < range.end; ++step) {
        __syncthreads();
        fill_tile<Tokens, kSlice, kThreads>(inputs, static_cast<const T*>(p.x), share.first_token, share.end(p.tokens),
                                               step * kSlice, p.k, tile_offset, share);
        share.fill(fill, tile, step * kSlice);
        __syncthreads();
        weights.begin(p, ptx::shared_address(tile), step, warp * kWarpRows, lane);
        multiply_slice<T>(weights, ptx::shared_address(inputs), lane, sums);
    }
    finish<T, Dense>(p, memory, share, sums, side);
}

#define BLOCK_ENTRY(NAME, P, ...)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(const __grid_constant__ P p) { \
        __VA_ARGS__(p);                                                                           \
    }
