// Sums over the lanes of a warp, in an order that depends on the lanes alone.
#pragma once

#include <cstdint>

constexpr uint32_t kAllLanes = 0xffffffffu;

// Sums each of `Values` (a power of two up to 32) over the warp; lane i returns the total of value i / (32 / Values).
// Every value is summed by the same tree (lanes 16, 8, 4, 2, 1 apart), whatever `Values` is.
template <int Values, int Distance = 16>
__device__ __forceinline__ float warp_sums(const float (&values)[Values], uint32_t lane) {
    if constexpr (Values == 1) {
        float sum = values[0];
#pragma unroll
        for (int d = Distance; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
        return sum;
    } else {
        const bool upper = lane & Distance;
        float half[Values / 2];
#pragma unroll
        for (int i = 0; i < Values / 2; ++i) {
            const float given = upper ? values[i] : values[i + Values / 2];
            const float kept = upper ? values[i + Values / 2] : values[i];
            half[i] = kept + __shfl_xor_sync(kAllLanes, given, Distance);
        }
        return warp_sums<Values / 2, Distance / 2>(half, lane);
    }
}
