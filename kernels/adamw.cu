// A step of AdamW for all tensors of a model in one launch, and the norm of all gradients before it.
//
// A block takes 2048 neighbouring elements of one tensor, a warp 256: a block of 8-bit moments. A lane has four of either half of
// these, so that a warp's accesses fill whole sectors whatever the type. Every operation is rounded as the reference's is, so the
// bits are the same. The norm's squares are f64: a lane adds its eight in their order, then neighbouring lanes are added, then
// warps, and `adamw_norm_finish` adds blocks and tensors, all in an order that depends on the sizes alone.

#include "dtype.cuh"
#include "dynamic_map.cuh"
#include "reduce.cuh"

// One tensor, as the host wrote it.
struct Tensor {
    void* parameter;        // of `dtype`
    const float* gradient;
    void* m;                // f32, or codes
    void* v;
    float* m_absmax;        // of codes
    float* v_absmax;
    uint64_t count;
    uint32_t first_block;   // of all tensors' blocks
    uint32_t dtype;
};
static_assert(sizeof(Tensor) == 64, "the Rust twin has this size");

// What is known of all gradients.
struct Status {
    float norm;
    float scale;         // what gradients are multiplied by
    int32_t not_finite;  // the first tensor with an element that is not finite, or -1
    uint32_t padding;
};

struct Params {
    const float* maps;      // [2, 256]: of codes of m, of v
    const Tensor* tensors;  // [count]
    double* squares;        // [blocks, then count]
    Status* status;         // null: gradients are taken as they are
    uint32_t count;
    uint32_t blocks;
    float max_norm;
    uint32_t skip;          // the step is left out when a gradient is not finite
    float first[2], second[2];  // of each moment: beta, 1 - beta
    float decay, step_size, correction, epsilon;
};
static_assert(sizeof(Params) == 80, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kTile = kThreads * 8, kMoments = 256, kHalf = kMoments / 2;

// The tensor that a block belongs to.
__device__ __forceinline__ uint32_t tensor_of(const Params& p, uint32_t block) {
    uint32_t below = 0, end = p.count;
    while (end - below > 1) {
        const uint32_t middle = (below + end) / 2;
        if (p.tensors[middle].first_block <= block) below = middle; else end = middle;
    }
    return below;
}

// The thread's elements: `count[h]` of four, from `first` on and from 128 elements behind.
struct Place {
    uint64_t first;
    int count[2];
    __device__ __forceinline__ explicit Place(const Tensor& tensor) {
        first = uint64_t(blockIdx.x - tensor.first_block) * kTile + threadIdx.x / 32 * kMoments + threadIdx.x % 32 * 4;
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
            const uint64_t at = first + h * kHalf;
            count[h] = at < tensor.count ? int(min(tensor.count - at, uint64_t(4))) : 0;
        }
    }
};

// Four neighbouring elements as stored.
template <typename T>
struct alignas(4 * sizeof(T)) Four { T value[4]; };

// Zero where there is none.
template <typename T>
__device__ __forceinline__ void load(const void* tensor, const Place& place, float (&x)[8]) {
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
        const T* from = static_cast<const T*>(tensor) + place.first + h * kHalf;
        Four<T> four = {};
        if (place.count[h] == 4) {
            four = *reinterpret_cast<const Four<T>*>(from);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < place.count[h]) four.value[i] = from[i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * h + i] = to_f32(four.value[i]);
    }
}
template <typename T>
__device__ __forceinline__ void store(void* tensor, const Place& place, const float (&x)[8]) {
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
        T* to = static_cast<T*>(tensor) + place.first + h * kHalf;
        Four<T> four;
#pragma unroll
        for (int i = 0; i < 4; ++i) four.value[i] = from_f32<T>(x[4 * h + i]);
        if (place.count[h] == 4) {
            *reinterpret_cast<Four<T>*>(to) = four;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < place.count[h]) to[i] = four.value[i];
        }
    }
}

__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

extern "C" __global__ void __launch_bounds__(kThreads) adamw_norm_sum(const __grid_constant__ Params p) {
    __shared__ double sums[kWarps];
    const Tensor tensor = p.tensors[tensor_of(p, blockIdx.x)];
    const Place place(tensor);
    float g[8];
    load<float>(tensor.gradient, place, g);
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __dadd_rn(sum, __dmul_rn(double(g[i]), double(g[i])));
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t warp = 1; warp < kWarps; ++warp) sum += sums[warp];
    p.squares[blockIdx.x] = sum;
}

