// AdaLoRA's penalty on singular vectors that are not orthonormal: d = a a^T - I, its norm, and gradient += 2 weight d a / |d|, for the
// rows of lora_a or the columns of lora_b. Sums are f64, in orders that depend on the shape alone.

#include "dtype.cuh"
#include "reduce.cuh"

struct Params {
    const void* factor;    // T: element i of vector v lies at v * vector_pitch + i * element_pitch
    double* difference;    // [vectors, vectors]
    double* norm;          // [1]
    float* gradient;       // as factor
    uint32_t vectors, length;
    uint32_t vector_pitch, element_pitch;
    float weight;
    uint32_t padding;
};
static_assert(sizeof(Params) == 56, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kTile = 4;

// The sum of a value over the block, for its first thread.
__device__ __forceinline__ double block_sum(double value, double* sums) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(0xffffffff, value, d);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0.0;
#pragma unroll
    for (uint32_t warp = 0; warp < kWarps; ++warp) total += sums[warp];
    __syncthreads();
    return total;
}

// A block has the products of four vectors with four others.
template <typename T>
__device__ __forceinline__ void difference(const Params& p) {
    __shared__ double sums[kWarps];
    const T* factor = static_cast<const T*>(p.factor);
    const uint32_t tiles = (p.vectors - 1) / kTile + 1;
    const uint32_t first[2] = {blockIdx.x / tiles * kTile, blockIdx.x % tiles * kTile};
    double products[kTile][kTile] = {};
    for (uint32_t i = threadIdx.x; i < p.length; i += kThreads) {
        double values[2][kTile];
#pragma unroll
        for (uint32_t side = 0; side < 2; ++side) {
#pragma unroll
            for (uint32_t j = 0; j < kTile; ++j) {
                const uint32_t vector = min(first[side] + j, p.vectors - 1);
                values[side][j] = to_f32(factor[uint64_t(vector) * p.vector_pitch + uint64_t(i) * p.element_pitch]);
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < kTile; ++r)
#pragma unroll
            for (uint32_t c = 0; c < kTile; ++c) products[r][c] = fma(values[0][r], values[1][c], products[r][c]);
    }
#pragma unroll
    for (uint32_t r = 0; r < kTile; ++r) {
#pragma unroll
        for (uint32_t c = 0; c < kTile; ++c) {
            const double product = block_sum(products[r][c], sums);
            const uint32_t row = first[0] + r, column = first[1] + c;
            if (threadIdx.x == 0 && row < p.vectors && column < p.vectors) {
                p.difference[size_t(row) * p.vectors + column] = product - (row == column ? 1.0 : 0.0);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) orthogonality_norm(const __grid_constant__ Params p) {
    __shared__ double sums[kWarps];
    double square = 0.0;
    for (uint32_t i = threadIdx.x; i < p.vectors * p.vectors; i += kThreads) square = fma(p.difference[i], p.difference[i], square);
    const double total = block_sum(square, sums);
    if (threadIdx.x == 0) *p.norm = sqrt(total);
}

// A thread has an element.
template <typename T>
__device__ __forceinline__ void gradient(const Params& p) {
    const uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x;
    const double norm = *p.norm;
    if (i >= uint64_t(p.vectors) * p.length || norm == 0.0) return;
    // Neighbouring threads have neighbouring elements in memory.
    const bool rows = p.element_pitch == 1;
    const uint32_t columns = rows ? p.length : p.vectors, row = uint32_t(i / columns), column = uint32_t(i % columns);
    const uint32_t vector = rows ? row : column, place = rows ? column : row;
    const T* factor = static_cast<const T*>(p.factor) + uint64_t(place) * p.element_pitch;
    double sum = 0.0;
    for (uint32_t j = 0; j < p.vectors; ++j) {
        sum = fma(p.difference[size_t(vector) * p.vectors + j], double(to_f32(factor[uint64_t(j) * p.vector_pitch])), sum);
    }
    p.gradient[i] = __fadd_rn(p.gradient[i], float(2.0 * p.weight * sum / norm));
}

#define ENTRY(OPERATION, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads) orthogonality_##OPERATION##_##T(const __grid_constant__ Params p) { \
        OPERATION<T>(p);                                                                                                 \
    }
#define ENTRIES(T)        \
    ENTRY(difference, T)  \
    ENTRY(gradient, T)

typedef float f32;
ENTRIES(f32)
ENTRIES(f16)
ENTRIES(bf16)
