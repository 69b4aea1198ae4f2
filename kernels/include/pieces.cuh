// Elements as sums of 16-bit pieces that tensor cores multiply exactly, and their products.
#pragma once

#include <cstdint>

#include "dtype.cuh"
#include "ptx.cuh"

// d += a b^T; see ptx.cuh for which lane holds what.
__device__ __forceinline__ void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_f16(d, a, b0, b1);
}
__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(d, a, b0, b1);
}

// Two f32 as `Count` pairs of bf16 that add up to them: what is left after each pair is cut off for the next. Three pairs
// hold all 24 bits, two all 11 bits of an f16. (Not numbers stay so; infinities become NaN.)
template <int Count>
__device__ __forceinline__ void cut(float low, float high, uint32_t (&pairs)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        pairs[i] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
        float a, b;
        Pair<bf16>::unpack(pairs[i], a, b);
        low -= a, high -= b;
    }
}

// Four f32 as sums of two bf16 each: 16 bits of every significand.
struct Split {
    uint32_t high[2], low[2];

    __device__ __forceinline__ explicit Split(const float (&values)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float a, b;
            high[i] = Pair<bf16>::pack(values[2 * i], values[2 * i + 1]);
            Pair<bf16>::unpack(high[i], a, b);
            low[i] = Pair<bf16>::pack(values[2 * i] - a, values[2 * i + 1] - b);
        }
    }
};

// How `Words` pairs of neighbouring elements of type T are multiplied beside others: as f16 or bf16 (M), in `kCount` pieces.
template <typename T, typename M>
struct Pieces {
    static constexpr int kCount = 1;
    template <int Words>
    static __device__ __forceinline__ void make(const uint32_t (&raw)[Words], uint32_t (&pieces)[1][Words]) {
#pragma unroll
        for (int i = 0; i < Words; ++i) pieces[0][i] = raw[i];
    }
};
template <>
struct Pieces<f16, bf16> {
    static constexpr int kCount = 2;
    template <int Words>
    static __device__ __forceinline__ void make(const uint32_t (&raw)[Words], uint32_t (&pieces)[2][Words]) {
#pragma unroll
        for (int i = 0; i < Words; ++i) {
            float low, high;
            Pair<f16>::unpack(raw[i], low, high);
            uint32_t pairs[2];
            cut(low, high, pairs);
            pieces[0][i] = pairs[0], pieces[1][i] = pairs[1];
        }
    }
};
template <>
struct Pieces<float, bf16> {
    static constexpr int kCount = 3;
    template <int Words>
    static __device__ __forceinline__ void make(const uint32_t (&raw)[2 * Words], uint32_t (&pieces)[3][Words]) {
#pragma unroll
        for (int i = 0; i < Words; ++i) {
            uint32_t pairs[3];
            cut(__uint_as_float(raw[2 * i]), __uint_as_float(raw[2 * i + 1]), pairs);
            pieces[0][i] = pairs[0], pieces[1][i] = pairs[1], pieces[2][i] = pairs[2];
        }
    }
};
