// The low-rank branch `v b^T` of a product.
#pragma once

#include <cstdint>
#include <type_traits>

#include "adapter.cuh"
#include "dropout.cuh"
#include "pieces.cuh"

struct LowRank {
    const float* v;         // [parts, tokens, slices, pitch], from lora_shrink; null: no branch
    Adapters adapters;
    uint32_t b_is_f32;      // else the element type of y
    uint32_t parts;         // 1, 2, 4 or 8
};

// Four values of v, summed over the parts as `lora_shrink` would: pairs of neighbours, then pairs of those. From L2: a launch
// that overlaps the one before it may come to a multiprocessor that has read v's place before.
__device__ __forceinline__ float4 load_v(const float* v, size_t part, uint32_t parts) {
    const auto load = [&](uint32_t i) { return __ldcg(reinterpret_cast<const float4*>(v + i * part)); };
    const auto add = [](const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); };
    if (parts == 1) return load(0);
    if (parts == 2) return add(load(0), load(1));
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (uint32_t i = 0; i < parts; i += 4) {
        const float4 four = add(add(load(i), load(i + 1)), add(load(i + 2), load(i + 3)));
        sum = i == 0 ? four : add(sum, four);
    }
    return sum;
}

// Elements r ... r + 3 of a row of b, as stored; zero from `rank` on.
template <typename B>
__device__ __forceinline__ void load_b(const B* row, uint32_t r, uint32_t rank, uint32_t (&raw)[sizeof(B)]) {
#pragma unroll
    for (int i = 0; i < sizeof(B); ++i) raw[i] = 0;
    if (r >= rank) return;
    if (rank % 4 == 0) {  // every row is aligned to four elements
        if constexpr (sizeof(B) == 4) {
            const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + r));
            raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
        } else {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(row + r));
            raw[0] = v.x, raw[1] = v.y;
        }
        return;
    }
#pragma unroll 1
    for (uint32_t i = min(4u, rank - r); i-- > 0;) {
        if constexpr (sizeof(B) == 4) {
            raw[3] = raw[2], raw[2] = raw[1], raw[1] = raw[0], raw[0] = __float_as_uint(row[r + i]);
        } else {
            raw[1] = raw[1] << 16 | raw[0] >> 16, raw[0] = raw[0] << 16 | row[r + i].bits;
        }
    }
}

// The side of the branch whose rows a tile's outputs are: lora_b [rows, rank], for the slice's outputs.
struct OfOutputs {
    static __device__ __forceinline__ const void* factor(const Adapter& adapter) { return adapter.b; }
    static __device__ __forceinline__ uint2 rows(const Adapter& adapter) { return make_uint2(adapter.first_row, adapter.rows); }
    template <typename B>
    static __device__ __forceinline__ void load(const void* factor, uint32_t row, uint32_t r, uint32_t rank, uint32_t (&raw)[sizeof(B)]) {
        load_b(static_cast<const B*>(factor) + size_t(row) * rank, r, rank, raw);
    }
    static __device__ __forceinline__ float finish(float delta, uint32_t, uint32_t) { return delta; }
};

// The other side, of the product with the transposed weight: lora_a [rank, k] has a column for each of the k outputs, whatever
// the slice. What dropout took from x in the forward pass gets nothing.
struct OfInputs {
    uint32_t k;
    const Dropout& dropout;

    static __device__ __forceinline__ const void* factor(const Adapter& adapter) { return adapter.a; }
    __device__ __forceinline__ uint2 rows(const Adapter&) const { return make_uint2(0, k); }
    template <typename A>
    __device__ __forceinline__ void load(const void* factor, uint32_t row, uint32_t r, uint32_t rank, uint32_t (&raw)[sizeof(A)]) const {
        const A* a = static_cast<const A*>(factor) + size_t(r) * k + row;
#pragma unroll
        for (int i = 0; i < sizeof(A); ++i) raw[i] = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            if (r + i >= rank) continue;
            if constexpr (sizeof(A) == 4) {
                raw[i] = __float_as_uint(a[size_t(i) * k]);
            } else {
                raw[i / 2] |= uint32_t(a[size_t(i) * k].bits) << (i % 2 * 16);
            }
        }
    }
    __device__ __forceinline__ float finish(float delta, uint32_t token, uint32_t row) const { return dropout.keeps(token, row) ? delta : 0.0f; }
};

