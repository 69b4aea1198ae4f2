// The delta of a low-rank adapter on a tile of a weight matrix: sum over r of lora_b[n, r] * lora_a[r, k], one fused
// multiply-add chain per element, r ascending from 0, in f32.
//
// A block of 256 threads covers 64 x 128 elements. Thread (y, x) = (thread / 16, thread % 16) holds rows 4y..4y+3 and
// columns 8x..8x+7 of the tile: 16 bytes of every row for the 16-bit types. Slices of 16 ranks are staged in shared memory
// as f32, whatever the adapter's type.
#pragma once

#include <cstdint>

#include "dtype.cuh"

struct Delta {
    const void* a;  // [rank, in]
    const void* b;  // [out, rank]
    uint32_t rank;  // not 0
    float scaling;
};

// The adapters of one launch. Twin: cuda::deltas::Deltas.
struct Deltas {
    static constexpr uint32_t kMax = 8;
    Delta item[kMax];
    uint32_t count;
    uint32_t dtype;  // of a and b
};
static_assert(sizeof(Deltas) == 200, "the Rust twin has this size");

// The shape of a stored weight: [out, in], or [in, out] if transposed (fan_in_fan_out).
struct Matrix {
    uint32_t rows, columns;
    bool transposed;
};

constexpr uint32_t kTileRows = 64, kTileColumns = 128, kTileThreads = 256, kRowsPerThread = 4;

// Use: begin() stages the first ranks, compute(0, ...), compute(1, ...) ... do the rest; after begin() the block may wait
// for its weights. All threads of the block take part.
class DeltaTile {
    // A slice of ranks. Pitches and the place of columns are such that a warp's 16-byte reads meet no bank conflict, and
    // its stores at most two to a bank.
    static constexpr uint32_t kDepth = 16, kLeftPitch = kTileRows + 4, kRightPitch = 148, kRightHalf = 80;

  public:
    struct alignas(16) Shared {
        float left[kDepth][kLeftPitch];    // [r][row]
        float right[kDepth][kRightPitch];  // [r][place(column)]
    };

    __device__ __forceinline__ DeltaTile(Shared& shared, const Deltas& deltas, const Matrix& matrix, uint32_t row, uint32_t column)
        : shared(shared), deltas(deltas), matrix(matrix), row(row), column(column) {}

    __device__ __forceinline__ void begin(uint32_t number) const {
        if (number < deltas.count) stage(number, 0);
    }

