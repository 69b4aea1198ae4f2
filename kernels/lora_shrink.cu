// v[part, m, r] = scaling * (a part of x[m] . a[r]) in f32, with the adapter of token m; zeros from its rank on. Transposed, for
// the backward pass: u[part, m, r] = scaling * (a part of dy[m] . b[., r]), where b [n, rank] has the columns that a has as rows.
//
// A block takes a group of up to eight tokens that share an adapter, 16 rows of a, and one part of k. Tensor cores multiply:
// a is the left operand and comes from memory straight to registers, once for all tokens of the group.
//
// The sum over k is a binary tree over 64 leaves, whatever the number of parts: a warp adds the leaves of its share of k,
// the block those of its warps, and who reads v the parts. Products are exact. So a token's sum has the same bits whatever
// is beside it, and however many blocks share it.
//
// What dropout takes from x is zero here; what it multiplies the rest by comes with the scaling.

#include <type_traits>

#include "adapter.cuh"
#include "dropout.cuh"
#include "overlap.cuh"
#include "pieces.cuh"

struct Params {
    const void* x;      // [tokens / choices, k]; transposed dy [tokens, n], with n in the place of k
    float* v;           // [parts, tokens, slices, pitch]
    Adapters adapters;
    uint32_t tokens;
    uint32_t k;
    uint32_t slots;     // blocks that share the groups of 32 tokens
    uint32_t vectors;   // k is a multiple of 8: rows of x and a are read in pieces of 16 bytes
    Dropout dropout;    // of x
    float factor;       // of scaling
    uint32_t choices;   // rows of v for each of x
};
static_assert(sizeof(Params) == 88, "the Rust twin has this size");

constexpr uint32_t kWarps = 8, kThreads = kWarps * 32, kRanks = 16, kLeaves = 64;
constexpr uint32_t kChunk = 32;  // elements of k that a warp multiplies at a time: eight per lane and row

// Eight neighbouring elements as stored.
template <typename T>
struct Eight8 {
    static constexpr int kWords = 2 * sizeof(T);
    uint32_t words[kWords];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = 0;
    }

    // Elements first ... first + 7 of `row`, zero from `length` on. What is read once need not stay in L1.
    template <bool Vectors, bool Once>
    __device__ __forceinline__ void load(const T* row, uint32_t first, uint32_t length) {
        clear();
        if (first >= length) return;
        if constexpr (Vectors) {
            const uint4* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 v = Once ? ptx::load_stream16(from + i) : from[i];
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (first + i >= length) continue;
                if constexpr (sizeof(T) == 4) {
                    words[i] = __float_as_uint(row[first + i]);
                } else {
                    words[i / 2] |= uint32_t(row[first + i].bits) << (i % 2 * 16);
                }
            }
        }
    }

    // Zero for what dropout takes: these are a token's elements from `column` on, a multiple of eight.
    __device__ __forceinline__ void mask(const Dropout& dropout, uint32_t token, uint32_t column) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const uint4 numbers = dropout.four(token, column + i);
            const bool keeps[4] = {numbers.x >= dropout.threshold, numbers.y >= dropout.threshold, numbers.z >= dropout.threshold,
                                   numbers.w >= dropout.threshold};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (sizeof(T) == 4) {
                    words[i + j] = keeps[j] ? words[i + j] : 0;
                } else {
                    words[(i + j) / 2] &= keeps[j] ? ~0u : j % 2 ? 0xffffu : 0xffff0000u;
                }
            }
        }
    }
};

// Eight neighbours of the lane's rows g and g + 8 of a.
template <typename A>
struct Rows {
    Eight8<A> row[2];

    // `a` is row g, at the lane's first element; `ends` is how many there are of each row.
    template <bool Vectors>
    __device__ __forceinline__ void load(const A* a, uint32_t at, size_t k, const uint32_t (&ends)[2]) {
        row[0].template load<Vectors, true>(a, at, ends[0]);
        row[1].template load<Vectors, true>(a + 8 * k, at, ends[1]);
    }
    __device__ __forceinline__ void get(uint32_t (&first)[Eight8<A>::kWords], uint32_t (&second)[Eight8<A>::kWords]) const {
#pragma unroll
        for (int i = 0; i < Eight8<A>::kWords; ++i) first[i] = row[0].words[i], second[i] = row[1].words[i];
    }
};

