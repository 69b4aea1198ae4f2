// What the kernels of `matmul` and `expert_matmul` are told: y = row_scale * (x w^T + v b^T) + bias.
#pragma once

#include <cstdint>

#include "epilogue.cuh"
#include "nf4.cuh"
#include "ptx.cuh"

// The weight, [n, k] row by row.
struct Weight {
    const void* data;      // packed codes, or elements of x's type
    Absmax absmax;         // of codes
    Codebook codebook;     // of codes
    uint32_t block_shift;  // of codes: log2 of the blocksize
    uint32_t padding;
};

struct Params {
    const void* x;  // [tokens, k]
    Weight weight;
    LowRank branch;
    Output output;
    uint32_t tokens;
    uint32_t n;
    uint32_t k;
    uint32_t splits;  // gridDim.y: blocks that share the sum over k
};
static_assert(sizeof(Params) == 224, "the Rust twin has this size");

// The rows of y that share an expert, as `expert_groups` leaves them: group i has the rows row[start[i]] ... row[start[i + 1] - 1]
// and the weight `expert[i]` of the stack, -1 for none and -2 for a wrong number. Groups that are not used are empty.
struct ExpertGroups {
    const int32_t* start;   // [count + 1]
    const int32_t* expert;  // [count]
    const int32_t* row;     // [tokens]
    uint32_t count;         // there may be so many
    uint32_t choices;       // rows of y for each of x
};

// Of a product with a stack of weights [experts, n, k]; `tokens` are the rows of y.
struct ExpertParams : Params {
    ExpertGroups groups;
};
static_assert(sizeof(ExpertParams) == 256, "the Rust twin has this size");

// The share of a block in a product: `Rows` rows of w, and `Tokens` tokens.
template <int Rows, int Tokens>
struct Share : InOrder {
    uint32_t first_row, first_token;
    static constexpr uint32_t above = 0;  // rows of the stack before this weight's

    __device__ __forceinline__ explicit Share(const Params& p) {
        const uint32_t token_tiles = (p.tokens - 1) / Tokens + 1;
        first_row = blockIdx.x / token_tiles * Rows, first_token = blockIdx.x % token_tiles * Tokens;
    }

    template <typename T>
    __device__ __forceinline__ bool ends(const Params&) const { return false; }

    // A tile of weights, of the rows from `first_row` on, where the warp has those from `row` on; or one that `fill` fills.
    template <typename Weights>
    __device__ __forceinline__ Weights weights(const Params& p, uint32_t row) const { return Weights(p, first_row, row); }
    template <typename Fill>
    __device__ __forceinline__ void fill(Fill fill, uint8_t* tile, uint32_t k) const { fill(tile, first_row, k); }
};

// The same in a product with a stack: the tokens are positions in the list of groups. Tile t of group i is slot
// start[i] / Tokens + i + t of the grid: slots of different groups differ, as start[i] / Tokens and the tiles of i are together
// at most start[i + 1] / Tokens + 1. Neighbouring blocks have the same rows of w, or those of the next expert.
template <int Rows, int Tokens>
struct ExpertShare {
    // In shared memory: in registers it would be kept through the whole product.
    struct Place {
        uint32_t first_row, first_token, last, above;
        int32_t expert;
    };
    const ExpertParams& p;
    const uint32_t &first_row, &first_token, &last, &above;
    const int32_t& expert;

    // Called by all threads of the block.
    __device__ __forceinline__ explicit ExpertShare(const ExpertParams& p) : ExpertShare(p, find(p)) {}
    __device__ __forceinline__ ExpertShare(const ExpertParams& p, const Place& place)
        : p(p), first_row(place.first_row), first_token(place.first_token), last(place.last), above(place.above), expert(place.expert) {}

    static __device__ __forceinline__ const Place& find(const ExpertParams& p) {
        __shared__ Place place;
        const ExpertGroups& groups = p.groups;
        const uint32_t slots = p.tokens / Tokens + groups.count, slot = blockIdx.x % slots;
        if (threadIdx.x < 32) {
            uint32_t before = 0;  // groups that begin with this slot or one before
#pragma unroll 4
            for (uint32_t first = 0; first < groups.count; first += 32) {
                const uint32_t i = first + threadIdx.x;
                const bool begins = i < groups.count && uint32_t(groups.start[i]) / Tokens + i <= slot;
                before += __popc(__ballot_sync(0xffffffffu, begins));
            }
            if (threadIdx.x == 0) {
                const uint32_t group = before - 1, start = groups.start[group];  // the first one has slot 0
                place.first_row = blockIdx.x / slots * Rows;
                place.first_token = start + (slot - start / Tokens - group) * Tokens;
                place.last = groups.start[group + 1];
                place.expert = groups.expert[group];
                place.above = max(place.expert, 0) * p.n;
            }
        }
        __syncthreads();
        return place;
    }

