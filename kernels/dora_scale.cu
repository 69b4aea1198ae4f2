// DoRA's factor per output: magnitude / || w + sum of scaling * delta ||, the norm over the inputs. Two launches.
//
// dora_scale_sum_W squares and adds a piece of 1024 columns of 64 rows: thread (y, x) holds columns 8x..8x+7 of each of the
// piece's tiles and adds them in ascending order; neighbouring x are added until one is left. dora_scale_finish adds the
// pieces in ascending order. So the bits depend on nothing but the row.
#include "delta.cuh"
#include "dense_rows.cuh"
#include "nf4_rows.cuh"

struct Params {
    const void* dense;       // T [rows, columns], of dora_scale_sum_T
    Nf4Weight weight;        // [rows, columns], of dora_scale_sum_nf4
    const float* magnitude;  // [rows]
    float* sums;             // [pieces, rows]: between the launches
    float* row_scale;        // [rows]
    uint32_t rows, columns;
    uint32_t pieces;   // of 1024 columns
    uint32_t vectors;  // rows of `dense` begin at multiples of 16 bytes
    Deltas deltas;
};
static_assert(sizeof(Params) == 376, "the Rust twin has this size");

constexpr uint32_t kPiece = 1024;

template <typename Rows>
__device__ __forceinline__ void sum(const Params& p, Rows& weight) {
    __shared__ DeltaTile::Shared shared;
    const Matrix matrix{p.rows, p.columns, false};
    const uint32_t piece = blockIdx.x % p.pieces, tile_row = blockIdx.x / p.pieces * kTileRows;
    const uint32_t row = tile_row + threadIdx.x / 16 * kRowsPerThread, x = threadIdx.x % 16;
    float sums[kRowsPerThread] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (uint32_t tile_column = piece * kPiece; tile_column < min((piece + 1) * kPiece, p.columns); tile_column += kTileColumns) {
        const uint32_t column = tile_column + x * 8;
        weight.fetch(matrix, row, column);
        const DeltaTile tile(shared, p.deltas, matrix, tile_row, tile_column);
        tile.begin(0);
        float t[kRowsPerThread][8];
        weight.decode(matrix, row, column, t);
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
        for (uint32_t i = 0; i < kRowsPerThread; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 8; ++j) sums[i] = __fmaf_rn(t[i][j], t[i][j], sums[i]);
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
        for (int step = 1; step < 16; step *= 2) sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(0xffffffffu, sums[i], step));
        if (x == 0 && row + i < p.rows) p.sums[uint64_t(piece) * p.rows + row + i] = sums[i];
    }
}

template <typename T>
__device__ __forceinline__ void sum_dense(const Params& p) {
    DenseRows<T> weight(p.dense, p.vectors);
    sum(p, weight);
}

#define ENTRY(T, NAME)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 2) NAME(const __grid_constant__ Params p) { \
        sum_dense<T>(p);                                                                                   \
    }

ENTRY(float, dora_scale_sum_f32)
ENTRY(f16, dora_scale_sum_f16)
ENTRY(bf16, dora_scale_sum_bf16)

extern "C" __global__ void __launch_bounds__(kTileThreads, 2) dora_scale_sum_nf4(const __grid_constant__ Params p) {
    Nf4Rows weight(p.weight);
    sum(p, weight);
}

extern "C" __global__ void __launch_bounds__(256) dora_scale_finish(const __grid_constant__ Params p) {
    const uint32_t row = blockIdx.x * 256 + threadIdx.x;
    if (row >= p.rows) return;
    float sum = p.sums[row];
    for (uint32_t piece = 1; piece < p.pieces; ++piece) sum = __fadd_rn(sum, p.sums[uint64_t(piece) * p.rows + row]);
    p.row_scale[row] = __fdiv_rn(p.magnitude[row], __fsqrt_rn(sum));
}