// Steps of 16 ranks that a warp reads together, and that an item has at a time; the distance of v's rows in shared memory, with
// which sixteen ranks of two neighbours fill all banks.
template <typename B>
constexpr uint32_t kSteps = 8 / sizeof(B);
constexpr uint32_t kRankPitch = kSteps<f16> * 16 + 16;

// Four values of v from column r on of its row in shared memory; zero from `left` on, which may be all.
__device__ __forceinline__ void read_v(const float* row, uint32_t r, int32_t left, uint32_t (&values)[4]) {
    uint4 four = make_uint4(0, 0, 0, 0);
    if (left > 0) four = *reinterpret_cast<const uint4*>(row + r);
    values[0] = four.x, values[1] = left > 1 ? four.y : 0, values[2] = left > 2 ? four.z : 0, values[3] = left > 3 ? four.w : 0;
}

// delta += 16 ranks of b v^T: `b` has four elements of two rows as stored, `v` four f32 of a token.
template <typename B>
__device__ __forceinline__ void add_step(const uint32_t (&b)[2][sizeof(B)], const uint32_t (&v)[4], float (&delta)[4]) {
    using PiecesB = Pieces<B, bf16>;
    uint32_t left[2][PiecesB::kCount][2], right[3][2];
    PiecesB::make(b[0], left[0]);
    PiecesB::make(b[1], left[1]);
    Pieces<float, bf16>::make(v, right);
    // The smallest pieces come first.
#pragma unroll
    for (int i = PiecesB::kCount - 1; i >= 0; --i) {
#pragma unroll
        for (int j = 2; j >= 0; --j) {
            const uint32_t operand[4] = {left[0][i][0], left[1][i][0], left[0][i][1], left[1][i][1]};
            ptx::mma_bf16(delta, operand, right[j][0], right[j][1]);
        }
    }
}

// What a block knows of a window of `Tokens` tokens, in shared memory.
template <int Tokens>
struct BranchTile {
    struct Item {
        const void* factor;  // lora_b, or lora_a
        uint32_t rank;
        uint32_t members;    // see Group
    };
    Item groups[Tokens];
    alignas(16) float v[Tokens][kRankPitch];  // some ranks of every token that has an adapter
    uint32_t count;                           // of groups
    uint32_t max_rank;
    uint32_t wrong;                           // tokens whose index names nothing
    int32_t first_row;                        // of the slice, relative to the tile of outputs
    uint32_t rows;                            // of the slice

    // Called by one warp. `end`: tokens from here on are not there.
    template <typename Side, typename Order>
    __device__ __forceinline__ void find_groups(const Side& side, const Adapters& adapters, const Order& order, uint32_t first,
                                                uint32_t end, uint32_t slice, uint32_t tile_row, uint32_t lane) {
        const Window window(adapters, first, end, lane, order);
        Adapter own = {nullptr, nullptr, 0, 0.0f, 0, 0};
        if (window.leads(lane)) {
            own = adapters.entries[size_t(window.adapter) * adapters.slices + slice];
            const uint32_t i = __popc(window.leaders & ((1u << lane) - 1));
            groups[i] = {side.factor(own), own.rank, window.sharers & (kAllLanes << lane)};
        }
        const uint32_t any = max(__ffs(window.leaders), 1) - 1;
        const uint2 reach = side.rows(own);
        const uint32_t slice_row = __shfl_sync(kAllLanes, reach.x, any), slice_rows = __shfl_sync(kAllLanes, reach.y, any);
        const uint32_t largest = __reduce_max_sync(kAllLanes, own.rank);
        const uint32_t bad = __ballot_sync(kAllLanes, adapters.is_wrong(window.adapter));
        if (lane == 0) {
            count = window.groups(), max_rank = largest, wrong = bad;
            first_row = int32_t(slice_row - tile_row), rows = slice_rows;
        }
    }

