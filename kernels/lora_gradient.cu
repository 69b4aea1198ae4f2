// The gradients of adapters' factors, summed over each adapter's tokens in f32: da[r, k] (+)= u[., r] . x[., k] after dropout,
// and db[n, r] (+)= dy[., n] . v[., r].
//
// Both are the same sum: over tokens, of a few numbers of a token's u (or v) with a row of x (or dy). Tensor cores multiply; the
// tokens are the inner dimension, so both operands are transposed on their way from shared memory to registers. Numbers are cut
// into bf16 that add up to them, so products are exact.
//
// A block takes 128 columns of x or dy, 16 or 64 ranks, and a chunk of 512 of an adapter's tokens, in the order of the batch. The
// chunks are added in their order by `lora_gradient_finish`. So the bits depend on the adapter's own tokens alone, wherever they
// are in the batch. `lora_gradient_tokens` finds them.

#include "adapter.cuh"
#include "dropout.cuh"
#include "low_rank.cuh"
#include "pieces.cuh"

// One side of a layer.
struct Source {
    const void* rows;     // [tokens, columns]: x, or dy
    const float* ranks;   // [parts, tokens, slices, pitch]: u, or v
    uint32_t columns;
    uint32_t tiles;       // of 128 columns of a slice
    uint32_t parts;
    uint32_t vectors;     // rows are read in pieces of 16 bytes
};

// Where the gradients of one slice of one adapter go.
struct Gradient {
    float* a;             // [rank, k]
    float* b;             // [rows, rank]
    uint32_t rank;
    uint32_t first_row;   // of the slice
    uint32_t rows;
    uint32_t padding;
};
static_assert(sizeof(Gradient) == 32, "the Rust twin has this size");

struct Params {
    Source inputs, outputs;
    const Gradient* gradients;  // [adapters, slices]
    const int32_t* index;       // [tokens]; null: adapter 0 for all
    uint32_t* order;            // [tokens]: those of adapter 0, then those of adapter 1, ...; not there without an index
    uint2* spans;               // [adapters]: where an adapter's tokens begin in `order`, and how many they are
    float* partial;             // [chunks, adapters, of_adapter]; null where there is one chunk
    Dropout dropout;
    uint32_t tokens, adapters, slices;
    uint32_t pitch;             // columns of u and v for a slice
    uint32_t max_rank;
    uint32_t chunks;            // of 512 tokens, of an adapter that has all
    uint32_t accumulate;
    uint32_t padding;
};
static_assert(sizeof(Params) == 160, "the Rust twin has this size");

constexpr uint32_t kThreads = 128, kColumns = 128, kTokens = 32, kChunkTokens = 512;
constexpr uint32_t kRowBytes = kColumns * 2;

// Where an element of a gradient lies in a chunk's part of `partial`.
struct Places {
    uint64_t of_inputs, of_adapter;
    __device__ __forceinline__ explicit Places(const Params& p) {
        of_inputs = uint64_t(p.slices) * p.max_rank * p.inputs.columns;
        of_adapter = of_inputs + uint64_t(p.outputs.columns) * p.max_rank;
    }
};

__device__ __forceinline__ uint2 span_of(const Params& p, uint32_t adapter) {
    return p.index == nullptr ? make_uint2(0, adapter == 0 ? p.tokens : 0) : p.spans[adapter];
}

// What is multiplied: 32 tokens at a time.
template <typename T, int Ranks>
struct Tile {
    using Rows = Pieces<T, bf16>;
    static constexpr int kWords = 2 * sizeof(T);                     // of eight elements
    static constexpr uint32_t kRanksPitch = Ranks * 2 + 16;          // bytes: eight tokens are in different banks
    static constexpr uint32_t kPasses = kTokens * 16 / kThreads, kRankPasses = kTokens * Ranks / 4 / kThreads;
    alignas(16) uint8_t rows[Rows::kCount][kTokens * kRowBytes];     // 16 chunks of a token, at c ^ (token % 8)
    alignas(16) uint8_t ranks[3][kTokens * kRanksPitch];

    struct Fetched {
        uint32_t rows[kPasses][kWords];
        float4 ranks[kRankPasses];
    };
};