    __device__ __forceinline__ uint32_t end(uint32_t) const { return last; }
    __device__ __forceinline__ uint32_t row(uint32_t token) const { return p.groups.row[token]; }
    __device__ __forceinline__ uint32_t input(uint32_t token) const { return row(token) / p.groups.choices; }

    // Whether there is no product to make: the slot is not used, or its rows have no expert and become zeros (NaN for a wrong one).
    template <typename T>
    __device__ __forceinline__ bool ends(const Params&) const {
        if (first_token >= last) return true;
        if (expert >= 0) return false;
        const T value = from_f32<T>(expert == -1 ? 0.0f : nan_value());
        for (uint32_t i = threadIdx.x; i < Tokens * Rows; i += blockDim.x) {
            const uint32_t token = first_token + i / Rows, column = first_row + i % Rows;
            if (token < last && column < p.n) static_cast<T*>(p.output.y)[size_t(row(token)) * p.n + column] = value;
        }
        return true;
    }

    template <typename Weights>
    __device__ __forceinline__ Weights weights(const Params&, uint32_t row) const { return Weights(p, first_row, row, above); }
    template <typename Fill>
    __device__ __forceinline__ void fill(Fill fill, uint8_t* tile, uint32_t k) const { fill(tile, first_row, k, above); }
};

template <int Rows, int Tokens>
__device__ __forceinline__ Share<Rows, Tokens> share_of(const Params& p) { return Share<Rows, Tokens>(p); }
template <int Rows, int Tokens>
__device__ __forceinline__ ExpertShare<Rows, Tokens> share_of(const ExpertParams& p) { return ExpertShare<Rows, Tokens>(p); }

// The blocks of 4-bit codes that a lane's rows lie in: `row`, and others that follow it. Rows past the end repeat the last.
struct RowBlocks {
    uint64_t flat;  // where the first row begins
    uint32_t last;  // rows that follow the first

    __device__ __forceinline__ RowBlocks(const Params& p, uint32_t row, uint32_t above = 0) {
        last = p.n - 1 - min(row, p.n - 1);
        flat = uint64_t(above + p.n - 1 - last) * p.k;
    }

    __device__ __forceinline__ uint64_t find(const Params& p, uint32_t following, uint32_t k) const {
        return (flat + uint64_t(min(following, last)) * p.k + k) >> p.weight.block_shift;
    }
};

// The absmax of some blocks on their way from memory. A nested one takes two loads, one after the other; the second, from
// a table that lies in L1, is put off until the value is asked for.
template <int Count>
struct PendingAbsmax {
    float value[Count];  // or the outer absmax
    uint32_t code[Count];

    __device__ __forceinline__ void request(const Absmax& absmax, const uint64_t (&block)[Count]) {
        if (absmax.plain != nullptr) {
#pragma unroll
            for (int i = 0; i < Count; ++i) value[i] = __ldg(absmax.plain + block[i]);
        } else {
#pragma unroll
            for (int i = 0; i < Count; ++i) {
                code[i] = __ldg(absmax.q + block[i]);
                value[i] = __ldg(absmax.nested + (block[i] >> absmax.nested_shift));
            }
        }
    }

    __device__ __forceinline__ void get(const Absmax& absmax, float (&scales)[Count]) const {
        if (absmax.plain != nullptr) {
#pragma unroll
            for (int i = 0; i < Count; ++i) scales[i] = value[i];
        } else {
            const float offset = __ldg(absmax.offset);
#pragma unroll
            for (int i = 0; i < Count; ++i) scales[i] = __fadd_rn(__fmul_rn(__ldg(absmax.map + code[i]), value[i]), offset);
        }
    }
};

// The part of `steps` steps that this block sums: all splits are as long, but for a remainder at the end.
struct Range {
    uint32_t begin, end;

    __device__ __forceinline__ Range(uint32_t steps, uint32_t split, uint32_t splits) {
        const uint32_t length = (steps + splits - 1) / splits;
        begin = min(split * length, steps);
        end = min(begin + length, steps);
    }
};

// 16 bytes from `at` on, a multiple of 16; zeros from `end` on.
__device__ __forceinline__ uint4 load_piece(const uint8_t* bytes, uint64_t at, uint64_t end) {
    if (at + 16 <= end) return ptx::load_stream16(bytes + at);
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (at + i < end) words[i / 4] |= uint32_t(bytes[at + i]) << (i % 4 * 8);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}
