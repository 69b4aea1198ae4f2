// Vectors of elements, widened to f32.
#pragma once

#include <cstdint>

#include "dtype.cuh"

// Loads `N` elements in pieces of 16 bytes (or one smaller piece); `pointer` is aligned to those.
template <typename T, int N>
__device__ __forceinline__ void load_vector(const T* pointer, float (&values)[N]) {
    constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    constexpr int kStep = kBytes / sizeof(T);
    struct alignas(kBytes) Piece {
        T elements[kStep];
    };
#pragma unroll
    for (int i = 0; i < N; i += kStep) {
        const Piece piece = *reinterpret_cast<const Piece*>(pointer + i);
#pragma unroll
        for (int j = 0; j < kStep; ++j) values[i + j] = to_f32(piece.elements[j]);
    }
}

// Loads elements `first`, first + 1, ... of a row of `length`, and zero from its end on. One vector where the row's
// length keeps all of them aligned, else one element at a time.
template <typename T, int N>
__device__ __forceinline__ void load_padded(const T* row, uint32_t first, uint32_t length, float (&values)[N]) {
    if (length % N == 0) {
        if (first < length) return load_vector(row + first, values);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = first + i < length ? to_f32(row[first + i]) : 0.0f;
}