template <typename T, int Ranks>
struct Sum {
    using M = Tile<T, Ranks>;
    const Params& p;
    const Source& source;
    bool of_inputs;
    uint32_t first_column, end_column;  // of the row; what is beyond the slice is zero
    uint32_t slice, rank_base, begin, count;
    typename M::Fetched next;

    // The token at a position among the adapter's; positions past the end have none.
    __device__ __forceinline__ uint32_t token(uint32_t position) const {
        if (position >= count) return ~0u;
        return p.index == nullptr ? position : p.order[begin + position];
    }

    // Requests what the calling thread brings of 32 tokens: eight columns of some, four ranks of some.
    __device__ __forceinline__ void fetch(uint32_t position) {
        const uint32_t column = first_column + threadIdx.x % 16 * 8;
#pragma unroll
        for (uint32_t i = 0; i < M::kPasses; ++i) {
            const uint32_t row = token(position + threadIdx.x / 16 + i * (kThreads / 16));
            const T* from = static_cast<const T*>(source.rows) + size_t(row) * source.columns + column;
            uint32_t(&words)[M::kWords] = next.rows[i];
#pragma unroll
            for (int w = 0; w < M::kWords; ++w) words[w] = 0;
            if (row == ~0u || column >= end_column) continue;
            if (source.vectors && column + 8 <= end_column) {
#pragma unroll
                for (int w = 0; w < M::kWords; w += 4) {
                    const uint4 v = ptx::load_stream16(reinterpret_cast<const uint4*>(from) + w / 4);
                    words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
                }
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    if (column + e >= end_column) continue;
                    if constexpr (sizeof(T) == 4) {
                        words[e] = __float_as_uint(from[e]);
                    } else {
                        words[e / 2] |= uint32_t(from[e].bits) << (e % 2 * 16);
                    }
                }
            }
        }
        const size_t row_pitch = size_t(p.pitch) * p.slices;
#pragma unroll
        for (uint32_t i = 0; i < M::kRankPasses; ++i) {
            const uint32_t item = threadIdx.x + i * kThreads, r = rank_base + item % (Ranks / 4) * 4;
            const uint32_t row = token(position + item / (Ranks / 4));
            next.ranks[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (row == ~0u || r >= p.pitch) continue;
            next.ranks[i] = load_v(source.ranks + row * row_pitch + slice * p.pitch + r, p.tokens * row_pitch, source.parts);
        }
    }

