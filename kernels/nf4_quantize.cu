// T -> 4-bit codes and the absmax of every block. Reads sizeof(T) per weight, writes 0.5 bytes and the share of an absmax:
// bound by memory bandwidth.
//
// A block of threads walks over tiles of 4096 elements; the next tile is loaded while this one is encoded.
#include "dtype.cuh"
#include "flat.cuh"

struct Params {
    const void* x;  // T [numel]; 16-byte aligned for 16-byte loads
    FlatOutput output;
    Encoder encoder;
};
static_assert(sizeof(Params) == 112, "the Rust twin has this size");

template <typename T>
struct Tile {
    Eight<T> chunk[kFlatChunks];

    __device__ __forceinline__ void load(const T* x) {
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) chunk[c].load(x + c * kFlatChunk);
    }
    __device__ __forceinline__ void load_part(const T* x, uint64_t first, uint64_t numel) {
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) chunk[c].load_part(x + c * kFlatChunk, flat_count(first + c * kFlatChunk, numel));
    }
    __device__ __forceinline__ void widen(float (&x)[kFlatChunks][8], float (&largest)[kFlatChunks]) const {
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) {
            chunk[c].widen(x[c]);
            largest[c] = chunk[c].magnitude();
        }
    }
};

template <typename T, typename Search>
__device__ __forceinline__ void quantize(const Params& p) {
    __shared__ typename Search::Table table;
    __shared__ FlatEncoder::Shared maxima;
    const uint64_t numel = p.output.numel, step = uint64_t(gridDim.x) * kFlatTile;
    const uint64_t whole = aligned16(p.x) ? numel / kFlatTile * kFlatTile : 0;  // tiles from here on are read in parts
    uint64_t tile = uint64_t(blockIdx.x) * kFlatTile;
    FlatEncoder encoder(p.output, p.encoder, maxima, tile);
    const T* at = static_cast<const T*>(p.x) + encoder.position();

    Tile<T> next;
    if (tile < whole) next.load(at);
    const Search search(p.encoder, table);
    float x[kFlatChunks][8], largest[kFlatChunks];
#pragma unroll 1
    for (; tile < whole; tile += step, at += step, encoder.advance(step)) {
        next.widen(x, largest);
        if (tile + step < whole) next.load(at + step);
        encoder.template store<true>(search, x, largest);
    }
#pragma unroll 1
    for (; tile < numel; tile += step, at += step, encoder.advance(step)) {
        next.load_part(at, encoder.position(), numel);
        next.widen(x, largest);
        encoder.template store<false>(search, x, largest);
    }
}

#define ENTRY(T, SEARCH, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(kFlatThreads, 4) NAME(const __grid_constant__ Params p) { \
        quantize<T, SEARCH>(p);                                                                                                    \
    }

ENTRY(float, BinnedSearch, nf4_quantize_f32_binned)
ENTRY(f16, BinnedSearch, nf4_quantize_f16_binned)
ENTRY(bf16, BinnedSearch, nf4_quantize_bf16_binned)
ENTRY(float, CountingSearch, nf4_quantize_f32_counting)
ENTRY(f16, CountingSearch, nf4_quantize_f16_counting)
ENTRY(bf16, CountingSearch, nf4_quantize_bf16_counting)
