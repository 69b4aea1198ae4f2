// Sorts the rows of a product by their expert: group i has the rows row[start[i]] ... row[start[i + 1] - 1], in ascending order, and
// the expert `group_expert[i]`. Groups are in the order of the experts, those without rows left out; behind them come one of the
// rows that have none (-1), and one of those with a wrong number (-2). Groups that are not used are empty.
//
// A block finds the rows of one expert. It reads the experts of all rows: once to count those that come before, and to see which
// experts are used, and once more to write its own. A warp has neighbouring rows, so the order needs no other barriers.

#include <cstdint>

#include "overlap.cuh"
#include "reduce.cuh"

struct Params {
    const int32_t* expert;  // [rows]
    int32_t* start;         // [groups + 1]
    int32_t* group_expert;  // [groups]
    int32_t* row;           // [rows]
    uint32_t rows;
    uint32_t groups;        // the most that there can be
    uint32_t experts;
    uint32_t padding;
};
static_assert(sizeof(Params) == 48, "the Rust twin has this size");

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kMaxExperts = 4094, kWords = (kMaxExperts + 2) / 32;

// The place of an expert in the order: those that exist, none, a wrong number.
__device__ __forceinline__ uint32_t key_of(int32_t expert, uint32_t experts) {
    return expert == -1 ? experts : uint32_t(expert) < experts ? uint32_t(expert) : experts + 1;
}

extern "C" __global__ void __launch_bounds__(kThreads) expert_groups_i32(const __grid_constant__ Params p) {
    __shared__ uint32_t used[kWords];        // a bit for every key that some row has
    __shared__ uint32_t before[kWarps];      // rows of smaller keys, by the warp that has read them
    __shared__ uint32_t own[kWarps];         // rows of the block's key
    const uint32_t key = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t share = ((p.rows + kThreads - 1) / kThreads) * 32, begin = min(warp * share, p.rows), end = min(begin + share, p.rows);
    for (uint32_t i = threadIdx.x; i < kWords; i += kThreads) used[i] = 0;
    ptx::wait_for_launch_before();
    ptx::let_next_launch_start();
    __syncthreads();

    // Called by whole warps: the key of the lane's row; none past the end.
    const auto key_at = [&](uint32_t i) { return i < end ? key_of(p.expert[i], p.experts) : ~0u; };
    uint32_t smaller = 0, same = 0;
#pragma unroll 1
    for (uint32_t first = begin; first < end; first += 32) {
        const uint32_t its = key_at(first + lane), sharers = __match_any_sync(kAllLanes, its);
        if (its != ~0u && lane + 1 == __ffs(sharers)) atomicOr(&used[its / 32], 1u << its % 32);
        smaller += __popc(__ballot_sync(kAllLanes, its < key));
        same += __popc(__ballot_sync(kAllLanes, its == key));
    }
    if (lane == 0) before[warp] = smaller, own[warp] = same;
    __syncthreads();

    uint32_t start = 0, place = 0, count = 0;
    for (uint32_t w = 0; w < kWarps; ++w) {
        start += before[w], count += own[w];
        if (w < warp) place += own[w];
    }
    place += start;
    if (threadIdx.x == 0 && count > 0) {
        uint32_t group = __popc(used[key / 32] & ((1u << key % 32) - 1));
        for (uint32_t i = 0; i < key / 32; ++i) group += __popc(used[i]);
        p.start[group] = start;
        p.group_expert[group] = key < p.experts ? int32_t(key) : key == p.experts ? -1 : -2;
    }
    if (key == p.experts + 1) {  // the last block ends the list
        uint32_t groups = 0;
        for (uint32_t i = 0; i <= key / 32; ++i) groups += __popc(used[i]);
        for (uint32_t i = groups + threadIdx.x; i <= p.groups; i += kThreads) {
            p.start[i] = p.rows;
            if (i < p.groups) p.group_expert[i] = -1;
        }
    }
    if (count == 0) return;
#pragma unroll 1
    for (uint32_t first = begin; first < end; first += 32) {
        const bool mine = key_at(first + lane) == key;
        const uint32_t members = __ballot_sync(kAllLanes, mine);
        if (mine) p.row[place + __popc(members & ((1u << lane) - 1))] = first + lane;
        place += __popc(members);
    }
}
