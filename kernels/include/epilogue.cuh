// What a product's sums still lack: the low-rank branch, the scale of a row, the bias, the rounding.
#pragma once

#include <cstdint>

#include "adapter.cuh"
#include "dtype.cuh"
#include "reduce.cuh"
#include "vector.cuh"

// Where a product goes, and what is done to it before.
struct Output {
    void* y;                 // [tokens, n]
    const void* bias;        // [n], of y's type, or null
    const float* row_scale;  // [n], or null
    float* partial;          // [splits, tokens, n] where the sum over k is split; else null
};

// One column of a product's output.
template <typename T>
struct Column {
    const Output& output;
    uint32_t n, row;
    float scale, offset;

    __device__ __forceinline__ Column(const Output& output, uint32_t n, uint32_t row) : output(output), n(n), row(row) {
        scale = output.row_scale == nullptr ? 1.0f : output.row_scale[row];
        offset = output.bias == nullptr ? 0.0f : to_f32(static_cast<const T*>(output.bias)[row]);
    }

    // The end of a whole sum: one fused multiply-add in f32, and one rounding.
    __device__ __forceinline__ void store(uint32_t token, float sum) const {
        static_cast<T*>(output.y)[size_t(token) * n + row] = from_f32<T>(fmaf(scale, sum, offset));
    }

    // Stores a whole sum, or keeps that of one split for `matmul_finish`.
    __device__ __forceinline__ void store(uint32_t token, float sum, uint32_t split, uint32_t tokens) const {
        if (output.partial == nullptr) return store(token, sum);
        output.partial[(size_t(split) * tokens + token) * n + row] = sum;
    }
};

// The low-rank branch `v b^T` of a product.
struct LowRank {
    const float* v;         // [tokens, adapters.pitch], from lora_shrink; null: no branch
    Adapters adapters;
    uint32_t b_is_f32;      // else the element type of y
    uint32_t padding;
};

// Four values of row `row` of b, from column `r` on; zero from column `rank` on.
template <typename T>
__device__ __forceinline__ void load_b(const Adapter& adapter, uint32_t b_is_f32, size_t row, uint32_t r, float (&b)[4]) {
    if (b_is_f32) {
        load_padded(static_cast<const float*>(adapter.b) + row * adapter.rank, r, adapter.rank, b);
    } else {
        load_padded(static_cast<const T*>(adapter.b) + row * adapter.rank, r, adapter.rank, b);
    }
}

// delta[j][i] = v[first_token + j] . b[first_row + i] in f32 for a tile of `Tokens` by `Rows`, over the tokens' own
// adapters: 0 for a token without one, NaN for a wrong index. Four lanes share a row of b; each sums every fourth group
// of four ranks in ascending order, and the four sums are added as (0 + 1) + (2 + 3).
// Called by all threads of the block; `delta` is shared memory, ready after the caller's next barrier.
template <typename T, int Tokens, int Rows>
__device__ __forceinline__ void low_rank(const LowRank& branch, uint32_t first_token, uint32_t tokens, uint32_t first_row,
                                         uint32_t rows, float (&delta)[Tokens][Rows]) {
    __shared__ Choice<Tokens> choice;
    choice.load(branch.adapters, first_token, tokens);
    __syncthreads();
    const uint32_t part = threadIdx.x % 4;
    for (uint32_t i = threadIdx.x / 4; i < Rows; i += blockDim.x / 4) {
        const size_t row = min(first_row + i, rows - 1);
        float sums[Tokens];
#pragma unroll
        for (int j = 0; j < Tokens; ++j) sums[j] = branch.adapters.is_wrong(choice.adapter[j]) ? nan_value() : 0.0f;
#pragma unroll 1
        for (int first = 0; first < Tokens; ++first) {
            const int32_t current = choice.adapter[first];
            if (!branch.adapters.exists(current) || !choice.is_first(first)) continue;
            const Adapter adapter = branch.adapters.entries[current];
#pragma unroll 1
            for (uint32_t r = 4 * part; r < adapter.rank; r += 16) {
                float b[4];
                load_b<T>(adapter, branch.b_is_f32, row, r, b);
#pragma unroll
                for (int j = 0; j < Tokens; ++j) {
                    if (choice.adapter[j] != current) continue;
                    float v[4];
                    load_vector(branch.v + size_t(first_token + j) * branch.adapters.pitch + r, v);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[j] = fmaf(v[e], b[e], sums[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < Tokens; ++j) {
            sums[j] += __shfl_xor_sync(kAllLanes, sums[j], 1);
            sums[j] += __shfl_xor_sync(kAllLanes, sums[j], 2);
            if (j % 4 == part) delta[j][i] = sums[j];
        }
    }
}
