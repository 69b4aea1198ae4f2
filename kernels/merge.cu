// Adapters into a dense weight and out again, elementwise in f32 with one rounding at the end:
//     merge:   t = w; t = fma(scaling, delta, t) for every adapter; out = T(row_scale * t)
//     unmerge: t = w / row_scale; t = fma(-scaling, delta, t) for every adapter, the last first; out = T(t)
// Reads and writes every weight once; up to a rank of about 24 in all, that is the limit, and multiply-adds beyond.
#include "delta.cuh"
#include "dense_rows.cuh"

struct Params {
    const void* w;           // T [rows, columns]
    void* out;               // T [rows, columns]; may be w
    const float* row_scale;  // one per output, or null
    uint32_t rows, columns;
    uint32_t transposed;     // w is [in, out]: outputs are columns
    uint32_t unmerge;
    uint32_t vectors;        // rows of w and out begin at multiples of 16 bytes
    uint32_t column_tiles;
    Deltas deltas;
};
static_assert(sizeof(Params) == 248, "the Rust twin has this size");

template <typename T>
__device__ __forceinline__ void merge(const Params& p) {
    __shared__ DeltaTile::Shared shared;
    const Matrix matrix{p.rows, p.columns, p.transposed != 0};
    const uint32_t tile_row = blockIdx.x / p.column_tiles * kTileRows, tile_column = blockIdx.x % p.column_tiles * kTileColumns;
    const uint32_t row = tile_row + threadIdx.x / 16 * kRowsPerThread, column = tile_column + threadIdx.x % 16 * 8;
    const int count = column < p.columns ? int(min(p.columns - column, 8u)) : 0;
    const bool vectors = p.vectors && count == 8;
    const uint64_t first = uint64_t(row) * p.columns + column;

    DenseRows<T> weight(p.w, p.vectors);
    weight.fetch(matrix, row, column);

    const DeltaTile tile(shared, p.deltas, matrix, tile_row, tile_column);
    const uint32_t step = p.unmerge ? -1 : 1;  // after adapter 0 comes a number that is no adapter's
    uint32_t number = p.unmerge ? p.deltas.count - 1 : 0;
    tile.begin(number);
    float t[kRowsPerThread][8];
    weight.decode(matrix, row, column, t);
    if (p.unmerge && p.row_scale) scale_outputs<true>(p.row_scale, matrix, row, column, t);
#pragma unroll 1
    for (; number < p.deltas.count; number += step) {
        float delta[kRowsPerThread][8];
        tile.compute(number, number + step, delta);
        const float scaling = p.unmerge ? -p.deltas.item[number].scaling : p.deltas.item[number].scaling;
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 8; ++j) t[i][j] = __fmaf_rn(scaling, delta[i][j], t[i][j]);
    }
    if (!p.unmerge && p.row_scale) scale_outputs<false>(p.row_scale, matrix, row, column, t);

#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        if (row + i >= p.rows) break;
        T* out = static_cast<T*>(p.out) + first + uint64_t(i) * p.columns;
        weight.stored[i].round(t[i]);
        if (vectors)
            weight.stored[i].store(out);
        else
            weight.stored[i].store_part(out, count);
    }
}

#define ENTRY(T, NAME)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 2) NAME(const __grid_constant__ Params p) { \
        merge<T>(p);                                                                                       \
    }

ENTRY(float, merge_f32)
ENTRY(f16, merge_f16)
ENTRY(bf16, merge_bf16)
