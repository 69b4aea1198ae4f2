// Element types of tensors, and the eight neighbouring elements that a thread moves with 16-byte accesses.
//
// An element is its bits; arithmetic is done in f32. Widening is exact, narrowing rounds to nearest, ties to even, and
// neither flushes subnormals.
#pragma once

#include <cstdint>

struct f16 {
    uint16_t bits;
};

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }

__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T from_f32(float x);

template <>
__device__ __forceinline__ float from_f32<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// The larger, or NaN if either is.
__device__ __forceinline__ float max_nan(float x, float y) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
}

// The two halves of a word as elements: the low half is the element at the lower address.
template <typename T>
struct Pair;

template <>
struct Pair<f16> {
    static __device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
        low = to_f32(f16{uint16_t(word)});
        high = to_f32(f16{uint16_t(word >> 16)});
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t word;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
    // The larger of each half, or NaN if either is.
    static __device__ __forceinline__ uint32_t max_nan(uint32_t x, uint32_t y) {
        uint32_t larger;
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
        return larger;
    }
};

template <>
struct Pair<bf16> {
    static __device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
        low = __uint_as_float(word << 16);
        high = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
    // The larger of each half, or NaN if either is.
    static __device__ __forceinline__ uint32_t max_nan(uint32_t x, uint32_t y) {
        uint32_t larger;
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
        return larger;
    }
};

// Whether 16-byte accesses may start at `p`.
__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uint64_t>(p) & 15) == 0; }

// Eight neighbouring elements as stored: 16 bytes of f16 or bf16, 32 of f32. Keeping them packed until they are needed
// halves the registers that loads in flight take.
template <typename T>
struct Eight {
    uint4 raw;

    __device__ __forceinline__ void load(const T* p) { raw = __ldcs(reinterpret_cast<const uint4*>(p)); }
    __device__ __forceinline__ void store(T* p) const { __stcs(reinterpret_cast<uint4*>(p), raw); }

    __device__ __forceinline__ void widen(float (&x)[8]) const {
        Pair<T>::unpack(raw.x, x[0], x[1]);
        Pair<T>::unpack(raw.y, x[2], x[3]);
        Pair<T>::unpack(raw.z, x[4], x[5]);
        Pair<T>::unpack(raw.w, x[6], x[7]);
    }
    __device__ __forceinline__ void round(const float (&x)[8]) {
        raw.x = Pair<T>::pack(x[0], x[1]);
        raw.y = Pair<T>::pack(x[2], x[3]);
        raw.z = Pair<T>::pack(x[4], x[5]);
        raw.w = Pair<T>::pack(x[6], x[7]);
    }

    // The largest magnitude; infinity or NaN if an element is.
    __device__ __forceinline__ float magnitude() const {
        constexpr uint32_t kMagnitude = 0x7fff7fffu;
        const uint32_t xy = Pair<T>::max_nan(raw.x & kMagnitude, raw.y & kMagnitude);
        const uint32_t zw = Pair<T>::max_nan(raw.z & kMagnitude, raw.w & kMagnitude);
        float low, high;
        Pair<T>::unpack(Pair<T>::max_nan(xy, zw), low, high);
        return max_nan(low, high);
    }

    // The first `count` of eight, the others zero; `p` is aligned to an element only.
    __device__ __forceinline__ void load_part(const T* p, int count) {
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) words[i / 2] |= uint32_t(p[i].bits) << (i % 2 * 16);
        raw = make_uint4(words[0], words[1], words[2], words[3]);
    }
    __device__ __forceinline__ void store_part(T* p, int count) const {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) p[i].bits = uint16_t(words[i / 2] >> (i % 2 * 16));
    }
};

template <>
struct Eight<float> {
    float4 low, high;

    __device__ __forceinline__ void load(const float* p) {
        low = __ldcs(reinterpret_cast<const float4*>(p));
        high = __ldcs(reinterpret_cast<const float4*>(p) + 1);
    }
    __device__ __forceinline__ void store(float* p) const {
        __stcs(reinterpret_cast<float4*>(p), low);
        __stcs(reinterpret_cast<float4*>(p) + 1, high);
    }

    __device__ __forceinline__ void widen(float (&x)[8]) const {
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
    __device__ __forceinline__ void round(const float (&x)[8]) {
        low = make_float4(x[0], x[1], x[2], x[3]);
        high = make_float4(x[4], x[5], x[6], x[7]);
    }
    __device__ __forceinline__ float magnitude() const {
        const float x = max_nan(max_nan(fabsf(low.x), fabsf(low.y)), max_nan(fabsf(low.z), fabsf(low.w)));
        const float y = max_nan(max_nan(fabsf(high.x), fabsf(high.y)), max_nan(fabsf(high.z), fabsf(high.w)));
        return max_nan(x, y);
    }

    __device__ __forceinline__ void load_part(const float* p, int count) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = i < count ? p[i] : 0.0f;
        round(x);
    }
    __device__ __forceinline__ void store_part(float* p, int count) const {
        float x[8];
        widen(x);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) p[i] = x[i];
    }
};

// What the host calls the element types. Twin: cuda::deltas::code.
enum DTypeCode : uint32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

// x rounded to a type that is known at run time only.
template <int Count>
__device__ __forceinline__ void round_to(uint32_t dtype, float (&x)[Count]) {
    if (dtype == kF32) return;
#pragma unroll
    for (int i = 0; i < Count; ++i) x[i] = dtype == kF16 ? to_f32(from_f32<f16>(x[i])) : to_f32(from_f32<bf16>(x[i]));
}
