// y[m] += v[m] b^T with the adapter of token m, for engines with a base product of their own. One rounding to y's type;
// a token without an adapter, or with one of rank 0, keeps its bits.
//
// A block takes a group of up to eight tokens that share an adapter and 128 rows of b, which tensor cores multiply from
// registers. What it needs of v and y is requested with the adapter's entry, before b can be.

#include <type_traits>

#include "low_rank.cuh"
#include "overlap.cuh"

struct Params {
    void* y;         // [tokens, n]
    LowRank branch;
    uint32_t tokens;
    uint32_t n;
    uint32_t slots;  // blocks that share the groups of 32 tokens
    uint32_t padding;
};
static_assert(sizeof(Params) == 64, "the Rust twin has this size");

constexpr uint32_t kThreads = 128, kWarpRows = 32, kRows = kThreads / 32 * kWarpRows;

// Two neighbouring outputs of a token.
template <typename T>
struct Outputs {
    T value[2];

    __device__ __forceinline__ void load(const T* y, uint32_t count, bool pairs) {
        struct alignas(2 * sizeof(T)) Two { T value[2]; };
        value[0] = value[1] = T{};
        if (pairs && count == 2) {
            const Two two = *reinterpret_cast<const Two*>(y);
            value[0] = two.value[0], value[1] = two.value[1];
        } else {
            if (count > 0) value[0] = y[0];
            if (count > 1) value[1] = y[1];
        }
    }

    // y += delta for those of the two rows that `has` says.
    __device__ __forceinline__ void store(T* y, float first, float second, bool has_first, bool has_second, bool pairs) const {
        struct alignas(2 * sizeof(T)) Two { T value[2]; };
        const T sums[2] = {from_f32<T>(to_f32(value[0]) + first), from_f32<T>(to_f32(value[1]) + second)};
        if (pairs && has_first && has_second) {
            *reinterpret_cast<Two*>(y) = {{sums[0], sums[1]}};
        } else {
            if (has_first) y[0] = sums[0];
            if (has_second) y[1] = sums[1];
        }
    }
};

