// Which adapter a token uses.
#pragma once

#include <cstdint>

// One adapter, as the host wrote it.
struct Adapter {
    const void* a;   // [rank, k]
    const void* b;   // [n, rank]
    uint32_t rank;
    float scaling;
};
static_assert(sizeof(Adapter) == 24, "the Rust twin has this size");

// What a token with a wrong adapter index gets.
__device__ __forceinline__ float nan_value() { return __int_as_float(0x7fffffff); }

// The adapters of a launch, and the choice of every token.
struct Adapters {
    const Adapter* entries;
    const int32_t* index;  // [tokens]; null: adapter 0 for all
    uint32_t count;
    uint32_t pitch;        // floats from row to row of v: the largest rank, rounded up to a multiple of 4

    __device__ __forceinline__ int32_t of(uint32_t token) const { return index == nullptr ? 0 : index[token]; }
    __device__ __forceinline__ bool exists(int32_t adapter) const {
        return adapter >= 0 && static_cast<uint32_t>(adapter) < count;
    }
    // An index that names nothing, and is not the -1 of a token without an adapter.
    __device__ __forceinline__ bool is_wrong(int32_t adapter) const { return adapter != -1 && !exists(adapter); }
};

// The adapters of a tile's tokens, in shared memory. A token past the end has none.
template <int Tokens>
struct Choice {
    int32_t adapter[Tokens];

    // Called by all threads of the block; ready after the caller's next barrier.
    __device__ __forceinline__ void load(const Adapters& adapters, uint32_t first, uint32_t tokens) {
        for (uint32_t j = threadIdx.x; j < Tokens; j += blockDim.x) {
            adapter[j] = first + j < tokens ? adapters.of(first + j) : -1;
        }
    }

    // Whether `token` is the first one of the tile with its adapter.
    __device__ __forceinline__ bool is_first(int token) const {
        bool first = true;
        for (int j = 0; j < token; ++j) first = first && adapter[j] != adapter[token];
        return first;
    }
};
