// Which elements of x dropout takes: the same ones in the forward and the backward pass, without a mask in memory.
#pragma once

#include <cstdint>

// Four 32-bit numbers from a counter and a key: Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xd2511f53u, counter.x), low0 = 0xd2511f53u * counter.x;
        const uint32_t high1 = __umulhi(0xcd9e8d57u, counter.z), low1 = 0xcd9e8d57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9e3779b9u, key.y += 0xbb67ae85u;
    }
    return counter;
}

// Which elements of x stay, by their token and column. Twin: cuda::dropout::Params.
struct Dropout {
    uint64_t seed, offset;
    uint32_t threshold;    // a number below it drops its element; 0: no dropout
    uint32_t first_token;  // number of the first token

    // The numbers of four elements of a token, from a multiple of four on.
    __device__ __forceinline__ uint4 four(uint32_t token, uint32_t column) const {
        const uint4 counter = make_uint4(column / 4, first_token + token, uint32_t(offset), uint32_t(offset >> 32));
        return philox(counter, make_uint2(uint32_t(seed), uint32_t(seed >> 32)));
    }

    __device__ __forceinline__ bool keeps(uint32_t token, uint32_t column) const {
        if (threshold == 0) return true;
        const uint4 words = four(token, column);
        const uint32_t even = column % 4 < 2 ? words.x : words.z, odd = column % 4 < 2 ? words.y : words.w;
        return (column % 2 ? odd : even) >= threshold;
    }
};
static_assert(sizeof(Dropout) == 24, "the Rust twin has this size");
