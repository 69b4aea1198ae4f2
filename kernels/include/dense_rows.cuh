// Pieces of neighbouring rows of a dense matrix: what a thread of a 64 x 128 tile (see delta.cuh) holds. The interface is that of
// Nf4Rows; rows can also be fetched one by one.
#pragma once

#include <cstdint>

#include "delta.cuh"

template <typename T>
struct DenseRows {
    const T* elements;
    uint32_t vectors;  // rows begin at multiples of 16 bytes
    Eight<T> stored[kRowsPerThread];

    __device__ __forceinline__ DenseRows(const void* elements, uint32_t vectors) : elements(static_cast<const T*>(elements)), vectors(vectors) {}

    __device__ __forceinline__ void fetch_row(const Matrix& matrix, uint32_t row, uint32_t column, uint32_t i) {
        const int count = column < matrix.columns ? int(min(matrix.columns - column, 8u)) : 0;
        const T* w = elements + uint64_t(row + i) * matrix.columns + column;
        if (vectors && count == 8 && row + i < matrix.rows)
            stored[i].load(w);
        else
            stored[i].load_part(w, row + i < matrix.rows ? count : 0);
    }
    __device__ __forceinline__ void fetch(const Matrix& matrix, uint32_t row, uint32_t column) {
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i) fetch_row(matrix, row, column, i);
    }
    __device__ __forceinline__ void decode(const Matrix&, uint32_t, uint32_t, float (&w)[kRowsPerThread][8]) const {
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i) stored[i].widen(w[i]);
    }
};
