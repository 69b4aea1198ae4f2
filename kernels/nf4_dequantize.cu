// 4-bit codes -> T. Reads 0.5 bytes and the share of an absmax per weight, writes sizeof(T): bound by memory bandwidth.
//
// A warp owns 1024 weights as four groups of 256. For each group a lane loads four bytes (eight weights of one block), so
// that the loads of a warp are 128 neighbouring bytes and its 16-byte stores fill whole sectors.
#include "nf4.cuh"

struct Params {
    const uint8_t* packed;  // [ceil(numel / 2)], 16-byte aligned
    void* out;              // T [numel]; 16-byte aligned for 16-byte stores
    uint64_t numel;
    Absmax absmax;
    Codebook codebook;
    uint32_t block_shift;  // log2 of the blocksize
    uint32_t padding;
};
static_assert(sizeof(Params) == 144, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kGroup = 256, kGroups = 4;

// Stores the 256 weights of a warp, eight of one block per lane.
template <typename T>
__device__ __forceinline__ void store_group(const WarpDecoder& decoder, uint32_t codes, float absmax, T* out, uint32_t lane) {
    float w[8];
    decoder.decode(codes, absmax, w);
    Eight<T> eight;
    eight.round(w);
    eight.store(out + lane * 8);
}

// Eight f32 are 32 bytes, which a lane would store as two half sectors. Hand codes on so that each store of the warp is 512
// neighbouring bytes: four weights per lane, first of the group's lower half, then of its upper half.
template <>
__device__ __forceinline__ void store_group<float>(const WarpDecoder& decoder, uint32_t codes, float absmax, float* out, uint32_t lane) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const int source = int(half * 16 + lane / 2);
        const uint32_t its_codes = __shfl_sync(0xffffffffu, codes, source) >> (lane % 2 * 16);
        float w[4];
        decoder.decode(its_codes, __shfl_sync(0xffffffffu, absmax, source), w);
        __stcs(reinterpret_cast<float4*>(out + half * 128) + lane, make_float4(w[0], w[1], w[2], w[3]));
    }
}

// The groups at the end of the matrix, and all where `out` is not aligned: element by element.
template <typename T>
__device__ __forceinline__ void edge(const Params& p, const WarpDecoder& decoder, uint64_t begin, uint32_t lane) {
#pragma unroll 1
    for (uint32_t group = 0; group < kGroups; ++group) {
        const uint64_t first = begin + group * kGroup + lane * 8;
        const int count = first < p.numel ? int(min(p.numel - first, uint64_t(8))) : 0;
        uint32_t codes = 0;
#pragma unroll 1
        for (int i = 0; i < (count + 1) / 2; ++i) codes |= uint32_t(p.packed[first / 2 + i]) << (8 * i);
        const uint64_t block[1] = {min(first, p.numel - 1) >> p.block_shift};
        float absmax[1], w[8];
        p.absmax.load(block, absmax);
        decoder.decode(codes, absmax[0], w);
        Eight<T> eight;
        eight.round(w);
        eight.store_part(static_cast<T*>(p.out) + first, count);
    }
}

template <typename T>
__device__ __forceinline__ void dequantize(const Params& p) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint64_t begin = (uint64_t(blockIdx.x) * (kThreads / 32) + warp) * (kGroup * kGroups);
    const WarpDecoder decoder(p.codebook);
    if (begin >= p.numel) return;
    if (p.numel - begin < kGroup * kGroups || !aligned16(p.out)) return edge<T>(p, decoder, begin, lane);

    uint32_t codes[kGroups];
    uint64_t block[kGroups];
    float absmax[kGroups];
    const uint32_t* packed = reinterpret_cast<const uint32_t*>(p.packed + begin / 2) + lane;
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g) {
        codes[g] = __ldcs(packed + g * (kGroup / 8));
        block[g] = (begin + g * kGroup + lane * 8) >> p.block_shift;
    }
    p.absmax.load(block, absmax);
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g)
        store_group<T>(decoder, codes[g], absmax[g], static_cast<T*>(p.out) + begin + g * kGroup, lane);
}

#define ENTRY(T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads, 8) nf4_dequantize_##T(const __grid_constant__ Params p) { \
        dequantize<T>(p);                                                                                 \
    }

typedef float f32;
ENTRY(f32)
ENTRY(f16)
ENTRY(bf16)
