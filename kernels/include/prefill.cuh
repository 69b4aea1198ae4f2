// Products of many tokens on Hopper: y = row_scale * (x w^T + v b^T) + bias for 16-bit x, by warpgroups, with f32 sums.
//
// A block takes 128 outputs and `Tokens` tokens at a time. One warpgroup has slices of 64 elements of the sum copied to shared
// memory, some stages ahead; the other two multiply, 64 outputs each. The weight is the left operand, so that a thread keeps
// two rows of it: codes become elements in the registers that the product reads, by one load from a table of pairs and one
// f32 product with absmax. The right operand, x, stays in shared memory.
//
// Blocks go on to further tiles until all are done; where there are too few tiles for the device, they share the sum, and
// `matmul_finish` adds the parts.
//
// How W lies, a class `Side<T, Codes>` knows: rows of outputs (prefill.cu), or columns (prefill_transposed.cu). It says
//     kBranchFirst                      the branch comes before the weight, and `drop` takes some of it out again
//     copy                              how a tile of W comes to shared memory: `kRows` outputs by 64 elements of the sum
//     Scales                            which absmax the first warpgroup's threads fetch, and where they leave them
//     Operands                          how a tile of codes becomes registers of the left operand
//     left, kNext, kColumns             how a tile of elements is described to the product, and 16 elements on along the sum
//     Order                             which outputs a lane's rows are, and how they are turned round to be stored
//     reaches, row_of, rows_of, load_pair  the factor of the branch whose rows are outputs
#pragma once

#include "hopper.cuh"
#include "product.cuh"
#include "tile.cuh"

// Twin: cuda::prefill::PrefillParams. x in boxes of `Tokens` by 64, permuted within rows of a box.
struct PrefillParams {
    hopper::TensorMap x, w;
    Params product;
    Dropout dropout;  // of what the branch adds
};
static_assert(sizeof(PrefillParams) == 512, "the Rust twin has this size");

constexpr uint32_t kWarpgroup = 128, kConsumers = 2 * kWarpgroup, kThreads = kWarpgroup + kConsumers;
constexpr uint32_t kRows = 128;                  // outputs of a block
constexpr uint32_t kRowGroup = 8;                // row tiles that blocks walk over before they go on to other tokens
using Pairs = PairTable<f16, 256>;               // of values as f16, in units of `codebook_unit`
static_assert(kConsumers == Pairs::kBuilders, "all of them build the table");

// Which parts of the product a unit of work is: a tile, and a part of k.
struct Unit {
    uint32_t first_row, first_token, split, begin, end;

    // Tiles are numbered so that blocks at work at a time share rows of both x and w.
    __device__ __forceinline__ Unit(const Params& p, uint32_t unit, uint32_t tokens) {
        const uint32_t token_tiles = (p.tokens - 1) / tokens + 1, row_tiles = (p.n - 1) / kRows + 1;
        const uint32_t tile = unit / p.splits, group = tile / (kRowGroup * token_tiles), rest = tile % (kRowGroup * token_tiles);
        const uint32_t rows = min(kRowGroup, row_tiles - group * kRowGroup);
        first_row = (group * kRowGroup + rest % rows) * kRows;
        first_token = rest / rows * tokens;
        split = unit % p.splits;
        const uint64_t steps = (p.k + kSlice - 1) / kSlice;
        begin = steps * split / p.splits;
        end = steps * (split + 1) / p.splits;
    }

    static __device__ __forceinline__ uint32_t count(const Params& p, uint32_t tokens) {
        return ((p.tokens - 1) / tokens + 1) * ((p.n - 1) / kRows + 1) * p.splits;
    }
};

// Where things are in shared memory.
template <bool Codes, int Tokens, int Stages>
struct Layout {
    static constexpr uint32_t kInputs = Tokens * kTileRow, kWeights = kRows * (Codes ? kSlice / 2 : kTileRow);
    static constexpr uint32_t kScales = Codes ? kRows * 2 * sizeof(float) : 0;  // of both halves of a slice
    static constexpr uint32_t kStage = kInputs + kWeights + kScales;
    static constexpr uint32_t kStaging = 1024;  // of a warp: 32 tokens of 16 rows
    uint32_t full, empty, choice, staging, table, stages;  // addresses

