// index[i] = adapter[i / choices] * experts + expert[i]: which adapter of a stack of experts a row has, from the adapter of its
// token and the expert that the router chose for it. -1 where there is no adapter or no expert; -2, which names nothing, where
// one of the two is wrong.

#include <cstdint>

struct Params {
    const int32_t* adapter;  // [rows / choices]
    const int32_t* expert;   // [rows]
    int32_t* index;          // [rows]
    uint32_t rows;
    uint32_t choices;        // rows of a token
    uint32_t adapters;
    uint32_t experts;
};
static_assert(sizeof(Params) == 40, "the Rust twin has this size");

constexpr uint32_t kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads) expert_index_i32(const __grid_constant__ Params p) {
    const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= p.rows) return;
    const int32_t adapter = p.adapter[i / p.choices], expert = p.expert[i];
    int32_t index = -2;
    if (adapter == -1 || expert == -1) {
        index = -1;
    } else if (adapter >= 0 && uint32_t(adapter) < p.adapters && expert >= 0 && uint32_t(expert) < p.experts) {
        index = adapter * int32_t(p.experts) + expert;
    }
    p.index[i] = index;
}
