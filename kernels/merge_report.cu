// What a merged weight W' has of the adapters that went into W. The sum before it was stored, t, is formed again as merge.cu and
// nf4_merge.cu form it; with the wanted change D = t - W and the realised one R = W' - W these are added, in f64:
//     <W, W>, <D, D>, <R, D>, <R - D, R - D>; and the elements (of 4-bit weights: codes) and bytes that D has changed
//
// merge_report_sum_V_W has W of type V and W' of type W. A block of threads adds a 64 x 128 tile: a thread its elements row by row,
// then lanes 16, 8, 4, 2, 1 apart, then warps in ascending order. merge_report_finish adds the tiles: thread i those numbered
// i, i + 256, ..., then as before. So the bits depend on nothing but the elements. Two launches.
#include "delta.cuh"
#include "dense_rows.cuh"
#include "nf4_rows.cuh"

// Twin: cuda::merge_report::Sums.
struct Sums {
    double weight, wanted, kept, error;
    uint64_t changed, changed_bytes;
};
static_assert(sizeof(Sums) == 48, "the Rust twin has this size");

struct Params {
    const void* dense;         // V [rows, columns]: W, unless it is 4-bit
    const void* merged_dense;  // W [rows, columns]: W', unless it is 4-bit
    Nf4Weight weight;          // W
    Nf4Weight merged;          // W'
    const float* row_scale;    // one per output, or null
    Sums* tiles;               // [tile_count]: between the launches
    Sums* total;
    uint32_t rows, columns;
    uint32_t transposed;      // W is [in, out]
    uint32_t vectors;         // rows of W begin at multiples of 16 bytes
    uint32_t merged_vectors;  // those of W'
    uint32_t column_tiles;
    uint32_t tile_count;
    uint32_t padding;
    Deltas deltas;
};
static_assert(sizeof(Params) == 528, "the Rust twin has this size");

// A bit for each byte that is not zero: the lowest of the byte.
__device__ __forceinline__ uint32_t bytes_of(uint32_t word) {
    word |= word >> 4;
    word |= word >> 2;
    return (word | word >> 1) & 0x01010101u;
}

// Adds up a thread's, or a block's, and passes it on.
struct Adder {
    Sums sums{};

    __device__ __forceinline__ void add(const Sums& other) {
        sums.weight += other.weight, sums.wanted += other.wanted, sums.kept += other.kept, sums.error += other.error;
        sums.changed += other.changed, sums.changed_bytes += other.changed_bytes;
    }

    __device__ __forceinline__ void add(float before, float wanted, float after) {
        const double w = before, t = wanted, m = after, d = t - w;
        sums.weight = __fma_rn(w, w, sums.weight);
        sums.wanted = __fma_rn(d, d, sums.wanted);
        sums.kept = __fma_rn(m - w, d, sums.kept);
        sums.error = __fma_rn(m - t, m - t, sums.error);
    }

    // Elements of a word that differ as `differ` says, of so many bits each.
    template <uint32_t Bits>
    __device__ __forceinline__ void count(uint32_t differ) {
        const uint32_t bytes = bytes_of(differ);
        sums.changed_bytes += __popc(bytes);
        if (Bits == 4) sums.changed += __popc((differ | differ >> 1 | differ >> 2 | differ >> 3) & 0x11111111u);
        if (Bits == 16) sums.changed += __popc((bytes | bytes >> 8) & 0x00010001u);
        if (Bits == 32) sums.changed += differ != 0;
    }

    // Adds all threads of the block, of which the first has the result.
    __device__ __forceinline__ void reduce(Sums (&of_warp)[kTileThreads / 32]) {
        across_lanes(sums.weight), across_lanes(sums.wanted), across_lanes(sums.kept), across_lanes(sums.error);
        across_lanes(sums.changed), across_lanes(sums.changed_bytes);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
        __syncthreads();
        if (threadIdx.x != 0) return;
#pragma unroll 1
        for (uint32_t warp = 1; warp < kTileThreads / 32; ++warp) add(of_warp[warp]);
    }

  private:
    template <typename Value>
    static __device__ __forceinline__ void across_lanes(Value& value) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    }
};

