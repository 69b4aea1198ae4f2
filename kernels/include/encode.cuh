// Numbers to 4-bit codes: the absmax of a block, and the search for a number's code.
//
// A block's scale is 1 / absmax, rounded once; a number x of it takes the code codes[rank], rank = how many thresholds t
// have x * scale > t. So a number on a threshold takes the lower code. A block of zeros, and one with an element that is
// not finite, takes the code of zero everywhere; its absmax is 0 or NaN.
#pragma once

#include <cstdint>

#include "dtype.cuh"

// What the search needs of a codebook. Twin: cuda::nf4::Encoder.
struct Encoder {
    float threshold[15];  // ascending
    uint32_t zero;        // the code of zero, in each of the eight nibbles
    uint64_t codes;       // nibble r is the code of rank r
};
static_assert(sizeof(Encoder) == 72, "the Rust twin has this size");

// The largest magnitude; infinity or NaN if an element is.
__device__ __forceinline__ float magnitude(const float (&x)[8]) {
    Eight<float> eight;
    eight.round(x);
    return eight.magnitude();
}

// The largest of `lanes` neighbouring lanes: a power of two, at least 4, the same in the whole warp.
__device__ __forceinline__ float largest_of_lanes(float x, uint32_t lanes) {
    x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
    if (lanes >= 8) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 4));
    if (lanes >= 16) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 8));
    if (lanes >= 32) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 16));
    return x;
}

// What is stored for a block whose largest magnitude is `largest`.
__device__ __forceinline__ float stored_absmax(float largest) {
    return largest < __int_as_float(0x7f800000) ? largest : __int_as_float(0x7fc00000);
}

// x / absmax for a block with a positive absmax, as x * lift * inverse: the lift is 1, but for denormals, whose reciprocal
// would not be finite.
__device__ __forceinline__ void normalize(float absmax, float (&x)[8]) {
    if (absmax < 1.17549435e-38f) {
        const float lift = 18446744073709551616.0f;  // 2^64
        absmax = __fmul_rn(absmax, lift);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], lift);
    }
    const float inverse = __frcp_rn(absmax);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], inverse);
}

// Ranks by one table load and one comparison, for codebooks in which code = rank and no two thresholds share one of 63 bins
// over [-1, 1]. The table holds each bin once per bank pair (lane l reads its own), so that a load never conflicts.
struct BinnedSearch {
    static constexpr uint32_t kBins = 64;  // the last one stays empty
    struct alignas(8) Bin {
        float threshold;  // the one in this bin, or infinity
        uint32_t rank;    // how many lie in bins below
    };
    using Table = Bin[kBins][32];
    uint32_t base;

    // The bin number plus 2^23: a float whose low bits are the number. Monotone in x, and from 0 to 62 for |x| up to an ulp
    // above 1.
    static __device__ __forceinline__ float bin(float x) { return __fmaf_rn(x, 31.0f, 8388639.0f); }

    // All threads of the block, 256, must come here.
    __device__ __forceinline__ BinnedSearch(const Encoder& encoder, Table& table) {
        const uint32_t mine = threadIdx.x / 4;
        const float number = __uint_as_float(0x4b000000u + mine);
        Bin entry{__int_as_float(0x7f800000), 0};
#pragma unroll
        for (int t = 0; t < 15; ++t) {
            const float its_bin = bin(encoder.threshold[t]);
            if (its_bin < number) ++entry.rank;
            if (its_bin == number) entry.threshold = encoder.threshold[t];
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i)  // the eight bins of a warp go to different banks
            table[mine][threadIdx.x % 4 + (i + mine) % 8 * 4] = entry;
        __syncthreads();
        // bin() is read as an integer, whose upper bits this takes away again.
        base = uint32_t(__cvta_generic_to_shared(&table[0][threadIdx.x % 32])) - 0x4b000000u * uint32_t(sizeof(table[0]));
    }

    __device__ __forceinline__ uint32_t encode(const float (&x)[8]) const {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t address = __float_as_uint(bin(x[i])) * uint32_t(sizeof(Table) / kBins) + base;
            const uint32_t unit = 1u << (4 * (i ^ 1));
            // codes += unit * (rank + (x > threshold)); a predicated addition, which C++ gives no way to ask for
            asm volatile(
                "{\n"
                ".reg .f32 threshold;\n"
                ".reg .b32 rank;\n"
                ".reg .pred above;\n"
                "ld.shared.v2.b32 {threshold, rank}, [%1];\n"
                "setp.gt.f32 above, %2, threshold;\n"
                "mad.lo.u32 %0, rank, %3, %0;\n"
                "@above add.u32 %0, %0, %3;\n"
                "}"
                : "+r"(codes)
                : "r"(address), "f"(x[i]), "r"(unit));
        }
        return codes;
    }
};

// Ranks by counting, for any codebook.
struct CountingSearch {
    struct Table {};
    const Encoder& encoder;

    __device__ __forceinline__ CountingSearch(const Encoder& encoder, Table&) : encoder(encoder) {}

    __device__ __forceinline__ uint32_t encode(const float (&x)[8]) const {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            uint32_t shift = 0;
#pragma unroll
            for (int t = 0; t < 15; ++t)
                if (x[i] > encoder.threshold[t]) shift += 4;
            codes += (uint32_t(encoder.codes >> shift) & 15) << (4 * (i ^ 1));
        }
        return codes;
    }
};

// The codes of eight elements of a block. Changes x.
template <typename Search>
__device__ __forceinline__ uint32_t encode_block(const Search& search, const Encoder& encoder, float absmax, float (&x)[8]) {
    if (!(absmax > 0.0f)) return encoder.zero;
    normalize(absmax, x);
    return search.encode(x);
}
