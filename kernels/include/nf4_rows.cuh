// Pieces of neighbouring rows of a 4-bit matrix: what a thread of a 64 x 128 tile (see delta.cuh) holds.
//
// Rows whose length is a multiple of eight make every piece four bytes of one block: fetch() requests them and the absmax,
// decode() waits. Other lengths are read element by element.
#pragma once

#include <cstdint>

#include "delta.cuh"
#include "nf4.cuh"

class Nf4Rows {
  public:
    __device__ __forceinline__ explicit Nf4Rows(const Nf4Weight& weight) : weight(weight), decoder(weight.codebook) {}

    __device__ __forceinline__ void fetch(const Matrix& matrix, uint32_t row, uint32_t column) {
        if (matrix.columns % 8) return;
        uint64_t block[kRowsPerThread];
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i) {
            const bool exists = row + i < matrix.rows && column < matrix.columns;
            const uint64_t first = exists ? uint64_t(row + i) * matrix.columns + column : 0;
            codes[i] = __ldcs(reinterpret_cast<const uint32_t*>(weight.packed + first / 2));
            block[i] = first >> weight.block_shift;
        }
        weight.absmax.load(block, absmax);
    }

    // What lies outside the matrix is zero. All lanes of the warp must come here.
    __device__ __forceinline__ void decode(const Matrix& matrix, uint32_t row, uint32_t column, float (&w)[kRowsPerThread][8]) const {
        if (matrix.columns % 8) return decode_elements(matrix, row, column, w);
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; ++i) {
            decoder.decode(codes[i], absmax[i], w[i]);
            round_to(weight.dtype, w[i]);
            if (row + i < matrix.rows && column < matrix.columns) continue;
#pragma unroll
            for (uint32_t j = 0; j < 8; ++j) w[i][j] = 0.0f;
        }
    }

  private:
    const Nf4Weight& weight;
    const WarpDecoder decoder;
    uint32_t codes[kRowsPerThread];
    float absmax[kRowsPerThread];

    __device__ __forceinline__ void decode_elements(const Matrix& matrix, uint32_t row, uint32_t column, float (&w)[kRowsPerThread][8]) const {
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread * 8; ++i) w[i / 8][i % 8] = 0.0f;
#pragma unroll 1
        for (uint32_t i = 0; i < kRowsPerThread * 8; ++i) {
            if (row + i / 8 >= matrix.rows || column + i % 8 >= matrix.columns) continue;
            const float x = weight[uint64_t(row + i / 8) * matrix.columns + column + i % 8];
#pragma unroll
            for (uint32_t k = 0; k < kRowsPerThread * 8; ++k)  // w[i / 8][i % 8] = x, in registers
                if (k == i) w[k / 8][k % 8] = x;
        }
    }
};