template <typename T>
__device__ __forceinline__ void count_words(Adder& adder, const Eight<T>& before, const Eight<T>& after) {
    adder.count<16>(before.raw.x ^ after.raw.x), adder.count<16>(before.raw.y ^ after.raw.y);
    adder.count<16>(before.raw.z ^ after.raw.z), adder.count<16>(before.raw.w ^ after.raw.w);
}

__device__ __forceinline__ void count_words(Adder& adder, const Eight<float>& before, const Eight<float>& after) {
    float x[8], y[8];
    before.widen(x), after.widen(y);
#pragma unroll
    for (int i = 0; i < 8; ++i) adder.count<32>(__float_as_uint(x[i]) ^ __float_as_uint(y[i]));
}

// What differs of the scale of the block that begins in a piece, and of what that scale depends on alone.
__device__ __forceinline__ void count_scale(Adder& adder, const Absmax& before, const Absmax& after, uint64_t block) {
    const auto words = [&](const float* x, const float* y, uint64_t i) {
        adder.sums.changed_bytes += __popc(bytes_of(__float_as_uint(__ldg(x + i)) ^ __float_as_uint(__ldg(y + i))));
    };
    if (before.plain) return words(before.plain, after.plain, block);
    adder.sums.changed_bytes += __ldg(before.q + block) != __ldg(after.q + block);
    if (block & ((1u << before.nested_shift) - 1)) return;
    words(before.nested, after.nested, block >> before.nested_shift);
    if (block == 0) words(before.offset, after.offset, 0);
}

__device__ __forceinline__ void count_codes(Adder& adder, const Params& p, const Matrix& matrix, uint32_t row, uint32_t column) {
    const uint64_t mask = (uint64_t(1) << p.weight.block_shift) - 1;
#pragma unroll 1
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        if (row + i >= matrix.rows || column >= matrix.columns) break;
        const uint64_t first = uint64_t(row + i) * matrix.columns + column, end = first + min(matrix.columns - column, 8u);
        if (matrix.columns % 8 == 0) {
            const uint32_t* before = reinterpret_cast<const uint32_t*>(p.weight.packed + first / 2);
            const uint32_t* after = reinterpret_cast<const uint32_t*>(p.merged.packed + first / 2);
            adder.count<4>(*before ^ *after);
        } else {
#pragma unroll 1
            for (uint64_t at = first; at < end; ++at) {
                const uint32_t differ = p.weight.packed[at / 2] ^ p.merged.packed[at / 2];
                adder.sums.changed += (differ >> (at % 2 ? 0 : 4) & 15) != 0;
                adder.sums.changed_bytes += at % 2 == 0 && differ != 0;
            }
        }
        const uint64_t begin = (first + mask) & ~mask;  // of a block: at most one begins in eight elements
        if (begin < end) count_scale(adder, p.weight.absmax, p.merged.absmax, begin >> p.weight.block_shift);
    }
}

// One row of W, as a thread that has them all looks at it.
__device__ __forceinline__ void add_row(Adder& adder, const float (&w)[8], const float (&t)[8], const float (&m)[8]) {
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) adder.add(w[j], t[j], m[j]);
}

// The elements of a dense merged weight, and what they would be without adapters.
template <typename T>
__device__ __forceinline__ void add_dense_row(Adder& adder, const float (&w)[8], const float (&t)[8], const Eight<T>& after) {
    float m[8];
    after.widen(m);
    add_row(adder, w, t, m);
    Eight<T> unadapted;
    unadapted.round(w);
    count_words(adder, unadapted, after);
}

// Row by row (__syncwarp keeps them apart), as there are no registers left to have more of W at once.
template <typename T>
__device__ __forceinline__ void compare(Adder& adder, const Params&, const Matrix& matrix, uint32_t row, uint32_t column, DenseRows<T>& before, DenseRows<T>& after, const float (&t)[kRowsPerThread][8]) {
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        __syncwarp();
        before.fetch_row(matrix, row, column, i);
        after.fetch_row(matrix, row, column, i);
        float w[8];
        before.stored[i].widen(w);
        add_dense_row(adder, w, t[i], after.stored[i]);
    }
}

