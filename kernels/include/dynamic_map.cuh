// Numbers in 8 bits: indexes of a map of 256 ascending values, in blocks of 256 with a scale.
#pragma once

#include <cstdint>

#include "encode.cuh"

// The index of the map's value that is nearest to x; halfway between two of them, the even one.
__device__ __forceinline__ uint32_t nearest(const float* map, float x) {
    uint32_t below = 0;  // the last index but 255 whose value is below x, or 0
#pragma unroll
    for (uint32_t step = 128; step > 0; step /= 2)
        if (below + step < 255 && map[below + step] < x) below += step;
    const float middle = __fmul_rn(__fadd_rn(map[below], map[below + 1]), 0.5f);
    return below + (x > middle || (x == middle && below % 2 == 1));
}

// Encodes a block, of which each lane of the warp has eight elements, and returns its scale; the lane's codes are `q`.
__device__ __forceinline__ float encode_dynamic(const float* map, float (&x)[8], uint32_t (&q)[2]) {
    const float absmax = stored_absmax(largest_of_lanes(magnitude(x), 32));
    if (absmax > 0.0f) {
        normalize(absmax, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], 0.0f);  // zeros, but NaN stays
    }
    q[0] = q[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i / 4] |= nearest(map, x[i]) << (i % 4 * 8);
    return absmax;
}
