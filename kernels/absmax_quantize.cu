// Double quantisation: the absmax of a 4-bit matrix to 8 bit. Two launches; the second needs the first one's sums.
//
// offset = mean of all absmax. Blocks of 256 absmax, less the offset, are divided by their largest magnitude and take the
// index of the nearest value of `map`. The mean's sum is f64 in a fixed order, so that its bits depend on the values alone:
// lane j of 65536 adds values j, j + 65536, ... in turn; then neighbouring lanes are added until one is left.
#include "dynamic_map.cuh"
#include "dtype.cuh"

struct Params {
    const float* absmax;  // [count]
    const float* map;     // [256], ascending
    double* sums;         // [sum_blocks]: between the launches
    uint8_t* q;           // [count]
    float* nested;        // [ceil(count / 256)]
    float* offset;        // [1]
    uint64_t count;
    uint32_t sum_blocks;  // at most 64, a lane of `sums` each; blocks of the first launch
    uint32_t padding;
};
static_assert(sizeof(Params) == 64, "the Rust twin has this size");

constexpr uint32_t kLanes = 65536, kSumThreads = 1024, kSumBlocks = kLanes / kSumThreads;
constexpr uint32_t kThreads = 256, kNested = 256;
static_assert(kSumBlocks == 64, "one warp adds them, two per lane");

// The sum of a warp's values: neighbours first.
__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

extern "C" __global__ void __launch_bounds__(kSumThreads) absmax_quantize_sum(const __grid_constant__ Params p) {
    __shared__ double sums[kSumThreads / 32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double sum = 0.0;
#pragma unroll 4
    for (uint64_t i = uint64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < p.count; i += kLanes) sum += double(__ldg(p.absmax + i));
    sum = sum_of_warp(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (warp != 0) return;
    sum = sum_of_warp(sums[lane]);
    if (lane == 0) p.sums[blockIdx.x] = sum;
}

// A warp takes one nested block, eight absmax per lane.
extern "C" __global__ void __launch_bounds__(kThreads) absmax_quantize_encode(const __grid_constant__ Params p) {
    __shared__ float map[256];
    const uint32_t lane = threadIdx.x % 32;
    map[threadIdx.x] = p.map[threadIdx.x];
    __syncthreads();

    double sum = 2 * lane < p.sum_blocks ? p.sums[2 * lane] : 0.0;
    sum += 2 * lane + 1 < p.sum_blocks ? p.sums[2 * lane + 1] : 0.0;
    const float offset = float(sum_of_warp(sum) / double(max(p.count, uint64_t(1))));
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.offset = offset;

    const uint64_t block = uint64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, first = block * kNested + lane * 8;
    if (block * kNested >= p.count) return;
    const int count = first < p.count ? int(min(p.count - first, uint64_t(8))) : 0;
    Eight<float> stored;
    if (count == 8 && aligned16(p.absmax))
        stored.load(p.absmax + first);
    else
        stored.load_part(p.absmax + first, count);
    float x[8];
    stored.widen(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < count ? __fsub_rn(x[i], offset) : 0.0f;

    uint32_t q[2];
    const float nested = encode_dynamic(map, x, q);
    if (lane == 0) p.nested[block] = nested;
    if (count == 8 && (reinterpret_cast<uint64_t>(p.q) & 7) == 0) {
        *reinterpret_cast<uint2*>(p.q + first) = make_uint2(q[0], q[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < count) p.q[first + i] = uint8_t(q[i / 4] >> (i % 4 * 8));
}