    // The delta of adapter `number`. Then comes `next`, or none if there is no such adapter.
    __device__ __forceinline__ void compute(uint32_t number, uint32_t next, float (&delta)[kRowsPerThread][8]) const {
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread * 8; ++i) delta[i / 8][i % 8] = 0.0f;
        const uint32_t rank = deltas.item[number].rank;
#pragma unroll 1
        for (uint32_t first = 0; first < rank; first += kDepth) {
            __syncthreads();  // the slice is there
            const uint32_t depth = min(rank - first, kDepth);
#pragma unroll 4
            for (uint32_t r = 0; r < depth; ++r) multiply(r, delta);
            __syncthreads();  // and has been read
            const bool more = first + kDepth < rank;
            if (more || next < deltas.count) stage(more ? number : next, more ? first + kDepth : 0);
        }
    }

  private:
    Shared& shared;
    const Deltas& deltas;
    const Matrix& matrix;
    const uint32_t row, column;  // of the tile's first element

    // Columns 8x..8x+3 of all x come first, then columns 8x+4..8x+7 of all x.
    static __device__ __forceinline__ uint32_t place(uint32_t column) {
        return column / 8 * 4 + column % 4 + (column & 4 ? kRightHalf : 0);
    }

    // Stages the ranks of one adapter from `first` on.
    __device__ __forceinline__ void stage(uint32_t number, uint32_t first) const {
        const Delta& adapter = deltas.item[number];
        switch (deltas.dtype) {
            case kF32: return stage_as<float>(adapter, first);
            case kF16: return stage_as<f16>(adapter, first);
            default: return stage_as<bf16>(adapter, first);
        }
    }

    // The left factor's rows are the weight's rows, the right one's columns its columns.
    template <typename T>
    __device__ __forceinline__ void stage_as(const Delta& adapter, uint32_t first) const {
        const uint64_t rank = adapter.rank, in = matrix.transposed ? matrix.rows : matrix.columns;
        const uint32_t depth = min(adapter.rank - first, kDepth), rows = matrix.rows - row, columns = matrix.columns - column;
        const T* a = static_cast<const T*>(adapter.a) + first * in + (matrix.transposed ? row : column);
        const T* b = static_cast<const T*>(adapter.b) + (matrix.transposed ? column : row) * rank + first;
        const auto left = [&](uint32_t r, uint32_t i, float x) { shared.left[r][i] = x; };
        const auto right = [&](uint32_t r, uint32_t i, float x) { shared.right[r][place(i)] = x; };
        if (matrix.transposed) {
            stage_along<kTileRows>(a, in, depth, rows, left);
            stage_across<kTileColumns>(b, rank, depth, columns, right);
        } else {
            stage_across<kTileRows>(b, rank, depth, rows, left);
            stage_along<kTileColumns>(a, in, depth, columns, right);
        }
    }

    // Element (r, i) lies at r * step + i: lanes run along i. What lies outside the matrix is zero.
    template <uint32_t Width, typename T, typename Store>
    static __device__ __forceinline__ void stage_along(const T* factor, uint64_t step, uint32_t depth, uint32_t limit, const Store& store) {
        const uint32_t i = threadIdx.x % Width, first = threadIdx.x / Width;
        factor += first * step + i;
#pragma unroll
        for (uint32_t r = 0; r < kDepth; r += kTileThreads / Width, factor += step * (kTileThreads / Width))
            if (first + r < depth) store(first + r, i, i < limit ? to_f32(*factor) : 0.0f);
    }

    // Element (r, i) lies at r + i * step: lanes run along r.
    template <uint32_t Width, typename T, typename Store>
    static __device__ __forceinline__ void stage_across(const T* factor, uint64_t step, uint32_t depth, uint32_t limit, const Store& store) {
        const uint32_t r = threadIdx.x % kDepth, first = threadIdx.x / kDepth;
        if (r >= depth) return;
        factor += r + first * step;
#pragma unroll
        for (uint32_t i = 0; i < Width; i += kTileThreads / kDepth, factor += step * (kTileThreads / kDepth))
            store(r, first + i, first + i < limit ? to_f32(*factor) : 0.0f);
    }

    __device__ __forceinline__ void multiply(uint32_t r, float (&delta)[kRowsPerThread][8]) const {
        const uint32_t x = threadIdx.x % 16, y = threadIdx.x / 16;
        const float4 left = *reinterpret_cast<const float4*>(&shared.left[r][4 * y]);
        const float4 low = *reinterpret_cast<const float4*>(&shared.right[r][4 * x]);
        const float4 high = *reinterpret_cast<const float4*>(&shared.right[r][kRightHalf + 4 * x]);
        const float by_row[kRowsPerThread] = {left.x, left.y, left.z, left.w};
        const float by_column[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < int(kRowsPerThread); ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) delta[i][j] = __fmaf_rn(by_row[i], by_column[j], delta[i][j]);
    }
};

// Multiplies (or divides) a thread's elements by their outputs' scales.
template <bool Divide>
__device__ __forceinline__ void scale_outputs(const float* row_scale, const Matrix& matrix, uint32_t row, uint32_t column, float (&t)[kRowsPerThread][8]) {
    const uint32_t first = matrix.transposed ? column : row, outputs = matrix.transposed ? matrix.columns : matrix.rows;
    float scales[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) scales[i] = first + i < outputs ? row_scale[first + i] : 1.0f;
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; ++i)
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) {
            const float its = matrix.transposed ? scales[j] : scales[i];
            t[i][j] = Divide ? __fdiv_rn(t[i][j], its) : __fmul_rn(its, t[i][j]);
        }
}