template <typename T>
__device__ __forceinline__ void compare(Adder& adder, const Params&, const Matrix& matrix, uint32_t row, uint32_t column, Nf4Rows& before, DenseRows<T>& after, const float (&t)[kRowsPerThread][8]) {
    float w[kRowsPerThread][8];
    before.decode(matrix, row, column, w);
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) {
        __syncwarp();
        after.fetch_row(matrix, row, column, i);
        add_dense_row(adder, w[i], t[i], after.stored[i]);
    }
}

__device__ __forceinline__ void compare(Adder& adder, const Params& p, const Matrix& matrix, uint32_t row, uint32_t column, Nf4Rows& before, Nf4Rows& after, const float (&t)[kRowsPerThread][8]) {
    float w[kRowsPerThread][8], m[kRowsPerThread][8];
    after.fetch(matrix, row, column);
    before.decode(matrix, row, column, w);
    after.decode(matrix, row, column, m);
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i) add_row(adder, w[i], t[i], m[i]);
    count_codes(adder, p, matrix, row, column);
}

template <typename Before, typename After>
__device__ __forceinline__ void sum(const Params& p, Before before, After after) {
    __shared__ DeltaTile::Shared shared;
    __shared__ Sums of_warp[kTileThreads / 32];
    const Matrix matrix{p.rows, p.columns, p.transposed != 0};
    const uint32_t tile_row = blockIdx.x / p.column_tiles * kTileRows, tile_column = blockIdx.x % p.column_tiles * kTileColumns;
    const uint32_t row = tile_row + threadIdx.x / 16 * kRowsPerThread, column = tile_column + threadIdx.x % 16 * 8;
    before.fetch(matrix, row, column);
    const DeltaTile tile(shared, p.deltas, matrix, tile_row, tile_column);
    tile.begin(0);
    float t[kRowsPerThread][8];
    before.decode(matrix, row, column, t);
#pragma unroll 1
    for (uint32_t number = 0; number < p.deltas.count; ++number) {
        float delta[kRowsPerThread][8];
        tile.compute(number, number + 1, delta);
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i)
#pragma unroll
            for (uint32_t j = 0; j < 8; ++j) t[i][j] = __fmaf_rn(p.deltas.item[number].scaling, delta[i][j], t[i][j]);
    }
    if (p.row_scale) scale_outputs<false>(p.row_scale, matrix, row, column, t);

    Adder adder;
    compare(adder, p, matrix, row, column, before, after, t);
    adder.reduce(of_warp);
    if (threadIdx.x == 0) p.tiles[blockIdx.x] = adder.sums;
}

extern "C" __global__ void __launch_bounds__(kTileThreads) merge_report_finish(const __grid_constant__ Params p) {
    __shared__ Sums of_warp[kTileThreads / 32];
    Adder adder;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < p.tile_count; i += kTileThreads) adder.add(p.tiles[i]);
    adder.reduce(of_warp);
    if (threadIdx.x == 0) *p.total = adder.sums;
}

#define ENTRY(BEFORE, AFTER, NAME)                                                                      \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 1) NAME(const __grid_constant__ Params p) { \
        sum(p, BEFORE, AFTER);                                                                          \
    }

#define DENSE(T) DenseRows<T>(p.dense, p.vectors)
#define MERGED_DENSE(T) DenseRows<T>(p.merged_dense, p.merged_vectors)

ENTRY(DENSE(float), MERGED_DENSE(float), merge_report_sum_f32_f32)
ENTRY(DENSE(f16), MERGED_DENSE(f16), merge_report_sum_f16_f16)
ENTRY(DENSE(bf16), MERGED_DENSE(bf16), merge_report_sum_bf16_bf16)
ENTRY(Nf4Rows(p.weight), MERGED_DENSE(float), merge_report_sum_nf4_f32)
ENTRY(Nf4Rows(p.weight), MERGED_DENSE(f16), merge_report_sum_nf4_f16)
ENTRY(Nf4Rows(p.weight), MERGED_DENSE(bf16), merge_report_sum_nf4_bf16)
ENTRY(Nf4Rows(p.weight), Nf4Rows(p.merged), merge_report_sum_nf4_nf4)
