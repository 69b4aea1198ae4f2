// y = row_scale * (x w^T + v b^T) + bias for 16-bit x and many tokens, on Hopper: products of warpgroups, f32 sums.
//
// A block takes 128 rows of w and `Tokens` tokens at a time. One warpgroup has slices of 64 elements of k copied to shared
// memory, some stages ahead; the other two multiply, 64 rows each. The weight is the left operand, so that a thread keeps
// two rows of it: codes become elements in the registers that the product reads, by one load from a table of pairs and one
// f32 product with absmax. The right operand, x, stays in shared memory.
//
// Blocks go on to further tiles until all are done; where there are too few tiles for the device, they share the sum over k,
// and `matmul_finish` adds the parts. The other kernels of `matmul` serve devices that are not Hopper; for them the entries
// here exist without a body, and no plan names them.

#include "hopper.cuh"
#include "product.cuh"
#include "tile.cuh"

// Twin: cuda::matmul::PrefillParams. x in boxes of `Tokens` by 64, codes in boxes of 128 rows by 32 bytes, a dense w in boxes of
// 128 by 64, permuted within rows of a box.
struct PrefillParams {
    hopper::TensorMap x, w;
    Params product;
};
static_assert(sizeof(PrefillParams) == 512, "the Rust twin has this size");

constexpr uint32_t kWarpgroup = 128, kConsumers = 2 * kWarpgroup, kThreads = kWarpgroup + kConsumers;
constexpr uint32_t kRows = 128;                  // of w of a block
constexpr uint32_t kRowGroup = 8;                // row tiles that blocks walk over before they go on to other tokens
constexpr uint32_t kTablePitch = 256;            // bytes from pair to pair

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
        staging = table + (Codes ? 256 * kTablePitch : 0);
        choice = staging + kConsumers / 32 * kStaging;
        full = choice + Tokens * sizeof(int32_t);
        empty = full + Stages * 8;
    }
    static constexpr uint32_t bytes() {
        return Stages * kStage + (Codes ? 256 * kTablePitch : 0) + kConsumers / 32 * kStaging + Tokens * 4 + Stages * 16;
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

// The table: for every byte the two values it stands for as f16, in units of `codebook_unit`, once for each bank. Lane l
// reads column l, so no two lanes meet in a bank.
__device__ __forceinline__ void build_table(const Codebook& codebook, uint32_t table, uint32_t thread) {
    static_assert(kConsumers == 256, "a thread for every byte");
    const float mine = codebook.value[thread % 16] / codebook_unit(codebook);
    const float first = __shfl_sync(kAllLanes, mine, int(thread >> 4), 16);
    const float second = __shfl_sync(kAllLanes, mine, int(thread & 15), 16);
    const uint32_t pair = Pair<f16>::pack(first, second);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        // Lanes that shared memory serves together write to different banks.
        ptx::store_shared16(table + thread * kTablePitch + (thread + i) % 8 * 16, make_uint4(pair, pair, pair, pair));
    }
}

// The elements of a thread in one slice: its rows are r and r + 8 of the warp's 16, the warp's 16 are those of the tile.
template <typename T>
struct Decoder {
    uint32_t column, selector;  // the table at the lane's column; which byte of a word is the lane's

    __device__ __forceinline__ Decoder(uint32_t table, uint32_t lane) {
        column = table + lane * 4;
        selector = 0x4404 | lane % 4 << 4;  // permute: byte t of the word becomes byte 1, all others are zero
    }

    __device__ __forceinline__ uint32_t operator()(uint32_t word, float scale) const {
        uint32_t pair;
        asm("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(column + __byte_perm(word, 0, selector)));
        float low, high;
        Pair<f16>::unpack(pair, low, high);
        return Pair<T>::pack(__fmul_rn(low, scale), __fmul_rn(high, scale));
    }
};

// What a tile of outputs has of the branch: calls `add(adapter, entry, slice)` for the adapters of its tokens in ascending
// order, and for the slices that its rows lie in, where there is a rank. `of(i)` is the adapter of the tile's token i; all
// lanes of a warp take part.
template <int Tokens, typename Of, typename Add>
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
            if (reaches(entry, first_row, kRows)) add(current, entry, slice);
        }
        from = current + 1;
    }
}