// What a block adds to y: rows first_row + ... of a group's tokens.
template <typename T, typename B>
__device__ __forceinline__ void add_group(const Params& p, const Window& window, uint32_t first, uint32_t i, uint32_t first_row) {
    constexpr uint32_t kAtOnce = kSteps<B>, kRanks = 16 * kAtOnce, kFours = kRanks / 4;
    __shared__ alignas(16) float v[kGroup][kRankPitch];
    const Adapters& adapters = p.branch.adapters;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t warp_row = first_row + threadIdx.x / 32 * kWarpRows;
    const Group group = window.group(i, lane);
    T* y = static_cast<T*>(p.y);
    const bool pairs = p.n % 2 == 0 && reinterpret_cast<uint64_t>(y) % (2 * sizeof(T)) == 0;

    // The lane's outputs: rows 16 k + 2 g and the next, of tokens 2 t and 2 t + 1.
    uint32_t tokens[2];
    Outputs<T> outputs[2][2];
#pragma unroll
    for (uint32_t m = 0; m < 2; ++m) {
        tokens[m] = group.token(2 * t + m);
#pragma unroll
        for (uint32_t k = 0; k < 2; ++k) {
            const uint32_t row = warp_row + 16 * k + 2 * g, count = tokens[m] < 32 && row < p.n ? min(p.n - row, 2u) : 0;
            outputs[m][k].load(count > 0 ? y + size_t(first + tokens[m]) * p.n + row : y, count, pairs);
        }
    }

    const size_t row_pitch = adapters.pitch * adapters.slices;
    const uint32_t filled = threadIdx.x / kFours, fill_rank = threadIdx.x % kFours * 4;  // the thread's part of v
    const uint32_t fill_token = filled < kGroup ? group.token(filled) : 32;
#pragma unroll 1
    for (uint32_t slice = 0; slice < adapters.slices; ++slice) {
        const Adapter adapter = adapters.entries[size_t(group.adapter) * adapters.slices + slice];
        const float* from = p.branch.v + (first + min(fill_token, 31u)) * row_pitch + slice * adapters.pitch;
        if (!reaches(adapter, first_row, kRows)) continue;
        const uint32_t row = warp_row + 2 * g - adapter.first_row;  // the lane's first row of b
        float delta[2][4] = {};
#pragma unroll 1
        for (uint32_t base = 0; base < adapter.rank; base += kRanks) {
            const uint32_t column = base + fill_rank;
            float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (fill_token < 32 && column < adapters.pitch) values = load_v(from + column, p.tokens * row_pitch, p.branch.parts);
            uint32_t raw[kAtOnce][2][2][sizeof(B)];
#pragma unroll
            for (uint32_t k = 0; k < 4; ++k) {
                const uint32_t place = row + k / 2 * 16 + k % 2;  // outside of the slice it is large
                const bool inside = place < adapter.rows;
                const B* b = static_cast<const B*>(adapter.b) + size_t(inside ? place : 0) * adapter.rank;
#pragma unroll
                for (uint32_t s = 0; s < kAtOnce; ++s) {
                    load_b(b, base + 16 * s + 4 * t, inside ? adapter.rank : 0, raw[s][k / 2][k % 2]);
                }
            }
            __syncthreads();
            if (filled < kGroup) *reinterpret_cast<float4*>(&v[filled][fill_rank]) = values;
            __syncthreads();
#pragma unroll
            for (uint32_t s = 0; s < kAtOnce; ++s) {
                if (base + 16 * s >= adapter.rank) break;
                uint32_t token[4];
                read_v(v[g], 16 * s + 4 * t, int32_t(adapter.rank - base - 16 * s - 4 * t), token);
                add_step<B>(raw[s][0], token, delta[0]);
                add_step<B>(raw[s][1], token, delta[1]);
            }
        }
        if (adapter.rank == 0) continue;
#pragma unroll
        for (uint32_t m = 0; m < 2; ++m) {
#pragma unroll
            for (uint32_t k = 0; k < 2; ++k) {
                const uint32_t row = warp_row + 16 * k + 2 * g, place = row - adapter.first_row;
                if (tokens[m] >= 32) continue;
                outputs[m][k].store(y + size_t(first + tokens[m]) * p.n + row, delta[k][m], delta[k][2 + m],
                                    place < adapter.rows, place + 1 < adapter.rows, pairs);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void lora_expand(const Params& p) {
    const Adapters& adapters = p.branch.adapters;
    // One dimension: neither the number of tokens nor n is bounded by the grid's y.
    const uint32_t row_tiles = (p.n - 1) / kRows + 1;
    const uint32_t first_row = blockIdx.x % row_tiles * kRows, slot = blockIdx.x / row_tiles % p.slots;
    const uint32_t first = blockIdx.x / row_tiles / p.slots * 32;
    ptx::wait_for_launch_before();
    ptx::let_next_launch_start();
    const Window window(adapters, first, p.tokens, threadIdx.x % 32);
    if (slot == 0) {
        const uint32_t row = first_row + threadIdx.x;
        for (uint32_t wrong = __ballot_sync(kAllLanes, adapters.is_wrong(window.adapter)); wrong != 0; wrong &= wrong - 1) {
            if (row < p.n) static_cast<T*>(p.y)[size_t(first + __ffs(wrong) - 1) * p.n + row] = from_f32<T>(nan_value());
        }
    }
#pragma unroll 1
    for (uint32_t i = slot; i < window.groups(); i += p.slots) {
        if constexpr (std::is_same<T, float>::value) {
            add_group<T, float>(p, window, first, i, first_row);
        } else if (p.branch.b_is_f32) {
            add_group<T, float>(p, window, first, i, first_row);
        } else {
            add_group<T, T>(p, window, first, i, first_row);
        }
    }
}

#define ENTRY(T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 3) lora_expand_##T(const __grid_constant__ Params p) { \
        lora_expand<T>(p);                                                                                       \
    }

typedef float f32;
ENTRY(f32)
ENTRY(f16)
ENTRY(bf16)