    __device__ __forceinline__ explicit Layout(uint32_t base) {
        stages = base;
        table = stages + Stages * kStage;
        staging = table + (Codes ? Pairs::kBytes : 0);
        choice = staging + kConsumers / 32 * kStaging;
        full = choice + Tokens * sizeof(int32_t);
        empty = full + Stages * 8;
    }
    static constexpr uint32_t bytes() {
        return Stages * kStage + (Codes ? Pairs::kBytes : 0) + kConsumers / 32 * kStaging + Tokens * 4 + Stages * 16;
    }
};

// A power of two that brings the codebook's largest value into [1, 2), so that f16 holds the values; 1 where there is none.
__device__ __forceinline__ float codebook_unit(const Codebook& codebook) {
    float largest = fabsf(codebook.value[threadIdx.x % 16]);
#pragma unroll
    for (int d = 8; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, d));
    const uint32_t exponent = __float_as_uint(largest) >> 23;
    return exponent == 0 || exponent == 255 ? 1.0f : __uint_as_float(exponent << 23);
}

// A lane's column of the table.
struct PairColumn {
    uint32_t table, lane;

    __device__ __forceinline__ PairColumn(uint32_t table, uint32_t lane) : table(table), lane(lane * 4) {}

    // Which byte of a word `look_up` takes.
    static __device__ __forceinline__ uint32_t select(uint32_t byte) { return 0x7604 | byte << 4; }

    // The two values of a byte of codes, the first in `low`. One permutation makes the row's offset and the lane's.
    __device__ __forceinline__ void look_up(uint32_t word, uint32_t selector, float& low, float& high) const {
        uint32_t pair;
        asm("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(table + __byte_perm(word, lane, selector)));
        Pair<f16>::unpack(pair, low, high);
    }
};

// Outputs in their order: a lane has rows g and g + 8 of the warp's 16. To be stored they are turned round in a place of the
// warp's own, 32 tokens by 16 outputs at a time, so that a lane has eight neighbouring outputs of a token.
struct NaturalOrder {
    static __device__ __forceinline__ uint32_t output(uint32_t warp, uint32_t lane, uint32_t i) { return warp * 16 + lane / 4 + i * 8; }

    // The place of the lanes' rows i of a token: four neighbouring tokens are in one order, the next four in the other.
    static __device__ __forceinline__ uint32_t place(uint32_t staging, uint32_t warp, uint32_t token, uint32_t i) {
        return staging + (warp * 32 + token) * 32 + (i ^ (token / 4 & 1)) * 16;
    }

    // Waits for those that share a place.
    static __device__ __forceinline__ void sync(uint32_t) { __syncwarp(); }

    // What a lane stores, in two turns: eight outputs from `output` on of a token of the 32.
    static __device__ __forceinline__ uint4 take(uint32_t staging, uint32_t warp, uint32_t lane, uint32_t turn, uint32_t& token, uint32_t& output) {
        token = turn * 16 + lane / 2, output = warp * 16 + lane % 2 * 8;
        return ptx::load_shared16(place(staging, warp, token, lane % 2));
    }
};

// What a tile of outputs has of the branch: calls `add(adapter, entry, slice)` for the adapters of its tokens in ascending
// order, and for the slices that its rows lie in, where there is a rank. `of(i)` is the adapter of the tile's token i; all
// lanes of a warp take part.
template <typename W, int Tokens, typename Of, typename Add>
__device__ __forceinline__ void for_each_adapter(const Adapters& adapters, uint32_t first_row, Of of, Add add) {
    uint32_t from = 0;
#pragma unroll 1
    while (true) {
        uint32_t current = adapters.count;
#pragma unroll 1
        for (uint32_t i = 0; i < Tokens; i += 32) {
            const uint32_t adapter = of(i + threadIdx.x % 32);
            if (adapter >= from) current = min(current, adapter);
        }
        current = __reduce_min_sync(kAllLanes, current);
        if (current >= adapters.count) break;
#pragma unroll 1
        for (uint32_t slice = 0; slice < adapters.slices; ++slice) {
            const Adapter entry = adapters.entries[size_t(current) * adapters.slices + slice];
            if (W::reaches(entry, first_row)) add(current, entry, slice);
        }
        from = current + 1;
    }
}

// What the first warpgroup does: it fills the stages in their order.
template <template <typename, bool> class Side, typename T, bool Codes, int Tokens, int Stages>
struct Producer {
    using W = Side<T, Codes>;
    using L = Layout<Codes, Tokens, Stages>;
    const Params& p;
    const hopper::TensorMap &x, &w;
    const L& layout;
    uint32_t stage = 0, parity = 1;