// Of b instead: eight neighbours of columns 2 g and 2 g + 1, which lie beside each other in its rows.
template <typename A>
struct Columns {
    static constexpr int kWords = Eight8<A>::kWords;
    uint32_t pairs[8][kWords / 4];  // of each row

    // `b` is column 2 g of the lane's first row; `ends` is how many rows there are of each column.
    template <bool>
    __device__ __forceinline__ void load(const A* b, uint32_t at, size_t rank, const uint32_t (&ends)[2]) {
        const bool both = ends[1] != 0 && rank % 2 == 0;  // and then every pair is aligned
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            const A* from = b + (at + i) * rank;
            const bool inside = at + i < ends[0];
            if constexpr (sizeof(A) == 4) {
                pairs[i][0] = pairs[i][1] = 0;
                if (inside && both) {
                    const float2 two = __ldg(reinterpret_cast<const float2*>(from));
                    pairs[i][0] = __float_as_uint(two.x), pairs[i][1] = __float_as_uint(two.y);
                } else if (inside) {
                    pairs[i][0] = __float_as_uint(from[0]);
                    if (ends[1] != 0) pairs[i][1] = __float_as_uint(from[1]);
                }
            } else {
                pairs[i][0] = 0;
                if (inside && both) {
                    pairs[i][0] = __ldg(reinterpret_cast<const uint32_t*>(from));
                } else if (inside) {
                    pairs[i][0] = from[0].bits;
                    if (ends[1] != 0) pairs[i][0] |= uint32_t(from[1].bits) << 16;
                }
            }
        }
    }
    __device__ __forceinline__ void get(uint32_t (&first)[kWords], uint32_t (&second)[kWords]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (sizeof(A) == 4) {
                first[i] = pairs[i][0], second[i] = pairs[i][1];
            } else {
                first[i] = __byte_perm(pairs[2 * i][0], pairs[2 * i + 1][0], 0x5410);
                second[i] = __byte_perm(pairs[2 * i][0], pairs[2 * i + 1][0], 0x7632);
            }
        }
    }
};

// x lora_a^T; the same after dropout; dy lora_b.
enum Mode { kPlain, kDropout, kTransposed };

// A chunk of the lane's part of a, and of its token's x.
template <typename T, typename A, Mode M>
struct Chunk {
    typename std::conditional<M == kTransposed, Columns<A>, Rows<A>>::type a;
    Eight8<T> x;

    // sums[row][token] += a x^T, products of 32 elements.
    __device__ __forceinline__ void multiply(float (&sums)[4]) const {
        using E = typename std::conditional<std::is_same<T, f16>::value && std::is_same<A, f16>::value, f16, bf16>::type;
        using PiecesA = Pieces<A, E>;
        using PiecesX = Pieces<T, E>;
        uint32_t rows[2][PiecesA::kCount][4], token[PiecesX::kCount][4];
        uint32_t raw[2][Eight8<A>::kWords];
        a.get(raw[0], raw[1]);
        PiecesA::make(raw[0], rows[0]);
        PiecesA::make(raw[1], rows[1]);
        PiecesX::make(x.words, token);
        // The smallest pieces come first.
#pragma unroll
        for (int i = PiecesA::kCount - 1; i >= 0; --i) {
#pragma unroll
            for (int j = PiecesX::kCount - 1; j >= 0; --j) {
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    const uint32_t left[4] = {rows[0][i][half], rows[1][i][half], rows[0][i][half + 1], rows[1][i][half + 1]};
                    mma(E{}, sums, left, token[j][half], token[j][half + 1]);
                }
            }
        }
    }
};

// The sums of finished leaves that wait for their neighbours. Adds leaf `j` of a share (a power of two of leaves) to them;
// after the last one, `sums` is the total.
struct Tree {
    float level[3][4];

