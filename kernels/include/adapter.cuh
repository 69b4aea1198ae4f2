// Which adapter a token uses, and which tokens share one.
#pragma once

#include <cstdint>

#include "reduce.cuh"

// One adapter of one slice of the outputs, as the host wrote it.
struct Adapter {
    const void* a;       // [rank, k]
    const void* b;       // [rows, rank]
    uint32_t rank;
    float scaling;
    uint32_t first_row;  // of the slice
    uint32_t rows;
};
static_assert(sizeof(Adapter) == 32, "the Rust twin has this size");

// Whether the slice of an adapter has rows among `rows` rows from `first` on.
__device__ __forceinline__ bool reaches(const Adapter& adapter, uint32_t first, uint32_t rows) {
    return adapter.first_row < first + rows && first < adapter.first_row + adapter.rows;
}

// What a token with a wrong adapter index gets.
__device__ __forceinline__ float nan_value() { return __int_as_float(0x7fffffff); }

// The adapters of a launch, and the choice of every token.
struct Adapters {
    const Adapter* entries;  // [count, slices]
    const int32_t* index;    // [tokens]; null: adapter 0 for all
    uint32_t count;
    uint16_t pitch;          // columns of v for a slice: the largest rank, rounded up to a multiple of 4
    uint16_t slices;         // parts of the outputs with adapters of their own

    __device__ __forceinline__ int32_t of(uint32_t token) const { return index == nullptr ? 0 : index[token]; }
    __device__ __forceinline__ bool exists(int32_t adapter) const {
        return adapter >= 0 && static_cast<uint32_t>(adapter) < count;
    }
    // An index that names nothing, and is not the -1 of a token without an adapter.
    __device__ __forceinline__ bool is_wrong(int32_t adapter) const { return adapter != -1 && !exists(adapter); }
};

constexpr uint32_t kGroup = 8;  // tokens that are multiplied together: the columns of a tensor core's operand

// The place of bit `n` (0 to 7) among the set bits of `mask`, from the lowest on; 32 and above: there are fewer.
__device__ __forceinline__ uint32_t nth_bit(uint32_t mask, uint32_t n) {
#pragma unroll
    for (uint32_t i = 0; i < 7; ++i) mask = i < n ? mask & (mask - 1) : mask;
    return static_cast<uint32_t>(__ffs(mask)) - 1;
}

// Up to eight tokens of a window that share an adapter.
struct Group {
    int32_t adapter;
    uint32_t leader;   // the first one, relative to the window
    uint32_t members;  // its bit, those of the others and perhaps later ones

    __device__ __forceinline__ uint32_t token(uint32_t i) const { return nth_bit(members, i); }
};

// Where the tokens of a launch lie that has one weight for all: one after the other. See ExpertShare for others.
struct InOrder {
    static __device__ __forceinline__ uint32_t end(uint32_t tokens) { return tokens; }        // of the tile's tokens
    static __device__ __forceinline__ uint32_t row(uint32_t token) { return token; }    // of y, v and the adapter index
    static __device__ __forceinline__ uint32_t input(uint32_t token) { return token; }  // row of x
};

// 32 neighbouring tokens, one per lane, in groups that share an adapter. A token past the end has none.
struct Window {
    int32_t adapter;   // of the lane's token
    uint32_t sharers;  // the tokens with the same one
    uint32_t leaders;  // the first tokens of groups

    // Called by whole warps. `end`: tokens from here on are not there.
    template <typename Order = InOrder>
    __device__ __forceinline__ Window(const Adapters& adapters, uint32_t first, uint32_t end, uint32_t lane, const Order& order = Order{}) {
        adapter = first + lane < end ? adapters.of(order.row(first + lane)) : -1;
        sharers = __match_any_sync(kAllLanes, adapter);
        const bool leads = adapters.exists(adapter) && __popc(sharers & ((1u << lane) - 1)) % kGroup == 0;
        leaders = __ballot_sync(kAllLanes, leads);
    }

    __device__ __forceinline__ uint32_t groups() const { return __popc(leaders); }
    __device__ __forceinline__ bool leads(uint32_t lane) const { return leaders >> lane & 1; }

    // Group `i` of `groups()`. Called by whole warps.
    __device__ __forceinline__ Group group(uint32_t i, uint32_t lane) const {
        const bool found = leads(lane) && __popc(leaders & ((1u << lane) - 1)) == i;
        Group group;
        group.leader = __ffs(__ballot_sync(kAllLanes, found)) - 1;
        group.adapter = __shfl_sync(kAllLanes, adapter, group.leader);
        group.members = __shfl_sync(kAllLanes, sharers, group.leader) & (kAllLanes << group.leader);
        return group;
    }
};