    __device__ __forceinline__ Producer(const PrefillParams& all, const L& layout) : p(all.product), x(all.x), w(all.w), layout(layout) {}

    __device__ __forceinline__ void run() {
        const float scale_unit = Codes ? codebook_unit(p.weight.codebook) : 1.0f;
#pragma unroll 1
        for (uint32_t i = blockIdx.x, units = Unit::count(p, Tokens); i < units; i += gridDim.x) {
            const Unit unit(p, i, Tokens);
            const bool branch = p.branch.adapters.entries != nullptr && unit.split == 0;
            if (W::kBranchFirst && branch) fill_branch(unit);
            fill(unit, scale_unit);
            if (!W::kBranchFirst && branch) fill_branch(unit);
        }
    }

    // Ends a stage: what the warp has written to it is there.
    __device__ __forceinline__ void deliver() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) hopper::arrive(layout.full + stage * 8);
        if (++stage == Stages) stage = 0, parity ^= 1;
    }

    __device__ __forceinline__ void fill(const Unit& unit, float scale_unit) {
        const typename W::Scales scales(p, unit);
        PendingAbsmax<4> pending;
        float values[4];
        if (Codes) scales.request(p, unit.begin, pending);
#pragma unroll 1
        for (uint32_t step = unit.begin; step < unit.end; ++step) {
            const uint32_t full = layout.full + stage * 8, at = layout.stages + stage * L::kStage, k = step * kSlice;
            hopper::wait(layout.empty + stage * 8, parity);
            if (threadIdx.x == 0) {
                hopper::arrive_expecting(full, L::kInputs + L::kWeights);
                hopper::copy_box(at, x, k, unit.first_token, full);
                W::copy(at + L::kInputs, w, k, unit.first_row, full);
            }
            if constexpr (Codes) {
                // Two slices at a time: their absmax were asked for two slices ago.
                const uint32_t odd = (step - unit.begin) % 2;
                if (odd == 0) {
                    pending.get(p.weight.absmax, values);
                    scales.request(p, step + 2, pending);
                }
                const float first = scales.exists(p, step, 0) ? (odd ? values[2] : values[0]) * scale_unit : 0.0f;
                const float second = scales.exists(p, step, 1) ? (odd ? values[3] : values[1]) * scale_unit : 0.0f;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + L::kInputs + L::kWeights + scales.place()), "f"(first), "f"(second) : "memory");
            }
            deliver();
        }
    }

    // v of one adapter after the other as further slices of x: 64 ranks at a time, rounded to bf16, then what that leaves.
    // Tokens with other adapters have zeros.
    __device__ __forceinline__ void fill_branch(const Unit& unit) {
        const Adapters& adapters = p.branch.adapters;
        const auto of = [&](uint32_t token) {
            token += unit.first_token;
            return token < p.tokens ? uint32_t(adapters.of(token)) : ~0u;
        };
        for_each_adapter<W, Tokens>(adapters, unit.first_row, of, [&](uint32_t current, const Adapter& entry, uint32_t slice) {
#pragma unroll 1
            for (uint32_t i = 0; i < 2 * ((entry.rank + kSlice - 1) / kSlice); ++i) {
                const uint32_t begin = i / 2 * kSlice, chunks = (min(entry.rank - begin, kSlice) + 15) / 16 * 2;
                hopper::wait(layout.empty + stage * 8, parity);
#pragma unroll 1
                for (uint32_t item = threadIdx.x; item < Tokens * chunks; item += kWarpgroup) {
                    const uint32_t token = item / chunks, chunk = item % chunks;
                    uint32_t words[4] = {};
                    if (of(token) == current) {
#pragma unroll
                        for (uint32_t half = 0; half < 2; ++half) {
                            const uint32_t r = begin + chunk * 8 + half * 4;
                            if (r >= entry.rank) continue;
                            const Split v = load(unit.first_token + token, slice, r);
                            words[2 * half] = i % 2 ? v.low[0] : v.high[0];
                            words[2 * half + 1] = i % 2 ? v.low[1] : v.high[1];
                        }
                    }
                    const uint32_t at = layout.stages + stage * L::kStage + token * kTileRow + (chunk ^ token % 8) * 16;
                    ptx::store_shared16(at, make_uint4(words[0], words[1], words[2], words[3]));
                }
                hopper::fence_async();
                if (threadIdx.x == 0) hopper::arrive(layout.full + stage * 8);
                deliver();
            }
        });
    }

    // Four ranks of v, from `r` on.
    __device__ __forceinline__ Split load(uint32_t token, uint32_t slice, uint32_t r) const {
        const Adapters& adapters = p.branch.adapters;
        const size_t row = size_t(adapters.slices) * adapters.pitch;
        const float4 v = load_v(p.branch.v + token * row + slice * adapters.pitch + r, p.tokens * row, p.branch.parts);
        const float values[4] = {v.x, v.y, v.z, v.w};
        return Split(values);
    }
};