    // Puts what was requested into shared memory, cut into bf16.
    __device__ __forceinline__ void store(M& tile, uint32_t position) {
        const bool drops = of_inputs && p.dropout.threshold != 0;
#pragma unroll
        for (uint32_t i = 0; i < M::kPasses; ++i) {
            const uint32_t at = threadIdx.x / 16 + i * (kThreads / 16), chunk = threadIdx.x % 16;
            if (drops) mask(next.rows[i], token(position + at), first_column + chunk * 8);
            uint32_t pieces[M::Rows::kCount][4];
            M::Rows::make(next.rows[i], pieces);
#pragma unroll
            for (int j = 0; j < M::Rows::kCount; ++j) {
                const uint4 four = make_uint4(pieces[j][0], pieces[j][1], pieces[j][2], pieces[j][3]);
                ptx::store_shared16(ptx::shared_address(tile.rows[j]) + at * kRowBytes + (chunk ^ at % 8) * 16, four);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < M::kRankPasses; ++i) {
            const uint32_t item = threadIdx.x + i * kThreads;
            const float4& v = next.ranks[i];
            const uint32_t raw[4] = {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
            uint32_t pieces[3][2];
            Pieces<float, bf16>::make(raw, pieces);
#pragma unroll
            for (int j = 0; j < 3; ++j) {
                uint8_t* to = tile.ranks[j] + item / (Ranks / 4) * M::kRanksPitch + item % (Ranks / 4) * 8;
                *reinterpret_cast<uint2*>(to) = make_uint2(pieces[j][0], pieces[j][1]);
            }
        }
    }

    __device__ __forceinline__ void mask(uint32_t (&words)[M::kWords], uint32_t token, uint32_t column) const {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const uint4 numbers = p.dropout.four(token, column + i);
            const uint32_t of[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const bool keeps = of[j] >= p.dropout.threshold;
                if constexpr (sizeof(T) == 4) {
                    words[i + j] = keeps ? words[i + j] : 0;
                } else {
                    words[(i + j) / 2] &= keeps ? ~0u : j % 2 ? 0xffffu : 0xffff0000u;
                }
            }
        }
    }

    // sums[16 ranks i][8 columns c] += the tile, for the warp's 32 columns. The smallest pieces come first.
    __device__ __forceinline__ void multiply(const M& tile, float (&sums)[Ranks / 16][4][4]) const {
        const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane / 8;
#pragma unroll
        for (uint32_t step = 0; step < kTokens; step += 16) {
            const uint32_t token = step + q % 2 * 8 + lane % 8;
#pragma unroll
            for (int j = M::Rows::kCount - 1; j >= 0; --j) {
                uint32_t columns[2][4];  // of 16 columns: tokens 0 to 7 and 8 to 15 of the first eight, then of the others
#pragma unroll
                for (uint32_t c = 0; c < 2; ++c) {
                    const uint32_t chunk = warp * 4 + c * 2 + q / 2;
                    ptx::load_transposed(ptx::shared_address(tile.rows[j]) + token * kRowBytes + (chunk ^ token % 8) * 16, columns[c]);
                }
#pragma unroll
                for (int i = 0; i < Ranks / 16; ++i) {
#pragma unroll
                    for (int k = 2; k >= 0; --k) {
                        uint32_t ranks[4];
                        const uint32_t row = step + q / 2 * 8 + lane % 8;
                        ptx::load_transposed(ptx::shared_address(tile.ranks[k]) + row * M::kRanksPitch + i * 32 + q % 2 * 16, ranks);
#pragma unroll
                        for (int c = 0; c < 4; ++c) ptx::mma_bf16(sums[i][c], ranks, columns[c / 2][c % 2 * 2], columns[c / 2][c % 2 * 2 + 1]);
                    }
                }
            }
        }
    }
};

template <typename T, int Ranks>
__device__ __forceinline__ void lora_gradient(const Params& p) {
    __shared__ Tile<T, Ranks> tile;
    const uint32_t tiles = p.inputs.tiles + p.outputs.tiles, rank_tiles = (p.max_rank + Ranks - 1) / Ranks;
    uint32_t block = blockIdx.x;
    const uint32_t chunk = block % p.chunks;
    block /= p.chunks;
    const uint32_t column_tile = block % tiles;
    block /= tiles;
    const uint32_t rank_base = block % rank_tiles * Ranks;
    block /= rank_tiles;
    const uint32_t slice = block % p.slices, adapter = block / p.slices;

    const Gradient gradient = p.gradients[size_t(adapter) * p.slices + slice];
    const bool of_inputs = column_tile < p.inputs.tiles;
    const Source& source = of_inputs ? p.inputs : p.outputs;
    const uint32_t column = (of_inputs ? column_tile : column_tile - p.inputs.tiles) * kColumns;  // of the slice
    const uint32_t slice_begin = of_inputs ? 0 : gradient.first_row, columns = of_inputs ? p.inputs.columns : gradient.rows;
    if (rank_base >= gradient.rank || column >= columns) return;
    const uint2 span = span_of(p, adapter);
    const uint32_t first = chunk * kChunkTokens;
    if (chunk > 0 && first >= span.y) return;
    const uint32_t count = min(span.y, first + kChunkTokens);

    Sum<T, Ranks> sum{p, source, of_inputs, slice_begin + column, slice_begin + columns, slice, rank_base, span.x, count};
    float sums[Ranks / 16][4][4] = {};
    if (first < count) sum.fetch(first);
#pragma unroll 1
    for (uint32_t position = first; position < count; position += kTokens) {
        __syncthreads();
        sum.store(tile, position);
        __syncthreads();
        if (position + kTokens < count) sum.fetch(position + kTokens);
        sum.multiply(tile, sums);
    }

    // Lane (g, t): ranks g and g + 8, columns 2 t and 2 t + 1 of each eight.
    const Places places(p);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* partial = p.partial == nullptr ? nullptr : p.partial + (uint64_t(chunk) * p.adapters + adapter) * places.of_adapter;
#pragma unroll
    for (int i = 0; i < Ranks / 16; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const uint32_t r = rank_base + i * 16 + e / 2 * 8 + lane / 4, n = column + warp * 32 + c * 8 + lane % 4 * 2 + e % 2;
                if (r >= gradient.rank || n >= columns) continue;
                if (partial != nullptr) {
                    const uint64_t in_inputs = (uint64_t(slice) * p.max_rank + r) * columns + n;
                    const uint64_t in_outputs = places.of_inputs + uint64_t(slice_begin + n) * p.max_rank + r;
                    partial[of_inputs ? in_inputs : in_outputs] = sums[i][c][e];
                } else {
                    float* to = of_inputs ? gradient.a + size_t(r) * columns + n : gradient.b + size_t(n) * gradient.rank + r;
                    *to = p.accumulate ? __fadd_rn(*to, sums[i][c][e]) : sums[i][c][e];
                }
            }
        }
    }
}