    __device__ __forceinline__ void add(uint32_t j, float (&sums)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float one = (j & 1) ? level[0][i] + sums[i] : sums[i];
            const float two = (j & 3) == 3 ? level[1][i] + one : one;
            const float four = (j & 7) == 7 ? level[2][i] + two : two;
            level[0][i] = (j & 1) ? level[0][i] : sums[i];
            level[1][i] = (j & 3) == 1 ? one : level[1][i];
            level[2][i] = (j & 7) == 3 ? two : level[2][i];
            sums[i] = four;
        }
    }
};

// The share of k that a warp sums: `leaves` leaves of `leaf` elements each, from `begin` on.
struct Share {
    uint32_t begin, leaves, leaf;
};

// Where a lane's elements of x lie.
struct Place {
    uint32_t token, column;
};

// sums[row][token] = a x^T over the warp's share, for the lane's rows of a and the token of x. `pitch` is the length of a's rows
// (transposed, of b's); `ends` is how many elements there are of each of the lane's rows, and of x.
template <typename T, typename A, Mode M, bool Vectors>
__device__ __forceinline__ void add_products(const Share& share, const A* a, const T* x, const uint32_t (&ends)[3], size_t pitch,
                                             const Dropout& dropout, const Place& place, float (&sums)[4]) {
    constexpr uint32_t kAhead = !Vectors || M == kDropout || sizeof(T) + sizeof(A) == 8 ? 1 : sizeof(T) + sizeof(A) == 6 ? 2 : 4;  // chunks on their way
    const uint32_t length = share.leaves * share.leaf;
    Chunk<T, A, M> chunks[kAhead];
    const auto load = [&](uint32_t at, Chunk<T, A, M>& chunk) {
        const bool inside = at < length;
        const uint32_t of_rows[2] = {inside ? ends[0] : 0, inside ? ends[1] : 0};
        chunk.a.template load<Vectors>(a, at, pitch, of_rows);
        chunk.x.template load<Vectors, false>(x, at, inside ? ends[2] : 0);
    };
#pragma unroll
    for (uint32_t j = 0; j < kAhead; ++j) load(j * kChunk, chunks[j]);
    Tree tree;
    uint32_t left = share.leaf, leaf = 0;
#pragma unroll 1
    for (uint32_t at = 0; at < length; at += kAhead * kChunk) {
#pragma unroll
        for (uint32_t j = 0; j < kAhead; ++j) {
            if (at + j * kChunk < length) {
                if (left == share.leaf) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[e] = 0.0f;
                }
                if constexpr (M == kDropout) chunks[j].x.mask(dropout, place.token, place.column + at + j * kChunk);
                chunks[j].multiply(sums);
                left -= kChunk;
                if (left == 0) {
                    tree.add(leaf++, sums);
                    left = share.leaf;
                }
            }
            load(at + (kAhead + j) * kChunk, chunks[j]);
        }
    }
}

