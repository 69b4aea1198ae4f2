// T -> 4-bit codes and the absmax of every block. Reads sizeof(T) per weight, writes 0.5 bytes and the share of an absmax:
// bound by memory bandwidth.
//
// A block of threads walks over tiles of 4096 elements, the largest blocksize, so no quantisation block leaves its tile. A
// warp owns 512 of them as two chunks, eight elements per lane. The next tile is loaded while this one is encoded.
#include "dtype.cuh"
#include "encode.cuh"

struct Params {
    const void* x;    // T [numel]; 16-byte aligned for 16-byte loads
    uint8_t* packed;  // [ceil(numel / 2)], 16-byte aligned
    float* absmax;    // [ceil(numel / blocksize)]
    uint64_t numel;
    Encoder encoder;
    uint32_t block_shift;  // log2 of the blocksize
    uint32_t padding;
};
static_assert(sizeof(Params) == 112, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kChunk = 256, kChunks = 2, kTile = kWarps * kChunks * kChunk;

// How many of the eight elements from `first` on exist.
__device__ __forceinline__ int valid(uint64_t first, uint64_t numel) {
    return first < numel ? int(min(numel - first, uint64_t(8))) : 0;
}

template <typename T>
struct Tile {
    Eight<T> chunk[kChunks];

    __device__ __forceinline__ void load(const Params& p, uint64_t first, bool aligned) {
#pragma unroll
        for (uint32_t c = 0; c < kChunks; ++c) {
            const uint64_t at = first + c * kChunk;
            const T* x = static_cast<const T*>(p.x) + at;
            if (aligned && at + 8 <= p.numel)
                chunk[c].load(x);
            else
                chunk[c].load_part(x, valid(at, p.numel));
        }
    }
};

// The largest magnitude of the block that each chunk's elements lie in. `shared` has one slot per warp.
__device__ __forceinline__ void block_maxima(float (&largest)[kChunks], uint32_t block_shift, float* shared) {
#pragma unroll
    for (uint32_t c = 0; c < kChunks; ++c) largest[c] = largest_of_lanes(largest[c], 1u << min(block_shift - 3, 5));
    if (block_shift <= 8) return;
    largest[0] = largest[1] = max_nan(largest[0], largest[1]);
    if (block_shift <= 9) return;
    const uint32_t warp = threadIdx.x / 32, warps = 1u << (block_shift - 9);
    shared[warp] = largest[0];
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = 0; i < warps; ++i) largest[0] = max_nan(largest[0], shared[(warp & ~(warps - 1)) + i]);
    largest[1] = largest[0];
}

__device__ __forceinline__ void store_codes(const Params& p, uint64_t first, uint32_t codes) {
    const int count = valid(first, p.numel);
    if (count == 8) {
        __stcs(reinterpret_cast<uint32_t*>(p.packed + first / 2), codes);
        return;
    }
    if (count % 2) {  // the last byte's low nibble has no element
        const uint32_t nibble = 0xfu << (4 * (count ^ 1));
        codes = (codes & ~nibble) | (p.encoder.zero & nibble);
    }
#pragma unroll 1
    for (int i = 0; i < (count + 1) / 2; ++i) p.packed[first / 2 + i] = uint8_t(codes >> (8 * i));
}

template <typename T, typename Search>
__device__ __forceinline__ void quantize(const Params& p) {
    __shared__ typename Search::Table table;
    __shared__ float maxima[2][kWarps];
    const bool aligned = aligned16(p.x);
    const uint64_t step = uint64_t(gridDim.x) * kTile;
    uint64_t first = uint64_t(blockIdx.x) * kTile + threadIdx.x / 32 * (kChunks * kChunk) + threadIdx.x % 32 * 8;
    const uint64_t lane_offset = first - uint64_t(blockIdx.x) * kTile;

    Tile<T> next;
    next.load(p, first, aligned);
    const Search search(p.encoder, table);
    for (uint32_t turn = 0; first - lane_offset < p.numel; first += step, turn ^= 1) {
        const Tile<T> tile = next;
        next.load(p, first + step, aligned);

        float x[kChunks][8], largest[kChunks];
#pragma unroll
        for (uint32_t c = 0; c < kChunks; ++c) {
            tile.chunk[c].widen(x[c]);
            largest[c] = magnitude(x[c]);
        }
        block_maxima(largest, p.block_shift, maxima[turn]);
#pragma unroll
        for (uint32_t c = 0; c < kChunks; ++c) {
            const uint64_t at = first + c * kChunk;
            const float absmax = stored_absmax(largest[c]);
            uint32_t codes = p.encoder.zero;
            if (absmax > 0.0f) {
                normalize(absmax, x[c]);
                codes = search.encode(x[c]);
            }
            if (at < p.numel && (at & ((1u << p.block_shift) - 1)) == 0) p.absmax[at >> p.block_shift] = absmax;
            store_codes(p, at, codes);
        }
    }
}

#define ENTRY(T, SEARCH, NAME)                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 5) NAME(const __grid_constant__ Params p) {    \
        quantize<T, SEARCH>(p);                                                                           \
    }

ENTRY(float, BinnedSearch, nf4_quantize_f32_binned)
ENTRY(f16, BinnedSearch, nf4_quantize_f16_binned)
ENTRY(bf16, BinnedSearch, nf4_quantize_bf16_binned)
ENTRY(float, CountingSearch, nf4_quantize_f32_counting)
ENTRY(f16, CountingSearch, nf4_quantize_f16_counting)
ENTRY(bf16, CountingSearch, nf4_quantize_bf16_counting)
