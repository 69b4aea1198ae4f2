// What a product's sums still lack: the low-rank branch, the scale of a row, the bias, the rounding.
#pragma once

#include <cstdint>

#include "dtype.cuh"
#include "low_rank.cuh"

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

    // `above`: rows of a stack of weights that come before this one's.
    __device__ __forceinline__ Column(const Output& output, uint32_t n, uint32_t row, uint32_t above = 0) : output(output), n(n), row(row) {
        scale = output.row_scale == nullptr ? 1.0f : output.row_scale[above + row];
        offset = output.bias == nullptr ? 0.0f : to_f32(static_cast<const T*>(output.bias)[above + row]);
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

// delta[j][i] = v[first_token + j] . b[first_row + i] in f32 for a tile of `Tokens` by `Rows`, over the tokens' own
// adapters: 0 for a token without one, NaN for a wrong index. Called by all threads of the block; `delta` is shared memory,
// ready after the caller's next barrier.
template <typename T, int Tokens, int Rows, typename Order = InOrder>
__device__ __forceinline__ void low_rank(const LowRank& branch, uint32_t first_token, uint32_t tokens, uint32_t first_row,
                                         uint32_t rows, float (&delta)[Tokens][Rows], const Order& order = Order{}) {
    for (uint32_t i = threadIdx.x; i < Tokens * Rows; i += blockDim.x) delta[i / Rows][i % Rows] = 0.0f;
    add_low_rank<T, Tokens, Rows>(branch, first_token, tokens, first_row, rows, &delta[0][0], Rows, 0, 1, OfOutputs{}, order);
}
