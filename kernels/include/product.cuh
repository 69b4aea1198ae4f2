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

// The blocks of 4-bit codes that a lane's rows lie in: `row`, and others that follow it. Rows past the end repeat the last.
struct RowBlocks {
    uint64_t flat;  // where the first row begins
    uint32_t last;  // rows that follow the first

    __device__ __forceinline__ RowBlocks(const Params& p, uint32_t row) {
        last = p.n - 1 - min(row, p.n - 1);
        flat = uint64_t(p.n - 1 - last) * p.k;
    }

    __device__ __forceinline__ uint64_t find(const Params& p, uint32_t following, uint32_t k) const {
        return (flat + uint64_t(min(following, last)) * p.k + k) >> p.weight.block_shift;
    }
};

// The absmax of some blocks on their way from memory. A nested one takes two loads, one after the other; the second, from
// a table that lies in L1, is put off until the value is asked for.
template <int Count>
struct PendingAbsmax {
    float value[Count];  // or the outer absmax
    uint32_t code[Count];

    __device__ __forceinline__ void request(const Absmax& absmax, const uint64_t (&block)[Count]) {
        if (absmax.plain != nullptr) {
#pragma unroll
            for (int i = 0; i < Count; ++i) value[i] = __ldg(absmax.plain + block[i]);
        } else {
#pragma unroll
            for (int i = 0; i < Count; ++i) {
                code[i] = __ldg(absmax.q + block[i]);
                value[i] = __ldg(absmax.nested + (block[i] >> absmax.nested_shift));
            }
        }
    }

    __device__ __forceinline__ void get(const Absmax& absmax, float (&scales)[Count]) const {
        if (absmax.plain != nullptr) {
#pragma unroll
            for (int i = 0; i < Count; ++i) scales[i] = value[i];
        } else {
            const float offset = __ldg(absmax.offset);
#pragma unroll
            for (int i = 0; i < Count; ++i) scales[i] = __fadd_rn(__fmul_rn(__ldg(absmax.map + code[i]), value[i]), offset);
        }
    }
};

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
