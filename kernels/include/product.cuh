// What the kernels of `matmul` are told: y = row_scale * (x w^T + v b^T) + bias.
#pragma once

#include <cstdint>

#include "epilogue.cuh"
#include "nf4.cuh"
#include "ptx.cuh"

// The weight, [n, k] row by row.
struct Weight {
    const void* data;      // packed codes, or elements of x's type
    Absmax absmax;         // of codes
    Codebook codebook;     // of codes
    uint32_t block_shift;  // of codes: log2 of the blocksize
    uint32_t padding;
};

struct Params {
    const void* x;  // [tokens, k]
    Weight weight;
    LowRank branch;
    Output output;
    uint32_t tokens;
    uint32_t n;
    uint32_t k;
    uint32_t splits;  // gridDim.y: blocks that share the sum over k
};
static_assert(sizeof(Params) == 224, "the Rust twin has this size");

// The part of `steps` steps that this block sums: all splits are as long, but for a remainder at the end.
struct Range {
    uint32_t begin, end;

    __device__ __forceinline__ Range(uint32_t steps, uint32_t split, uint32_t splits) {
        const uint32_t length = (steps + splits - 1) / splits;
        begin = min(split * length, steps);
        end = min(begin + length, steps);
    }
};

// 16 bytes from `at` on, a multiple of 16; zeros from `end` on.
__device__ __forceinline__ uint4 load_piece(const uint8_t* bytes, uint64_t at, uint64_t end) {
    if (at + 16 <= end) return ptx::load_stream16(bytes + at);
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (at + i < end) words[i / 4] |= uint32_t(bytes[at + i]) << (i % 4 * 8);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}
