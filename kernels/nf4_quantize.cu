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

    __device__ __forceinline__ void load(const Params& p, uint64_t first, bool aligned) {
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) {
            const uint64_t at = first + c * kFlatChunk;
            const T* x = static_cast<const T*>(p.x) + at;
            const int count = flat_count(at, p.output.numel);
            if (aligned && count == 8)
                chunk[c].load(x);
            else
                chunk[c].load_part(x, count);
        }
    }
};

template <typename T, typename Search>
__device__ __forceinline__ void quantize(const Params& p) {
    __shared__ typename Search::Table table;
    __shared__ FlatEncoder::Shared maxima;
    const bool aligned = aligned16(p.x);
    const uint64_t step = uint64_t(gridDim.x) * kFlatTile;
    uint64_t tile = uint64_t(blockIdx.x) * kFlatTile;

    Tile<T> next;
    next.load(p, tile + flat_offset(), aligned);
    const Search search(p.encoder, table);
    const FlatEncoder encoder(p.output, p.encoder, maxima);
    for (uint32_t turn = 0; tile < p.output.numel; tile += step, turn ^= 1) {
        float x[kFlatChunks][8];
#pragma unroll
        for (uint32_t c = 0; c < kFlatChunks; ++c) next.chunk[c].widen(x[c]);
        next.load(p, tile + step + flat_offset(), aligned);
        encoder.store(search, tile + flat_offset(), x, turn);
    }
}

#define ENTRY(T, SEARCH, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(kFlatThreads, sizeof(T) == 4 ? 4 : 5) NAME(const __grid_constant__ Params p) { \
        quantize<T, SEARCH>(p);                                                                                                    \
    }

ENTRY(float, BinnedSearch, nf4_quantize_f32_binned)
ENTRY(f16, BinnedSearch, nf4_quantize_f16_binned)
ENTRY(bf16, BinnedSearch, nf4_quantize_bf16_binned)
ENTRY(float, CountingSearch, nf4_quantize_f32_counting)
ENTRY(f16, CountingSearch, nf4_quantize_f16_counting)
ENTRY(bf16, CountingSearch, nf4_quantize_bf16_counting)