    // Brings ranks base ... base + ranks - 1 of v to shared memory. Called by all threads of the block.
    template <typename Order>
    __device__ __forceinline__ void fill(const LowRank& branch, const Order& order, uint32_t first, uint32_t end, uint32_t tokens,
                                         uint32_t slice, uint32_t base, uint32_t ranks, uint32_t thread) {
        const Adapters& adapters = branch.adapters;
        const size_t row_pitch = adapters.pitch * adapters.slices;
#pragma unroll 1
        for (uint32_t i = thread; i < Tokens * ranks / 4; i += blockDim.x) {
            const uint32_t j = i / (ranks / 4), r = i % (ranks / 4) * 4;
            if (first + j >= end || base + r >= adapters.pitch) continue;
            const uint32_t row = order.row(first + j);
            if (!adapters.exists(adapters.of(row))) continue;
            const float* from = branch.v + row * row_pitch + slice * adapters.pitch + base + r;
            *reinterpret_cast<float4*>(&v[j][r]) = load_v(from, tokens * row_pitch, branch.parts);
        }
    }

    // sums[token of the window * pitch + row of the tile] += v b^T over the ranks that v has, for b (or, of the other side, the
    // transposed a) of type B. The window begins with token `first_token`, the tile with row `tile_row`. The groups by `blocks` blocks of 16 rows, from `first_block` on, are items that the warps take turns with; a warp requests what it
    // needs of b for several at once.
    //
    // Lane (g, t) = (lane / 4, lane % 4) holds four ranks from 4 t on of rows g and g + 8 of b and of the group's token g.
    // The order of a sum depends on the adapter's rank alone.
    template <typename B, typename Side>
    __device__ __forceinline__ void add(const Side& side, uint32_t first_token, uint32_t tile_row, uint32_t first_block, uint32_t blocks,
                                        uint32_t base, float* sums, uint32_t pitch, uint32_t thread) const {
        constexpr uint32_t kAtOnce = kSteps<B>;
        const uint32_t lane = thread % 32, g = lane / 4, t = lane % 4, warps = blockDim.x / 32;
        const uint32_t ranks = max_rank - base, shift = ranks <= 16 ? 0 : ranks <= 32 || kAtOnce <= 2 ? 1 : 2;
        const uint32_t items = count * blocks;  // of 1 << shift steps
        const auto item_of = [&](uint32_t first, uint32_t s) { return first + (s >> shift) * warps; };
        const auto rank_of = [&](uint32_t s) { return (s & ((1u << shift) - 1)) * 16 + 4 * t; };
        const auto row_of = [&](uint32_t item) { return (first_block + item % blocks) * 16 + g; };
#pragma unroll 1
        for (uint32_t first = thread / 32; first < items; first += (kAtOnce >> shift) * warps) {
            uint32_t raw[kAtOnce][2][sizeof(B)];
#pragma unroll
            for (uint32_t s = 0; s < kAtOnce; ++s) {
                const uint32_t item = item_of(first, s);
                const Item group = item < items ? groups[item / blocks] : Item{nullptr, 0, 0};
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half) {
                    const uint32_t row = row_of(item) + half * 8 - first_row;  // outside of the slice it is large
                    const bool inside = row < rows;
                    side.template load<B>(group.factor, row, base + rank_of(s), inside ? group.rank : 0, raw[s][half]);
                }
            }
            float delta[4];
#pragma unroll
            for (uint32_t s = 0; s < kAtOnce; ++s) {
                const uint32_t item = item_of(first, s);
                if (item >= items) break;
                __syncwarp();  // one step after the other: their operands together would take too many registers
                const Item group = groups[item / blocks];
                const uint32_t token = nth_bit(group.members, g), r = rank_of(s);
                uint32_t values[4];
                read_v(v[min(token, Tokens - 1u)], r, token < Tokens ? int32_t(group.rank - base - r) : 0, values);
                if (r == 4 * t) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) delta[e] = 0.0f;
                }
                add_step<B>(raw[s], values, delta);
                if ((s + 1) % (1u << shift) != 0) continue;
                // The lane's sums: rows g and g + 8, tokens 2 t and 2 t + 1 of the group.
#pragma unroll
                for (uint32_t e = 0; e < 4; ++e) {
                    const uint32_t to = __shfl_sync(kAllLanes, token, (2 * t + e % 2) * 4), row = row_of(item) + e / 2 * 8;
                    if (to < Tokens && row - first_row < rows) {
                        sums[to * pitch + row] += side.finish(delta[e], first_token + to, tile_row + row);
                    }
                }
            }
        }
    }
};

