// AdaLoRA's own parts of a training step: b (a * e) as LoRA's product, the gradients of its factors from that, and the importance of
// parameters. Element by element in f32, every operation rounded, so the bits are the reference's; the sum over a row of dE is in
// an order that depends on its length alone.

#include "dtype.cuh"
#include "reduce.cuh"

struct Params {
    const void* a;       // T [rows, columns]: lora_a, or of adalora_importance any parameter
    const void* e;       // T [rows]
    float* gradient;     // [rows, columns]; of adalora_fold, what is folded
    float* de;           // [rows]
    float* sensitivity;  // [rows, columns]
    float* uncertainty;  // [rows, columns]
    uint32_t rows, columns;
    float first[2], second[2];  // of each average: beta, 1 - beta
};
static_assert(sizeof(Params) == 72, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32;

// The element of the calling thread, where there is one.
struct Place {
    uint64_t i;
    bool exists;
    __device__ __forceinline__ explicit Place(const Params& p) {
        i = uint64_t(blockIdx.x) * kThreads + threadIdx.x;
        exists = i < uint64_t(p.rows) * p.columns;
    }
};

// folded = a * e.
template <typename T>
__device__ __forceinline__ void fold(const Params& p) {
    const Place place(p);
    if (!place.exists) return;
    const float e = to_f32(static_cast<const T*>(p.e)[place.i / p.columns]);
    p.gradient[place.i] = __fmul_rn(to_f32(static_cast<const T*>(p.a)[place.i]), e);
}

// de = sum of gradient * a over a row, which a block has; then gradient = gradient * e.
template <typename T>
__device__ __forceinline__ void gradient(const Params& p) {
    __shared__ float sums[kWarps];
    const size_t row = size_t(blockIdx.x) * p.columns;
    const T* a = static_cast<const T*>(p.a) + row;
    const float e = to_f32(static_cast<const T*>(p.e)[blockIdx.x]);
    float sum[1] = {0.0f};
    for (uint32_t i = threadIdx.x; i < p.columns; i += kThreads) {
        const float g = p.gradient[row + i];
        sum[0] = fmaf(g, to_f32(a[i]), sum[0]);
        p.gradient[row + i] = __fmul_rn(g, e);
    }
    float total = warp_sums(sum, threadIdx.x % 32);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t warp = 1; warp < kWarps; ++warp) total = __fadd_rn(total, sums[warp]);
    p.de[blockIdx.x] = total;
}

// The averages of |p g|, and of how far it is from its own.
template <typename T>
__device__ __forceinline__ void importance(const Params& p) {
    const Place place(p);
    if (!place.exists) return;
    const auto smooth = [](const float (&beta)[2], float average, float value) {
        return __fadd_rn(__fmul_rn(beta[0], average), __fmul_rn(beta[1], value));
    };
    const float s = fabsf(__fmul_rn(to_f32(static_cast<const T*>(p.a)[place.i]), p.gradient[place.i]));
    const float average = smooth(p.first, p.sensitivity[place.i], s);
    p.sensitivity[place.i] = average;
    p.uncertainty[place.i] = smooth(p.second, p.uncertainty[place.i], fabsf(__fsub_rn(s, average)));
}

#define ENTRY(OPERATION, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads) adalora_##OPERATION##_##T(const __grid_constant__ Params p) { \
        OPERATION<T>(p);                                                                                          \
    }
#define ENTRIES(T)      \
    ENTRY(fold, T)      \
    ENTRY(gradient, T)  \
    ENTRY(importance, T)

typedef float f32;
ENTRIES(f32)
ENTRIES(f16)
ENTRIES(bf16)