// One block: a warp adds the blocks of a tensor, a lane every 32nd; then one warp adds the tensors.
extern "C" __global__ void __launch_bounds__(1024) adamw_norm_finish(const __grid_constant__ Params p) {
    const uint32_t lane = threadIdx.x % 32;
    double* of_tensors = p.squares + p.blocks;
#pragma unroll 1
    for (uint32_t i = threadIdx.x / 32; i < p.count; i += 32) {
        const uint32_t end = i + 1 < p.count ? p.tensors[i + 1].first_block : p.blocks;
        double sum = 0.0;
        for (uint32_t block = p.tensors[i].first_block + lane; block < end; block += 32) sum += p.squares[block];
        sum = sum_of_warp(sum);
        if (lane == 0) of_tensors[i] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    double sum = 0.0;
    uint32_t broken = ~0u;
    for (uint32_t i = lane; i < p.count; i += 32) {
        sum += of_tensors[i];
        if (broken == ~0u && !isfinite(of_tensors[i])) broken = i;
    }
    sum = sum_of_warp(sum);
    broken = __reduce_min_sync(kAllLanes, broken);
    if (lane != 0) return;
    const float norm = float(sqrt(sum));
    // Of what is not a number, as of the reference, the smaller is 1.
    const float scale = fminf(__fdiv_rn(p.max_norm, __fadd_rn(norm, 1e-6f)), 1.0f);
    *p.status = Status{norm, scale, int32_t(broken), 0};
}

// 8-bit moments of a lane.
__device__ __forceinline__ void decode_moments(const float* map, const void* tensor, float absmax, const Place& place, float (&x)[8]) {
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
        const uint8_t* codes = static_cast<const uint8_t*>(tensor) + place.first + h * kHalf;
        uint32_t word = 0;
        if (place.count[h] == 4) {
            word = *reinterpret_cast<const uint32_t*>(codes);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < place.count[h]) word |= uint32_t(codes[i]) << (i * 8);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * h + i] = i < place.count[h] ? __fmul_rn(map[word >> (i * 8) & 255], absmax) : 0.0f;
    }
}
__device__ __forceinline__ void encode_moments(const float* map, void* tensor, float* absmax, const Place& place, float (&x)[8]) {
    uint32_t q[2];
    const float scale = encode_dynamic(map, x, q);
    if (threadIdx.x % 32 == 0) *absmax = scale;
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
        uint8_t* codes = static_cast<uint8_t*>(tensor) + place.first + h * kHalf;
        if (place.count[h] == 4) {
            *reinterpret_cast<uint32_t*>(codes) = q[h];
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < place.count[h]) codes[i] = uint8_t(q[h] >> (i * 8));
        }
    }
}

template <bool Blockwise>
__device__ __forceinline__ void adamw(const Params& p) {
    __shared__ float maps[Blockwise ? 512 : 1];
    if constexpr (Blockwise) {
        maps[threadIdx.x] = p.maps[threadIdx.x], maps[256 + threadIdx.x] = p.maps[256 + threadIdx.x];
        __syncthreads();
    }
    float scale = 1.0f;
    if (p.status != nullptr) {
        if (p.skip && p.status->not_finite >= 0) return;
        scale = p.status->scale;
    }
    const Tensor tensor = p.tensors[tensor_of(p, blockIdx.x)];
    const Place place(tensor);
    const uint64_t block = place.first / kMoments;
    if (block * kMoments >= tensor.count) return;  // whole warps
    float w[8], g[8], m[8], v[8];
    switch (tensor.dtype) {
        case kF32: load<float>(tensor.parameter, place, w); break;
        case kF16: load<f16>(tensor.parameter, place, w); break;
        default: load<bf16>(tensor.parameter, place, w); break;
    }
    load<float>(tensor.gradient, place, g);
    if constexpr (Blockwise) {
        decode_moments(maps, tensor.m, tensor.m_absmax[block], place, m);
        decode_moments(maps + 256, tensor.v, tensor.v_absmax[block], place, v);
    } else {
        load<float>(tensor.m, place, m);
        load<float>(tensor.v, place, v);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float x = __fmul_rn(scale, g[i]);
        m[i] = __fadd_rn(__fmul_rn(p.first[0], m[i]), __fmul_rn(p.first[1], x));
        v[i] = __fadd_rn(__fmul_rn(p.second[0], v[i]), __fmul_rn(__fmul_rn(p.second[1], x), x));
        const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v[i]), p.correction), p.epsilon);
        w[i] = __fsub_rn(__fmul_rn(p.decay, w[i]), __fmul_rn(p.step_size, __fdiv_rn(m[i], root)));
    }
    switch (tensor.dtype) {
        case kF32: store<float>(tensor.parameter, place, w); break;
        case kF16: store<f16>(tensor.parameter, place, w); break;
        default: store<bf16>(tensor.parameter, place, w); break;
    }
    if constexpr (Blockwise) {
        encode_moments(maps, tensor.m, tensor.m_absmax + block, place, m);
        encode_moments(maps + 256, tensor.v, tensor.v_absmax + block, place, v);
    } else {
        store<float>(tensor.m, place, m);
        store<float>(tensor.v, place, v);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) adamw_f32(const __grid_constant__ Params p) { adamw<false>(p); }
extern "C" __global__ void __launch_bounds__(kThreads, 4) adamw_8bit(const __grid_constant__ Params p) { adamw<true>(p); }
