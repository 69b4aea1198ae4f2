// Tiles of a flat 4-bit matrix: 4096 elements, the largest blocksize, so that no quantisation block leaves its tile.
//
// A block of 256 threads takes a tile; a warp owns 512 elements of it as two chunks of 256, a lane eight neighbouring ones
// of each chunk.
#pragma once

#include <cstdint>

#include "encode.cuh"

constexpr uint32_t kFlatThreads = 256, kFlatChunks = 2, kFlatChunk = 256, kFlatTile = 4096;

// Where the calling thread's first chunk lies in a tile.
__device__ __forceinline__ uint32_t flat_offset() { return threadIdx.x / 32 * (kFlatChunks * kFlatChunk) + threadIdx.x % 32 * 8; }

// How many of the eight elements from `first` on exist.
__device__ __forceinline__ int flat_count(uint64_t first, uint64_t numel) {
    return first < numel ? int(min(numel - first, uint64_t(8))) : 0;
}

// Where the codes go.
struct FlatOutput {
    uint8_t* packed;  // [ceil(numel / 2)], 16-byte aligned
    float* absmax;    // [ceil(numel / blocksize)]
    uint64_t numel;
    uint32_t block_shift;  // log2 of the blocksize
    uint32_t padding;
};
static_assert(sizeof(FlatOutput) == 32, "the Rust twin has this size");

// Encodes and stores tiles. All threads of the block take part.
class FlatEncoder {
    static constexpr uint32_t kWarps = kFlatThreads / 32;

  public:
    using Shared = float[2][kWarps];

    // Begins with the tile at `tile`.
    __device__ __forceinline__ FlatEncoder(const FlatOutput& output, const Encoder& encoder, Shared& shared, uint64_t tile)
        : output(output), encoder(encoder), shared(shared), first(tile + flat_offset()) {
        packed = output.packed + first / 2;
        absmax = output.absmax + (first >> output.block_shift);
    }

    // The calling thread's first element.
    __device__ __forceinline__ uint64_t position() const { return first; }

    // Goes `step` elements on, a multiple of the tile's size.
    __device__ __forceinline__ void advance(uint64_t step) {
        first += step;
        packed += step / 2;
        absmax += step >> output.block_shift;
        turn ^= 1;
    }

    // Stores x, of which `largest` are the largest magnitudes per chunk. Whole: all elements of the tile exist.
    template <bool Whole, typename Search>
    __device__ __forceinline__ void store(const Search& search, float (&x)[kFlatChunks][8], float (&largest)[kFlatChunks]) const {
        spread(largest, shared[turn]);
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) {
            const float scale = stored_absmax(largest[c]);
            const uint32_t codes = encode_block(search, encoder, scale, x[c]);
            const bool begins = ((flat_offset() + c * kFlatChunk) & ((1u << output.block_shift) - 1)) == 0;
            if (begins && (Whole || first + c * kFlatChunk < output.numel)) absmax[c * kFlatChunk >> output.block_shift] = scale;
            if (Whole)
                __stcs(reinterpret_cast<uint32_t*>(packed) + c * (kFlatChunk / 8), codes);
            else
                store_codes(packed + c * (kFlatChunk / 2), flat_count(first + c * kFlatChunk, output.numel), codes);
        }
    }

  private:
    const FlatOutput& output;
    const Encoder& encoder;
    Shared& shared;
    uint64_t first;
    uint8_t* packed;
    float* absmax;
    uint32_t turn = 0;  // which part of `shared` is this tile's

    // Makes each chunk's largest magnitude that of the quantisation block that its elements lie in.
    __device__ __forceinline__ void spread(float (&largest)[kFlatChunks], float (&of_warp)[kWarps]) const {
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) largest[c] = largest_of_lanes(largest[c], 1u << min(output.block_shift - 3, 5u));
        if (output.block_shift <= 8) return;
        largest[0] = max_nan(largest[0], largest[1]);
        if (output.block_shift > 9) {
            const uint32_t warp = threadIdx.x / 32, warps = 1u << (output.block_shift - 9);
            if (threadIdx.x % 32 == 0) of_warp[warp] = largest[0];
            __syncthreads();
#pragma unroll 1
            for (uint32_t i = 0; i < warps; ++i) largest[0] = max_nan(largest[0], of_warp[(warp & ~(warps - 1)) + i]);
        }
        largest[1] = largest[0];
    }

    // Stores the codes of the first `count` of eight elements.
    __device__ __forceinline__ void store_codes(uint8_t* bytes, int count, uint32_t codes) const {
        if (count % 2) {  // the last byte's low nibble has no element
            const uint32_t nibble = 0xfu << (4 * (count ^ 1));
            codes = (codes & ~nibble) | (encoder.zero & nibble);
        }
#pragma unroll 1
        for (int i = 0; i < (count + 1) / 2; ++i) bytes[i] = uint8_t(codes >> (8 * i));
    }
};