// Adds the low-rank branch of the tokens' adapters to sums[token * pitch + row], a tile of `Tokens` by `Rows` in shared
// memory: v b^T in exact products, summed in f32 and then added. A token gets its own adapter's sum only, what the adapters
// of other tokens hold does not matter to it; one with a wrong index gets NaN.
//
// Called by all threads of the block, which have written `sums` without a barrier since; `sums` is ready after the caller's
// next one. Where `shares` blocks hold the same tile, each adds to rows of its own. `order` says where the tokens lie.
template <typename T, int Tokens, int Rows, typename Side = OfOutputs, typename Order = InOrder>
__device__ __forceinline__ void add_low_rank(const LowRank& branch, uint32_t first_token, uint32_t tokens, uint32_t first_row,
                                             uint32_t, float* sums, uint32_t pitch, uint32_t share = 0, uint32_t shares = 1,
                                             const Side& side = Side{}, const Order& order = Order{}) {
    constexpr uint32_t kBlocks = Rows / 16;
    __shared__ BranchTile<Tokens < 32 ? Tokens : 32> tile;
    const uint32_t thread = ptx::thread_now(), end = min(order.end(tokens), first_token + Tokens);
    const uint32_t first_block = kBlocks * share / shares, blocks = kBlocks * (share + 1) / shares - first_block;

#pragma unroll 1
    for (uint32_t first = first_token; first < end; first += 32) {
        float* window_sums = sums + (first - first_token) * pitch;
#pragma unroll 1
        for (uint32_t slice = 0; slice < branch.adapters.slices; ++slice) {
            const auto add_all = [&](auto element) {
                using B = decltype(element);
                constexpr uint32_t kRanks = kSteps<B> * 16;
                uint32_t base = 0;
#pragma unroll 1
                do {
                    __syncthreads();
                    if (base == 0 && thread < 32) tile.find_groups(side, branch.adapters, order, first, end, slice, first_row, thread);
                    tile.fill(branch, order, first, end, tokens, slice, base, kRanks, thread);
                    __syncthreads();
                    if (tile.count == 0 || tile.first_row >= Rows || tile.first_row + int32_t(tile.rows) <= 0) break;
                    tile.template add<B>(side, first, first_row, first_block, blocks, base, window_sums, pitch, thread);
                    base += kRanks;
                } while (base < tile.max_rank);
            };
            if constexpr (std::is_same<T, float>::value) {
                add_all(float{});
            } else if (branch.b_is_f32) {
                add_all(float{});
            } else {
                add_all(T{});
            }
        }
        for (uint32_t wrong = tile.wrong; wrong != 0; wrong &= wrong - 1) {
            for (uint32_t i = thread; i < Rows; i += blockDim.x) window_sums[(__ffs(wrong) - 1) * pitch + i] = nan_value();
        }
    }
}
