// Adapters into a 4-bit weight: decode, add, and encode again in one pass, or store as a dense type. Per element, in f32:
//     t = the weight, rounded to its dtype; t = fma(scaling, delta, t) for every adapter; t = row_scale * t
// and t is encoded with a new absmax per block, or rounded once to a dense type.
//
// nf4_merge_tiled and nf4_merge_T take 64 x 128 tiles as merge.cu does; in the first a quantisation block must lie within a
// row of a tile. nf4_merge_flat does without: any block, any row length, but every element fetches its own factors.
#include "delta.cuh"
#include "flat.cuh"
#include "nf4_rows.cuh"

struct Params {
    Nf4Weight weight;        // [rows, columns]
    FlatOutput output;       // of nf4_merge_tiled and _flat
    Encoder encoder;         // of nf4_merge_tiled and _flat
    void* dense;             // T [rows, columns], of nf4_merge_T
    const float* row_scale;  // [rows], or null
    uint32_t rows, columns;
    uint32_t column_tiles;
    uint32_t vectors;  // rows of `dense` begin at multiples of 16 bytes
    Deltas deltas;
};
static_assert(sizeof(Params) == 464, "the Rust twin has this size");

// The place of a block of threads, and of a thread, in the matrix.
struct Place {
    uint32_t tile_row, tile_column, row, column;

    __device__ __forceinline__ explicit Place(const Params& p) {
        tile_row = blockIdx.x / p.column_tiles * kTileRows, tile_column = blockIdx.x % p.column_tiles * kTileColumns;
        row = tile_row + threadIdx.x / 16 * kRowsPerThread, column = tile_column + threadIdx.x % 16 * 8;
    }
};

// The merged elements of a thread.
__device__ __forceinline__ void merge_tile(const Params& p, const Place& place, DeltaTile::Shared& shared, float (&t)[kRowsPerThread][8]) {
    const Matrix matrix{p.rows, p.columns, false};
    Nf4Rows weight(p.weight);
    weight.fetch(matrix, place.row, place.column);
    const DeltaTile tile(shared, p.deltas, matrix, place.tile_row, place.tile_column);
    tile.begin(0);
    weight.decode(matrix, place.row, place.column, t);
#pragma unroll 1
    for (uint32_t number = 0; number < p.deltas.count; ++number) {
        float delta[kRowsPerThread][8];
        tile.compute(number, number + 1, delta);
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 8; ++j) t[i][j] = __fmaf_rn(p.deltas.item[number].scaling, delta[i][j], t[i][j]);
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        if (!p.row_scale || place.row + i >= p.rows) break;
        const float scale = p.row_scale[place.row + i];
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) t[i][j] = __fmul_rn(scale, t[i][j]);
    }
}

template <typename Search>
__device__ __forceinline__ void to_nf4(const Params& p) {
    __shared__ DeltaTile::Shared shared;
    __shared__ typename Search::Table table;
    const Search search(p.encoder, table);
    const Place place(p);
    float t[kRowsPerThread][8];
    merge_tile(p, place, shared, t);
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        const float absmax = stored_absmax(largest_of_lanes(magnitude(t[i]), 1u << (p.output.block_shift - 3)));
        const uint32_t codes = encode_block(search, p.encoder, absmax, t[i]);
        if (place.row + i >= p.rows || place.column >= p.columns) continue;
        const uint64_t first = uint64_t(place.row + i) * p.columns + place.column;
        __stcs(reinterpret_cast<uint32_t*>(p.output.packed + first / 2), codes);
        if ((first & ((1u << p.output.block_shift) - 1)) == 0) p.output.absmax[first >> p.output.block_shift] = absmax;
    }
}

template <typename T>
__device__ __forceinline__ void to_dense(const Params& p) {
    __shared__ DeltaTile::Shared shared;
    const Place place(p);
    float t[kRowsPerThread][8];
    merge_tile(p, place, shared, t);
    const int count = place.column < p.columns ? int(min(p.columns - place.column, 8u)) : 0;
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        if (place.row + i >= p.rows) break;
        T* out = static_cast<T*>(p.dense) + uint64_t(place.row + i) * p.columns + place.column;
        Eight<T> eight;
        eight.round(t[i]);
        if (p.vectors && count == 8)
            eight.store(out);
        else
            eight.store_part(out, count);
    }
}

// The delta of one element.
template <typename T>
__device__ __forceinline__ float delta_at(const Delta& adapter, uint64_t columns, uint64_t row, uint64_t column) {
    const T* a = static_cast<const T*>(adapter.a) + column;
    const T* b = static_cast<const T*>(adapter.b) + row * adapter.rank;
    float delta = 0.0f;
#pragma unroll 4
    for (uint32_t r = 0; r < adapter.rank; ++r) delta = __fmaf_rn(to_f32(b[r]), to_f32(a[r * columns]), delta);
    return delta;
}

__device__ __forceinline__ float delta_at(const Deltas& deltas, uint32_t number, uint64_t columns, uint64_t row, uint64_t column) {
    switch (deltas.dtype) {
        case kF32: return delta_at<float>(deltas.item[number], columns, row, column);
        case kF16: return delta_at<f16>(deltas.item[number], columns, row, column);
        default: return delta_at<bf16>(deltas.item[number], columns, row, column);
    }
}

extern "C" __global__ void __launch_bounds__(kFlatThreads) nf4_merge_flat(const __grid_constant__ Params p) {
    __shared__ FlatEncoder::Shared maxima;
    CountingSearch::Table none;
    const FlatEncoder encoder(p.output, p.encoder, maxima, uint64_t(blockIdx.x) * kFlatTile);
    float t[kFlatChunks][8] = {};
#pragma unroll
    for (uint32_t c = 0; c < kFlatChunks; ++c)
#pragma unroll 1
        for (uint32_t j = 0; j < 8; ++j) {
            const uint64_t at = encoder.position() + c * kFlatChunk + j;
            float x = 0.0f;
            if (at < p.output.numel) {
                const uint64_t row = at / p.columns, column = at % p.columns;
                x = p.weight[at];
                for (uint32_t i = 0; i < p.deltas.count; ++i)
                    x = __fmaf_rn(p.deltas.item[i].scaling, delta_at(p.deltas, i, p.columns, row, column), x);
                if (p.row_scale) x = __fmul_rn(p.row_scale[row], x);
            }
#pragma unroll
            for (uint32_t k = 0; k < 8; ++k)  // t[c][j] = x, in registers
                if (k == j) t[c][k] = x;
        }
    float largest[kFlatChunks] = {magnitude(t[0]), magnitude(t[1])};
    encoder.store<false>(CountingSearch(p.encoder, none), t, largest);
}

#define TO_NF4(SEARCH, NAME)                                                                               \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 2) NAME(const __grid_constant__ Params p) { \
        to_nf4<SEARCH>(p);                                                                                 \
    }
#define TO_DENSE(T, NAME)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 2) NAME(const __grid_constant__ Params p) { \
        to_dense<T>(p);                                                                                    \
    }

TO_NF4(BinnedSearch, nf4_merge_tiled_binned)
TO_NF4(CountingSearch, nf4_merge_tiled_counting)
TO_DENSE(float, nf4_merge_f32)
TO_DENSE(f16, nf4_merge_f16)
TO_DENSE(bf16, nf4_merge_bf16)
