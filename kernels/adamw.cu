// A step of AdamW for all tensors of a model in one launch, and the norm of all gradients before it.
//
// A block takes 2048 neighbouring elements of one tensor, a warp 256: a block of 8-bit moments, eight elements per lane. Every
// operation is rounded as the reference's is, so the bits are the same. The norm's squares are f64: a lane adds its eight in
// their order, then neighbouring lanes are added, then warps, and `adamw_norm_finish` adds blocks and tensors, all in an order
// that depends on the sizes alone.

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

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kElements = 8, kTile = kThreads * kElements, kMoments = 256;

// The tensor that a block belongs to.
__device__ __forceinline__ uint32_t tensor_of(const Params& p, uint32_t block) {
    uint32_t below = 0, end = p.count;
    while (end - below > 1) {
        const uint32_t middle = (below + end) / 2;
        if (p.tensors[middle].first_block <= block) below = middle; else end = middle;
    }
    return below;
}

template <typename T>
__device__ __forceinline__ void load(const T* from, int count, float (&x)[8]) {
    Eight<T> stored;
    if (count == 8) stored.load(from); else stored.load_part(from, count);
    stored.widen(x);
}
template <typename T>
__device__ __forceinline__ void store(T* to, int count, const float (&x)[8]) {
    Eight<T> stored;
    stored.round(x);
    if (count == 8) stored.store(to); else stored.store_part(to, count);
}

// The thread's elements: `count` of eight from `first` on.
struct Place {
    uint64_t first;
    int count;
    __device__ __forceinline__ explicit Place(const Tensor& tensor) {
        first = uint64_t(blockIdx.x - tensor.first_block) * kTile + threadIdx.x * kElements;
        count = first < tensor.count ? int(min(tensor.count - first, uint64_t(kElements))) : 0;
    }
};

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
    load(tensor.gradient + place.first, place.count, g);
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

// 8-bit moments of a lane, in a block of which it has eight neighbours.
__device__ __forceinline__ void decode_moments(const float* map, const uint8_t* codes, float absmax, int count, float (&x)[8]) {
    uint32_t words[2] = {0, 0};
    if (count == 8) {
        const uint2 both = *reinterpret_cast<const uint2*>(codes);
        words[0] = both.x, words[1] = both.y;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) words[i / 4] |= uint32_t(codes[i]) << (i % 4 * 8);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < count ? __fmul_rn(map[words[i / 4] >> (i % 4 * 8) & 255], absmax) : 0.0f;
}
__device__ __forceinline__ void encode_moments(const float* map, uint8_t* codes, float* absmax, int count, float (&x)[8]) {
    uint32_t q[2];
    const float scale = encode_dynamic(map, x, q);
    if (threadIdx.x % 32 == 0 && count > 0) *absmax = scale;
    if (count == 8) {
        *reinterpret_cast<uint2*>(codes) = make_uint2(q[0], q[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < count) codes[i] = uint8_t(q[i / 4] >> (i % 4 * 8));
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
        case kF32: load(static_cast<const float*>(tensor.parameter) + place.first, place.count, w); break;
        case kF16: load(static_cast<const f16*>(tensor.parameter) + place.first, place.count, w); break;
        default: load(static_cast<const bf16*>(tensor.parameter) + place.first, place.count, w); break;
    }
    load(tensor.gradient + place.first, place.count, g);
    if constexpr (Blockwise) {
        decode_moments(maps, static_cast<const uint8_t*>(tensor.m) + place.first, tensor.m_absmax[block], place.count, m);
        decode_moments(maps + 256, static_cast<const uint8_t*>(tensor.v) + place.first, tensor.v_absmax[block], place.count, v);
    } else {
        load(static_cast<const float*>(tensor.m) + place.first, place.count, m);
        load(static_cast<const float*>(tensor.v) + place.first, place.count, v);
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
        case kF32: store(static_cast<float*>(tensor.parameter) + place.first, place.count, w); break;
        case kF16: store(static_cast<f16*>(tensor.parameter) + place.first, place.count, w); break;
        default: store(static_cast<bf16*>(tensor.parameter) + place.first, place.count, w); break;
    }
    if constexpr (Blockwise) {
        encode_moments(maps, static_cast<uint8_t*>(tensor.m) + place.first, tensor.m_absmax + block, place.count, m);
        encode_moments(maps + 256, static_cast<uint8_t*>(tensor.v) + place.first, tensor.v_absmax + block, place.count, v);
    } else {
        store(static_cast<float*>(tensor.m) + place.first, place.count, m);
        store(static_cast<float*>(tensor.v) + place.first, place.count, v);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) adamw_f32(const __grid_constant__ Params p) { adamw<false>(p); }
extern "C" __global__ void __launch_bounds__(kThreads) adamw_8bit(const __grid_constant__ Params p) { adamw<true>(p); }