// What a thread of the other two warpgroups does.
template <template <typename, bool> class Side, typename T, bool Codes, int Tokens, int Stages>
struct Consumer {
    using W = Side<T, Codes>;
    using Order = typename W::Order;
    using L = Layout<Codes, Tokens, Stages>;
    const Params& p;
    const Dropout& dropout;
    const L& layout;
    uint32_t warp, lane, stage = 0, parity = 0;
    uint32_t release = 0;  // the barrier of the stage that is still being read, if any
    float sums[Tokens / 2];

    __device__ __forceinline__ Consumer(const PrefillParams& all, const L& layout) : p(all.product), dropout(all.dropout), layout(layout) {
        warp = threadIdx.x / 32 - kWarpgroup / 32;
        lane = threadIdx.x % 32;
    }

    // The products under way are those of the latest slice; the stage before it may be filled again.
    __device__ __forceinline__ void advance() {
        if (release != 0 && lane == 0) hopper::arrive(release);
        release = layout.empty + stage * 8;
        if (++stage == Stages) stage = 0, parity ^= 1;
    }

    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (uint32_t i = blockIdx.x, units = Unit::count(p, Tokens); i < units; i += gridDim.x) {
            const Unit unit(p, i, Tokens);
            const bool branch = p.branch.adapters.entries != nullptr && unit.split == 0;
            if (W::kBranchFirst && branch) {
#pragma unroll
                for (float& sum : sums) sum = 0.0f;
                add_branch(unit);
            }
            const uint32_t started = W::kBranchFirst && branch;  // whether the sums hold something
            if constexpr (Codes) multiply_codes(unit, started); else multiply_dense(unit, started);
            hopper::wait_products<0>();
            if (lane == 0) hopper::arrive(release);
            release = 0;
            if (!W::kBranchFirst && branch) add_branch(unit);
            if (p.output.partial != nullptr) keep(unit); else store(unit);
        }
    }

    __device__ __forceinline__ void multiply_dense(const Unit& unit, uint32_t started) {
        // A loop of two slices, as for codes: the assembler then sees that nothing else touches the sums.
        uint32_t step = unit.begin;
        while (true) {
            multiply_dense_slice(started | (step - unit.begin));
            if (++step == unit.end) break;
            multiply_dense_slice(started | (step - unit.begin));
            if (++step == unit.end) break;
        }
    }

    __device__ __forceinline__ void multiply_dense_slice(uint32_t add) {
        hopper::wait(layout.full + stage * 8, parity);
        const uint32_t at = layout.stages + stage * L::kStage;
        const uint64_t x = hopper::describe(at), w = hopper::describe(W::left(at + L::kInputs, warp));
        hopper::fence_registers();
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) hopper::Product<T, Tokens>::template add<W::kColumns>(sums, w + W::kNext * j, x + 2 * j, add | j);
        hopper::commit_products();
        hopper::wait_products<1>();
        advance();
    }

    __device__ __forceinline__ void multiply_codes(const Unit& unit, uint32_t started) {
        const typename W::Operands codes(layout.table, warp, lane);
        uint32_t operands[2][4][4];
        // Two slices at a time, so that operands alternate without being moved.
        uint32_t step = unit.begin;
        while (true) {
            multiply_slice(codes, operands[0], started | (step - unit.begin));
            if (++step == unit.end) break;
            multiply_slice(codes, operands[1], started | (step - unit.begin));
            if (++step == unit.end) break;
        }
    }

    // The products of one slice of codes; `add` is 0 where the sums begin.
    __device__ __forceinline__ void multiply_slice(const typename W::Operands& codes, uint32_t (&operands)[4][4], uint32_t add) {
        hopper::wait(layout.full + stage * 8, parity);
        const uint32_t at = layout.stages + stage * L::kStage;
        const uint64_t x = hopper::describe(at);
        codes.decode(at + L::kInputs, at + L::kInputs + L::kWeights, operands);
        hopper::fence_registers();
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) hopper::Product<T, Tokens>::add(sums, operands[j], x + 2 * j, add | j);
        hopper::commit_products();
        hopper::wait_products<1>();
        advance();
    }

    // The low-rank branch, as further steps of the sum: v and b as sums of two bf16, three products of four (the fourth is
    // below the others' rounding).
    __device__ __forceinline__ void add_branch(const Unit& unit) {
        const Adapters& adapters = p.branch.adapters;
        const uint32_t thread = threadIdx.x - kWarpgroup;
        hopper::sync_some<kConsumers>(1);
        if (thread < Tokens) {
            const uint32_t token = unit.first_token + thread;
            const int32_t adapter = token < p.tokens ? adapters.of(token) : -1;
            asm volatile("st.shared.s32 [%0], %1;" ::"r"(layout.choice + thread * 4), "r"(adapter) : "memory");
        }
        hopper::sync_some<kConsumers>(1);
        const auto of = [&](uint32_t token) { return choice(token); };
        bool whole = true;
        for_each_adapter<W, Tokens>(adapters, unit.first_row, of, [&](uint32_t, const Adapter& entry, uint32_t) {
            whole &= add_adapter(unit, entry);
        });
        if (!__all_sync(kAllLanes, whole)) spoil_broken(unit);
        W::template drop<Tokens>(dropout, unit.first_row, unit.first_token, warp, lane, sums);
        // Tokens whose adapter is none.
        bool wrong = false;
        for (uint32_t i = lane; i < Tokens; i += 32) wrong = wrong || adapters.is_wrong(int32_t(choice(i)));
        if (__any_sync(kAllLanes, wrong)) {
            spoil([&](uint32_t adapter, int) { return adapters.is_wrong(int32_t(adapter)); });
        }
    }

    __device__ __forceinline__ uint32_t choice(uint32_t token) const {
        uint32_t adapter;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(adapter) : "r"(layout.choice + token * 4) : "memory");
        return adapter;
    }

    // Returns whether the lane has seen nothing but numbers in b.
    __device__ __forceinline__ bool add_adapter(const Unit& unit, const Adapter& adapter) {
        const bool b_is_bf16 = std::is_same<T, bf16>::value && !p.branch.b_is_f32;
        bool whole = true;
#pragma unroll 1
        for (uint32_t begin = 0; begin < adapter.rank; begin += kSlice) {
            // A slice of v as bf16, and one of what that leaves.
            const uint64_t high_v = await_stage();
            const uint64_t low_v = await_stage();
#pragma unroll 1
            for (uint32_t r = begin; r < min(begin + kSlice, adapter.rank); r += 16) {
                uint32_t high[4], low[4];
#pragma unroll
                for (uint32_t i = 0; i < 2; ++i) {
                    float b[4] = {};
                    const uint32_t row = W::row_of(adapter, unit.first_row + Order::output(warp, lane, i));
                    if (row < W::rows_of(adapter, p)) {
                        W::load_pair(p, adapter, row, r + lane % 4 * 2, b[0], b[1]);
                        W::load_pair(p, adapter, row, r + lane % 4 * 2 + 8, b[2], b[3]);
                    }
                    // What is not a number must not reach, times zero, tokens with other adapters.
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        if (!isfinite(b[e])) whole = false, b[e] = 0.0f;
                    }
                    const Split split(b);
                    high[i] = split.high[0], high[2 + i] = split.high[1];
                    low[i] = split.low[0], low[2 + i] = split.low[1];
                }
                const uint32_t at = (r - begin) / 8;
                hopper::fence_registers();
                hopper::Product<bf16, Tokens>::add(sums, high, high_v + at, 1);
                hopper::Product<bf16, Tokens>::add(sums, high, low_v + at, 1);
                hopper::commit_products();
                hopper::wait_products<0>();
                if (b_is_bf16) continue;
                hopper::fence_registers();
                hopper::Product<bf16, Tokens>::add(sums, low, high_v + at, 1);
                hopper::commit_products();
                hopper::wait_products<0>();
            }
            // Nothing reads the two stages any more.
            __syncwarp();
            if (lane < 2) hopper::arrive(layout.empty + (stage + Stages - 2 + lane) % Stages * 8);
        }
        return whole;
    }

    // Waits for the next stage, and describes its x; goes on to the one after it.
    __device__ __forceinline__ uint64_t await_stage() {
        hopper::wait(layout.full + stage * 8, parity);
        const uint64_t x = hopper::describe(layout.stages + stage * L::kStage);
        if (++stage == Stages) stage = 0, parity ^= 1;
        return x;
    }

    // Outputs become NaN where the token's adapter has, in that row of b, what is not a number.
    __device__ __forceinline__ void spoil_broken(const Unit& unit) {
        const Adapters& adapters = p.branch.adapters;
        const auto of = [&](uint32_t token) { return choice(token); };
        for_each_adapter<W, Tokens>(adapters, unit.first_row, of, [&](uint32_t current, const Adapter& entry, uint32_t) {
            bool broken[2];
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t row = W::row_of(entry, unit.first_row + Order::output(warp, lane, i));
                bool whole = true;
#pragma unroll 1
                for (uint32_t r = lane % 4 * 2; row < W::rows_of(entry, p) && r < entry.rank; r += 8) {
                    float first, second;
                    W::load_pair(p, entry, row, r, first, second);
                    whole = whole && isfinite(first) && isfinite(second);
                }
                // The four lanes of a row have looked at different ranks.
                broken[i] = (__ballot_sync(kAllLanes, !whole) >> (lane & ~3u) & 15) != 0;
            }
            spoil([&](uint32_t adapter, int i) { return adapter == current && broken[i]; });
        });
    }

    // Makes sums NaN: those of the lane's row i (of two) for tokens with an adapter that `which` picks.
    template <typename Which>
    __device__ __forceinline__ void spoil(Which which) {
#pragma unroll
        for (uint32_t m = 0; m < Tokens / 8; ++m) {
            const uint2 adapters = ptx::load_shared8(layout.choice + (m * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (which(e % 2 ? adapters.y : adapters.x, e / 2)) sums[m * 4 + e] = nan_value();
            }
        }
    }

    // Leaves the sums of one split for `matmul_finish`.
    __device__ __forceinline__ void keep(const Unit& unit) const {
        float* partial = p.output.partial + size_t(unit.split) * p.tokens * p.n;
#pragma unroll
        for (uint32_t m = 0; m < Tokens / 8; ++m) {
#pragma unroll
            for (uint32_t e = 0; e < 4; ++e) {
                const uint32_t token = unit.first_token + m * 8 + lane % 4 * 2 + e % 2, n = unit.first_row + Order::output(warp, lane, e / 2);
                if (token < p.tokens && n < p.n) partial[size_t(token) * p.n + n] = sums[m * 4 + e];
            }
        }
    }

    // Ends the sums and stores them, 32 tokens at a time.
    __device__ __forceinline__ void store(const Unit& unit) const {
        const bool vectors = p.n % 8 == 0;
        float scale[2], offset[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Column<T> column(p.output, p.n, min(unit.first_row + Order::output(warp, lane, i), p.n - 1));
            scale[i] = column.scale, offset[i] = column.offset;
        }
#pragma unroll
        for (uint32_t block = 0; block < Tokens / 32; ++block) {
            Order::sync(warp);
#pragma unroll
            for (uint32_t pair = 0; pair < 2; ++pair) {
                uint32_t words[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i) {
                    const uint32_t at = (block * 4 + pair * 2 + i / 2) * 4 + i % 2 * 2;
                    words[i] = Pair<T>::pack(fmaf(scale[i % 2], sums[at], offset[i % 2]), fmaf(scale[i % 2], sums[at + 1], offset[i % 2]));
                }
                const uint32_t to = Order::place(layout.staging, warp, pair * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
                hopper::store_transposed(to, words[0], words[1], words[2], words[3]);
            }
            Order::sync(warp);
#pragma unroll
            for (uint32_t turn = 0; turn < 2; ++turn) {
                uint32_t token, row;
                const uint4 words = Order::take(layout.staging, warp, lane, turn, token, row);
                token += unit.first_token + block * 32, row += unit.first_row;
                T* y = static_cast<T*>(p.output.y) + size_t(token) * p.n + row;
                if (token >= p.tokens || row >= p.n) continue;
                if (vectors) {
                    *reinterpret_cast<uint4*>(y) = words;
                } else {
#pragma unroll
                    for (uint32_t i = 0; i < 8; ++i) {
                        if (row + i < p.n) y[i] = T{uint16_t(word(words, i / 2) >> i % 2 * 16)};
                    }
                }
            }
        }
    }
};

template <template <typename, bool> class Side, typename T, bool Codes, int Tokens, int Stages>
__device__ __forceinline__ void prefill(const PrefillParams& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    using L = Layout<Codes, Tokens, Stages>;
    const L layout(ptx::shared_address(memory));
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < Stages; ++i) {
            hopper::init_barrier(layout.full + i * 8, 1 + kWarpgroup / 32);
            hopper::init_barrier(layout.empty + i * 8, kConsumers / 32);
        }
        hopper::fence_barrier_init();
        hopper::prefetch(p.x);
        hopper::prefetch(p.w);
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        hopper::give_registers<72>();
        Producer<Side, T, Codes, Tokens, Stages>(p, layout).run();
    } else {
        hopper::take_registers<216>();
        if constexpr (Codes) {
            const Codebook& codebook = p.product.weight.codebook;
            Pairs::build(codebook, layout.table, threadIdx.x - kWarpgroup, codebook_unit(codebook));
            hopper::sync_some<kConsumers>(1);
        }
        Consumer<Side, T, Codes, Tokens, Stages>(p, layout).run();
    }
}

// Where devices are not Hopper, the entries exist without a body, and no plan names them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PREFILL_BODY(...) __VA_ARGS__(p)
#else
#define PREFILL_BODY(...)
#endif
#define PREFILL_ENTRY(NAME, ...)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) NAME(const __grid_constant__ PrefillParams p) { \
        PREFILL_BODY(__VA_ARGS__);                                                                                     \
    }
#define PREFILL_ENTRIES(NAME, SIDE, T)                                            \
    PREFILL_ENTRY(NAME##_nf4_##T##_t64, prefill<SIDE, T, true, 64, 8>)            \
    PREFILL_ENTRY(NAME##_nf4_##T##_t128, prefill<SIDE, T, true, 128, 6>)          \
    PREFILL_ENTRY(NAME##_nf4_##T##_t256, prefill<SIDE, T, true, 256, 4>)          \
    PREFILL_ENTRY(NAME##_dense_##T##_t64, prefill<SIDE, T, false, 64, 8>)         \
    PREFILL_ENTRY(NAME##_dense_##T##_t128, prefill<SIDE, T, false, 128, 6>)       \
    PREFILL_ENTRY(NAME##_dense_##T##_t256, prefill<SIDE, T, false, 256, 4>)