#define ENTRY(T, RANKS)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads, RANKS == 64 ? 2 : 4) lora_gradient_##T##_r##RANKS(const __grid_constant__ Params p) {     \
        lora_gradient<T, RANKS>(p);                                                                                              \
    }

typedef float f32;
ENTRY(f32, 16)
ENTRY(f32, 64)
ENTRY(f16, 16)
ENTRY(f16, 64)
ENTRY(bf16, 16)
ENTRY(bf16, 64)

// The tokens of each adapter, in the order of the batch: a block for every adapter.
extern "C" __global__ void __launch_bounds__(256) lora_gradient_tokens(const __grid_constant__ Params p) {
    constexpr uint32_t kWarps = 8;
    __shared__ uint32_t counts[2][kWarps];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t own = blockIdx.x;
    uint32_t before = 0;
    for (uint32_t i = threadIdx.x; i < p.tokens; i += 256) before += p.index[i] >= 0 && p.index[i] < own;
    before = __reduce_add_sync(kAllLanes, before);
    if (lane == 0) counts[0][warp] = before;
    __syncthreads();
    uint32_t begin = 0;
    for (uint32_t w = 0; w < kWarps; ++w) begin += counts[0][w];
    uint32_t count = 0, turn = 1;
    for (uint32_t first = 0; first < p.tokens; first += 256, turn ^= 1) {
        const uint32_t token = first + threadIdx.x;
        const uint32_t mine = __ballot_sync(kAllLanes, token < p.tokens && p.index[token] == own);
        if (lane == 0) counts[turn][warp] = __popc(mine);
        __syncthreads();
        uint32_t place = begin + count + __popc(mine & ((1u << lane) - 1));
        for (uint32_t w = 0; w < kWarps; ++w) {
            place += w < warp ? counts[turn][w] : 0;
            count += counts[turn][w];
        }
        if (mine >> lane & 1) p.order[place] = token;
    }
    if (threadIdx.x == 0) p.spans[own] = make_uint2(begin, count);
}

// Adds the chunks of every element, in their order.
extern "C" __global__ void __launch_bounds__(256) lora_gradient_finish(const __grid_constant__ Params p) {
    const Places places(p);
    const uint64_t i = uint64_t(blockIdx.x) * 256 + threadIdx.x, all = p.adapters * places.of_adapter;
    if (i >= all) return;
    const uint32_t adapter = i / places.of_adapter;
    uint64_t rest = i % places.of_adapter;
    const Gradient* gradients = p.gradients + size_t(adapter) * p.slices;
    float* to;
    if (rest < places.of_inputs) {
        const Gradient& gradient = gradients[rest / (uint64_t(p.max_rank) * p.inputs.columns)];
        rest %= uint64_t(p.max_rank) * p.inputs.columns;
        if (rest / p.inputs.columns >= gradient.rank) return;
        to = gradient.a + rest;
    } else {
        rest -= places.of_inputs;
        const uint32_t row = rest / p.max_rank, r = rest % p.max_rank;
        uint32_t slice = 0;
        while (row - gradients[slice].first_row >= gradients[slice].rows) ++slice;
        const Gradient& gradient = gradients[slice];
        if (r >= gradient.rank) return;
        to = gradient.b + size_t(row - gradient.first_row) * gradient.rank + r;
    }
    const uint32_t chunks = max(1u, (span_of(p, adapter).y + kChunkTokens - 1) / kChunkTokens);
    float sum = p.partial[i];
    for (uint32_t chunk = 1; chunk < chunks; ++chunk) sum = __fadd_rn(sum, p.partial[chunk * all + i]);
    *to = p.accumulate ? __fadd_rn(*to, sum) : sum;
}