template <typename T, typename A, Mode M>
__device__ __forceinline__ void lora_shrink(const Params& p) {
    constexpr bool kOther = M == kTransposed;
    constexpr uint32_t kPitch = kRanks + 4;
    __shared__ float partial[kWarps][kGroup * kPitch];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t slot = blockIdx.x % p.slots, first = blockIdx.x / p.slots * 32;
    const uint32_t tiles = (p.adapters.pitch + kRanks - 1) / kRanks;
    const uint32_t slice = blockIdx.y / tiles, r = blockIdx.y % tiles * kRanks;
    const uint32_t part = blockIdx.z, parts = gridDim.z;
    const uint32_t row_pitch = p.adapters.pitch * p.adapters.slices;
    float* v = p.v + (size_t(part) * p.tokens + first) * row_pitch + slice * p.adapters.pitch + r;

    ptx::wait_for_launch_before();
    ptx::let_next_launch_start();
    const Window window(p.adapters, first, p.tokens, lane);
    if (slot == 0) {
        // Tokens that are in no group.
#pragma unroll
        for (uint32_t i = threadIdx.x; i < 32 * kRanks; i += kThreads) {
            const uint32_t j = i / kRanks, column = i % kRanks;
            const int32_t own = __shfl_sync(kAllLanes, window.adapter, j);
            if (first + j >= p.tokens || r + column >= p.adapters.pitch || p.adapters.exists(own)) continue;
            v[size_t(j) * row_pitch + column] = own == -1 ? 0.0f : nan_value();
        }
    }

#pragma unroll 1
    for (uint32_t i = slot; i < window.groups(); i += p.slots) {
        const Group group = window.group(i, lane);
        const Adapter adapter = p.adapters.entries[size_t(group.adapter) * p.adapters.slices + slice];
        // The sum is over x, or over the slice's part of dy.
        const uint32_t begin = kOther ? adapter.first_row : 0, length = kOther ? adapter.rows : p.k;
        Share share;
        share.leaves = kLeaves / kWarps / parts;
        share.leaf = ((length + kChunk - 1) / kChunk + kLeaves - 1) / kLeaves * kChunk;
        share.begin = (part * kWarps + warp) * share.leaves * share.leaf;
        // The tile's rows of a that the lane has in sums[0] and sums[1], in sums[2] and sums[3]: a pair lies 8 apart.
        const uint32_t rows[2] = {kOther ? 2 * g : g, kOther ? 2 * g + 1 : g + 8};
        const uint32_t token = group.token(g);
        float sums[4] = {};
        if (r < adapter.rank) {
            // Of the lane's pieces; what is not there is zero.
            const uint32_t at = min(share.begin + 8 * t, length), left = length - at;
            const uint32_t ends[3] = {r + rows[0] < adapter.rank ? left : 0, r + rows[1] < adapter.rank ? left : 0, token < 32 ? left : 0};
            const size_t pitch = kOther ? adapter.rank : p.k;
            const A* a = kOther ? static_cast<const A*>(adapter.b) + at * pitch + r + rows[0]
                                    : static_cast<const A*>(adapter.a) + (r + rows[0]) * pitch + at;
            const T* x = static_cast<const T*>(p.x) + size_t((first + min(token, 31u)) / p.choices) * p.k + begin + at;
            const Place place = {first + token, at};
            if (p.vectors) {
                add_products<T, A, M, true>(share, a, x, ends, pitch, p.dropout, place, sums);
            } else {
                add_products<T, A, M, false>(share, a, x, ends, pitch, p.dropout, place, sums);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) partial[warp][(2 * t + e % 2) * kPitch + e / 2 * 8 + g] = sums[e];
        __syncthreads();

        // A thread owns an element of v. The adapter's scale is put in where the sums are eighths of the whole.
        const float scaling = __fmul_rn(adapter.scaling, p.factor);
        // Half a warp reads one token's, the other half that of the fourth after it, in the other banks.
        const uint32_t j = warp + lane / kRanks * (kGroup / 2), column = lane % kRanks;
        const uint32_t own = group.token(j % kGroup);
        if (warp < kGroup / 2 && own < 32 && r + column < p.adapters.pitch) {
            const float* sum = &partial[0][j * kPitch + (kOther ? column % 2 * 8 + column / 2 : column)];
            const auto scaled = [&](float sum, uint32_t warps) { return parts == warps ? __fmul_rn(sum, scaling) : sum; };
            const auto one = [&](int w) { return scaled(sum[w * kGroup * kPitch], 1); };
            const auto two = [&](int w) { return scaled(__fadd_rn(one(w), one(w + 1)), 2); };
            const auto four = [&](int w) { return scaled(__fadd_rn(two(w), two(w + 2)), 4); };
            const float total = scaled(__fadd_rn(four(0), four(4)), 8);
            v[size_t(own) * row_pitch + column] = r + column < adapter.rank ? total : 0.0f;
        }
        __syncthreads();
    }
}

#define ENTRY(NAME, ...)                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(const __grid_constant__ Params p) { \
        __VA_ARGS__(p);                                                                               \
    }
#define ENTRIES(T, A)                                                           \
    ENTRY(lora_shrink_##T##_##A, lora_shrink<T, A, kPlain>)                     \
    ENTRY(lora_shrink_dropout_##T##_##A, lora_shrink<T, A, kDropout>)           \
    ENTRY(lora_shrink_transposed_##T##_##A, lora_shrink<T, A, kTransposed>)

typedef float f32;
ENTRIES(f32, f32)
ENTRIES(f16, f16)
ENTRIES(f16, f32)
ENTRIES(bf16, bf16)
ENTRIES(bf16, f32)
