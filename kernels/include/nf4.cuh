// 4-bit weights as bitsandbytes stores them, and how their codes become numbers again.
//
// Layout: the matrix is flattened row by row. Byte j of `packed` holds element 2j in its HIGH nibble and 2j+1 in its low
// one. Every `blocksize` (a power of two, 32..4096) consecutive elements of the flat order share one absmax; a block may
// begin in one row and end in the next. `packed` is 16-byte aligned, so 32 elements that start at a multiple of 32 are
// 16 aligned bytes of one block, whatever the matrix' width.
//
// Weight = codebook[code] * absmax, one f32 product. A nested absmax is round(map[q] * nested) + offset, two roundings.
#pragma once

#include <cstdint>

#include "dtype.cuh"
#include "ptx.cuh"

// The 16 values of the codes. Twin: cuda::nf4::Codebook.
struct Codebook {
    float value[16];
};
static_assert(sizeof(Codebook) == 64, "the Rust twin has this size");

// The absmax of every block: plain, or itself quantised to 8 bit. Twin: cuda::nf4::Absmax.
struct Absmax {
    const float* plain;   // [blocks]; null when nested
    const uint8_t* q;     // [blocks]: index into map
    const float* nested;  // [ceil(blocks / 2^nested_shift)]
    const float* map;     // [256]
    const float* offset;  // [1]
    uint32_t nested_shift;
    uint32_t padding;

    // The absmax of Count blocks; all loads of one kind are in flight together.
    template <int Count>
    __device__ __forceinline__ void load(const uint64_t (&block)[Count], float (&absmax)[Count]) const {
        if (plain) {
#pragma unroll
            for (int i = 0; i < Count; ++i) absmax[i] = __ldg(plain + block[i]);
            return;
        }
        uint8_t code[Count];
        float outer[Count];
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            code[i] = __ldg(q + block[i]);
            outer[i] = __ldg(nested + (block[i] >> nested_shift));
        }
        const float shift = __ldg(offset);
#pragma unroll
        for (int i = 0; i < Count; ++i) absmax[i] = __fadd_rn(__fmul_rn(__ldg(map + code[i]), outer[i]), shift);
    }
};
static_assert(sizeof(Absmax) == 48, "the Rust twin has this size");

// A 4-bit matrix that is read as numbers of a known type. Twin: cuda::nf4::Weight.
struct Nf4Weight {
    const uint8_t* packed;  // [ceil(numel / 2)]
    Absmax absmax;
    Codebook codebook;
    uint32_t block_shift;  // log2 of the blocksize
    uint32_t dtype;        // weights are rounded to this type; kF32 leaves them exact

    // Any one element.
    __device__ __forceinline__ float operator[](uint64_t index) const {
        const uint64_t block[1] = {index >> block_shift};
        float scale[1];
        absmax.load(block, scale);
        const uint32_t code = packed[index / 2] >> (index % 2 ? 0 : 4) & 15;
        float x[1] = {__fmul_rn(codebook.value[code], scale[0])};
        round_to(dtype, x);
        return x[0];
    }
};
static_assert(sizeof(Nf4Weight) == 128, "the Rust twin has this size");

// Decodes through the warp: lane i of every 16 keeps value[i], and a shuffle by the code fetches it. All lanes of the
// warp must take part. This is for kernels that need the exact f32 value; it costs about 2.4 instructions per weight.
struct WarpDecoder {
    float mine;

    __device__ __forceinline__ explicit WarpDecoder(const Codebook& codebook) {
        mine = codebook.value[threadIdx.x & 15];
    }

    // The Count weights of the first Count / 2 bytes (little-endian) of `codes`, in element order.
    template <int Count>
    __device__ __forceinline__ void decode(uint32_t codes, float absmax, float (&w)[Count]) const {
#pragma unroll
        for (int i = 0; i < Count; ++i)
            w[i] = __fmul_rn(__shfl_sync(0xffffffffu, mine, int(codes >> (4 * (i ^ 1))), 16), absmax);
    }
};

// Decodes a byte to two 16-bit elements with one load from shared memory: the fastest way where the absmax is applied later. Row
// b of 256 holds the pair of byte b once for each bank: lane l reads column l, so no two lanes meet in a bank. Rows are `Pitch`
// bytes apart: 128, or 256, with which one byte permute brings a byte to its row.
template <typename T, uint32_t Pitch>
struct PairTable {
    static constexpr uint32_t kBytes = 256 * Pitch, kBuilders = 256;

    // Called by whole warps; a barrier must follow. Thread `thread` of `kBuilders` makes the pair of one byte and stores it eight
    // times four columns wide, each time at another place than the seven lanes that shared memory serves together with it.
    // `table` is a shared address, `unit` what the values are divided by.
    static __device__ __forceinline__ void build(const Codebook& codebook, uint32_t table, uint32_t thread, float unit = 1.0f) {
        const float mine = codebook.value[thread % 16] / unit;
        // The element at the lower address sits in the high nibble and becomes the low half of the pair.
        const float first = __shfl_sync(0xffffffffu, mine, int(thread >> 4), 16);
        const float second = __shfl_sync(0xffffffffu, mine, int(thread & 15), 16);
        const uint32_t pair = Pair<T>::pack(first, second);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            ptx::store_shared16(table + thread * Pitch + (thread + i) % 8 * 16, make_uint4(pair, pair, pair, pair));
        }
    }

    // The pair of byte `i` of `codes`: a shift, a mask with the lane's column (4 * lane) put in, a load.
    static __device__ __forceinline__ uint32_t look_up(const uint8_t* table, uint32_t column, uint32_t codes, int i) {
        static_assert(Pitch == 128, "the shift");
        const uint32_t shifted = i == 0 ? codes << 7 : codes >> (8 * i - 7);
        return *reinterpret_cast<const uint32_t*>(table + ptx::and_or(shifted, 0xff << 7, column));
    }
};