// What the first warpgroup does: it fills the stages in their order. A thread has the absmax of one row of codes.
template <typename T, bool Codes, int Tokens, int Stages>
struct Producer {
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
            fill(unit, scale_unit);
            if (p.branch.adapters.entries != nullptr && unit.split == 0) fill_branch(unit);
        }
    }

    // Ends a stage: what the warp has written to it is there.
    __device__ __forceinline__ void deliver() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) hopper::arrive(layout.full + stage * 8);
        if (++stage == Stages) stage = 0, parity ^= 1;
    }

    __device__ __forceinline__ void fill(const Unit& unit, float scale_unit) {
        const RowBlocks blocks(p, unit.first_row + threadIdx.x);
        PendingAbsmax<4> pending;
        float scales[4];
        if (Codes) {
            prefetch_absmax(blocks, unit);
            request(pending, blocks, unit.begin);
        }
#pragma unroll 1
        for (uint32_t step = unit.begin; step < unit.end; ++step) {
            const uint32_t full = layout.full + stage * 8, at = layout.stages + stage * L::kStage, k = step * kSlice;
            hopper::wait(layout.empty + stage * 8, parity);
            if (threadIdx.x == 0) {
                hopper::arrive_expecting(full, L::kInputs + L::kWeights);
                hopper::copy_box(at, x, k, unit.first_token, full);
                hopper::copy_box(at + L::kInputs, w, Codes ? k / 2 : k, unit.first_row, full);
            }
            if constexpr (Codes) {
                // Two slices at a time: their absmax were asked for two slices ago.
                const uint32_t odd = (step - unit.begin) % 2;
                if (odd == 0) {
                    pending.get(p.weight.absmax, scales);
                    request(pending, blocks, step + 2);
                }
                const float first = (odd ? scales[2] : scales[0]) * scale_unit, second = (odd ? scales[3] : scales[1]) * scale_unit;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + L::kInputs + L::kWeights + threadIdx.x * 8), "f"(first),
                             "f"(k + 32 < p.k ? second : 0.0f)
                             : "memory");
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
        for_each_adapter<Tokens>(adapters, unit.first_row, of, [&](uint32_t current, const Adapter& entry, uint32_t slice) {
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

    // Asks L2 for the absmax of the thread's row, in lines of 128 bytes.
    __device__ __forceinline__ void prefetch_absmax(const RowBlocks& blocks, const Unit& unit) const {
        const Absmax& absmax = p.weight.absmax;
        const bool plain = absmax.plain != nullptr;
        const uint64_t begin = blocks.find(p, 0, unit.begin * kSlice), end = blocks.find(p, 0, min(unit.end * kSlice, p.k) - 1);
        const uint32_t size = plain ? sizeof(float) : 1;
        const uint8_t* from = plain ? reinterpret_cast<const uint8_t*>(absmax.plain) : absmax.q;
#pragma unroll 1
        for (uint64_t block = begin; block <= end; block += 128 / size) hopper::prefetch_l2(from + block * size);
    }

    // The absmax of the thread's row in a slice and the next one, two halves each.
    __device__ __forceinline__ void request(PendingAbsmax<4>& pending, const RowBlocks& blocks, uint32_t step) const {
        uint64_t block[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t k = step * kSlice + i * 32;
            block[i] = blocks.find(p, 0, k < p.k ? k : 0);
        }
        pending.request(p.weight.absmax, block);
    }
};

// What a thread of the other two warpgroups does.
template <typename T, bool Codes, int Tokens, int Stages>
struct Consumer {
    using L = Layout<Codes, Tokens, Stages>;
    const Params& p;
    const L& layout;
    uint32_t warp, lane, stage = 0, parity = 0;
    uint32_t release = 0;  // the barrier of the stage that is still being read, if any
    float sums[Tokens / 2];

    __device__ __forceinline__ Consumer(const Params& p, const L& layout) : p(p), layout(layout) {
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
            if constexpr (Codes) multiply_codes(unit); else multiply_dense(unit);
            hopper::wait_products<0>();
            if (lane == 0) hopper::arrive(release);
            release = 0;
            if (p.branch.adapters.entries != nullptr && unit.split == 0) add_branch(unit);
            if (p.output.partial != nullptr) keep(unit); else store(unit);
        }
    }

    __device__ __forceinline__ void multiply_dense(const Unit& unit) {
        // A loop of two slices, as for codes: the assembler then sees that nothing else touches the sums.
        uint32_t step = unit.begin;
        while (true) {
            multiply_dense_slice(step - unit.begin);
            if (++step == unit.end) break;
            multiply_dense_slice(step - unit.begin);
            if (++step == unit.end) break;
        }
    }

    __device__ __forceinline__ void multiply_dense_slice(uint32_t add) {
        hopper::wait(layout.full + stage * 8, parity);
        const uint32_t at = layout.stages + stage * L::kStage;
        const uint64_t x = hopper::describe(at), w = hopper::describe(at + L::kInputs + warp / 4 * 64 * kTileRow);
        hopper::fence_registers();
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) hopper::Product<T, Tokens>::add(sums, w + 2 * j, x + 2 * j, add | j);
        hopper::commit_products();
        hopper::wait_products<1>();
        advance();
    }

    __device__ __forceinline__ void multiply_codes(const Unit& unit) {
        const Decoder<T> decode(layout.table, lane);
        const uint32_t row = warp * 16 + lane / 4;
        uint32_t operands[2][4][4];
        // Two slices at a time, so that operands alternate without being moved.
        uint32_t step = unit.begin;
        while (true) {
            multiply_slice(decode, row, operands[0], step - unit.begin);
            if (++step == unit.end) break;
            multiply_slice(decode, row, operands[1], step - unit.begin);
            if (++step == unit.end) break;
        }
    }

    // The products of one slice of codes; `add` is 0 for the first one.
    __device__ __forceinline__ void multiply_slice(const Decoder<T>& decode, uint32_t row, uint32_t (&operands)[4][4], uint32_t add) {
        hopper::wait(layout.full + stage * 8, parity);
        const uint32_t at = layout.stages + stage * L::kStage, codes = at + L::kInputs + row * (kSlice / 2), chunk = row / 4 & 1;
        const uint32_t scales = at + L::kInputs + L::kWeights + row * 8;
        const uint64_t x = hopper::describe(at);
        const uint2 low = ptx::load_shared8(scales), high = ptx::load_shared8(scales + 64);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint4 a = ptx::load_shared16(codes + (half ^ chunk) * 16), b = ptx::load_shared16(codes + 256 + (half ^ chunk) * 16);
            const float scale_a = __uint_as_float(half ? low.y : low.x), scale_b = __uint_as_float(half ? high.y : high.x);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t(&operand)[4] = operands[half * 2 + j];
                operand[0] = decode(word(a, 2 * j), scale_a);
                operand[1] = decode(word(b, 2 * j), scale_b);
                operand[2] = decode(word(a, 2 * j + 1), scale_a);
                operand[3] = decode(word(b, 2 * j + 1), scale_b);
            }
        }
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
        hopper::sync_some<1, kConsumers>();
        if (thread < Tokens) {
            const uint32_t token = unit.first_token + thread;
            const int32_t adapter = token < p.tokens ? adapters.of(token) : -1;
            asm volatile("st.shared.s32 [%0], %1;" ::"r"(layout.choice + thread * 4), "r"(adapter) : "memory");
        }
        hopper::sync_some<1, kConsumers>();
        const auto of = [&](uint32_t token) { return choice(token); };
        bool whole = true;
        for_each_adapter<Tokens>(adapters, unit.first_row, of, [&](uint32_t, const Adapter& entry, uint32_t) {
            whole &= add_adapter(unit, entry);
        });
        if (!__all_sync(kAllLanes, whole)) spoil_broken(unit);
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
        const uint32_t row = unit.first_row + warp * 16 + lane / 4 - adapter.first_row;  // outside of the slice it is large
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
                    if (row + i * 8 < adapter.rows) {
                        load_pair(adapter, row + i * 8, r + lane % 4 * 2, b[0], b[1]);
                        load_pair(adapter, row + i * 8, r + lane % 4 * 2 + 8, b[2], b[3]);
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
        const uint32_t row = unit.first_row + warp * 16 + lane / 4;
        const auto of = [&](uint32_t token) { return choice(token); };
        for_each_adapter<Tokens>(adapters, unit.first_row, of, [&](uint32_t current, const Adapter& entry, uint32_t) {
            bool broken[2];
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t n = row + i * 8 - entry.first_row;
                bool whole = true;
#pragma unroll 1
                for (uint32_t r = lane % 4 * 2; n < entry.rows && r < entry.rank; r += 8) {
                    float first, second;
                    load_pair(entry, n, r, first, second);
                    whole = whole && isfinite(first) && isfinite(second);
                }
                // The four lanes of a row have looked at different ranks.
                broken[i] = (__ballot_sync(kAllLanes, !whole) >> (lane & ~3u) & 15) != 0;
            }
            spoil([&](uint32_t adapter, int i) { return adapter == current && broken[i]; });
        });
    }

    __device__ __forceinline__ void load_pair(const Adapter& adapter, uint32_t row, uint32_t r, float& first, float& second) const {
        float values[2];
        if (p.branch.b_is_f32) {
            load_padded(static_cast<const float*>(adapter.b) + size_t(row) * adapter.rank, r, adapter.rank, values);
        } else {
            load_padded(static_cast<const T*>(adapter.b) + size_t(row) * adapter.rank, r, adapter.rank, values);
        }
        first = values[0], second = values[1];
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
        const uint32_t row = unit.first_row + warp * 16 + lane / 4;
        float* partial = p.output.partial + size_t(unit.split) * p.tokens * p.n;
#pragma unroll
        for (uint32_t m = 0; m < Tokens / 8; ++m) {
#pragma unroll
            for (uint32_t e = 0; e < 4; ++e) {
                const uint32_t token = unit.first_token + m * 8 + lane % 4 * 2 + e % 2, n = row + e / 2 * 8;
                if (token < p.tokens && n < p.n) partial[size_t(token) * p.n + n] = sums[m * 4 + e];
            }
        }
    }

    // Ends the sums and turns them round in the warp's own staging place, 32 tokens by 16 rows at a time, so that a lane
    // stores eight neighbouring outputs.
    __device__ __forceinline__ void store(const Unit& unit) const {
        const uint32_t first = unit.first_row + warp * 16, staging = layout.staging + warp * L::kStaging;
        const bool vectors = p.n % 8 == 0;
        float scale[2], offset[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Column<T> column(p.output, p.n, min(first + lane / 4 + i * 8, p.n - 1));
            scale[i] = column.scale, offset[i] = column.offset;
        }
        // The place of 16 bytes, eight rows: four neighbouring tokens are in one order, the next four in the other.
        const auto place = [&](uint32_t token, uint32_t half) { return staging + token * 32 + (half ^ (token / 4 & 1)) * 16; };
#pragma unroll
        for (uint32_t block = 0; block < Tokens / 32; ++block) {
            __syncwarp();
#pragma unroll
            for (uint32_t pair = 0; pair < 2; ++pair) {
                uint32_t words[4];
#pragma unroll
                for (uint32_t i = 0; i < 4; ++i) {
                    const uint32_t at = (block * 4 + pair * 2 + i / 2) * 4 + i % 2 * 2;
                    words[i] = Pair<T>::pack(fmaf(scale[i % 2], sums[at], offset[i % 2]), fmaf(scale[i % 2], sums[at + 1], offset[i % 2]));
                }
                hopper::store_transposed(place(pair * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2), words[0], words[1], words[2], words[3]);
            }
            __syncwarp();
#pragma unroll
            for (uint32_t pair = 0; pair < 2; ++pair) {
                const uint32_t in_block = pair * 16 + lane / 2, token = unit.first_token + block * 32 + in_block, row = first + lane % 2 * 8;
                const uint4 words = ptx::load_shared16(place(in_block, lane % 2));
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

template <typename T, bool Codes, int Tokens, int Stages>
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
        Producer<T, Codes, Tokens, Stages>(p, layout).run();
    } else {
        hopper::take_registers<216>();
        if constexpr (Codes) {
            build_table(p.product.weight.codebook, layout.table, threadIdx.x - kWarpgroup);
            hopper::sync_some<1, kConsumers>();
        }
        Consumer<T, Codes, Tokens, Stages>(p.product, layout).run();
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BODY(...) __VA_ARGS__(p)
#else
#define BODY(...)
#endif
#define ENTRY(KIND, CODES, T, TOKENS, STAGES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) prefill_##KIND##_##T##_t##TOKENS(const __grid_constant__ PrefillParams p) { \
        BODY(prefill<T, CODES, TOKENS, STAGES>);                                                                                   \
    }
#define ENTRIES(T)                    \
    ENTRY(nf4, true, T, 64, 8)        \
    ENTRY(nf4, true, T, 128, 6)       \
    ENTRY(nf4, true, T, 256, 4)       \
    ENTRY(dense, false, T, 64, 8)     \
    ENTRY(dense, false, T, 128, 6)    \
    ENTRY(dense, false, T, 256, 4)

ENTRIES(f16)
ENTRIES(bf16)
