// dx = dy w + dropout(u a) for 16-bit dy and many tokens, on Hopper: the outputs are columns of w [k, n], and the sum is over
// its rows (see matmul_transposed.cu, which serves all else, for who calls what k and n).
//
// Elements are a left operand as they come, which the product takes by columns. Of codes, ldmatrix gives a lane what lies in one
// place of two neighbouring rows; one byte each is two neighbouring columns of both, which are decoded as in prefill.cu, and
// packed by column. So nothing is moved for being transposed.

#include "prefill.cuh"

// Outputs of codes: two neighbouring warps have 32, of which a lane of either has two of its four neighbours. They share the
// place where they are turned round.
struct InterleavedOrder {
    static __device__ __forceinline__ uint32_t output(uint32_t warp, uint32_t lane, uint32_t i) {
        return warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2 + i;
    }

    // Chunk c has every fourth output of a token, from c on.
    static __device__ __forceinline__ uint32_t chunk(uint32_t staging, uint32_t warp, uint32_t token, uint32_t c) {
        return staging + (warp / 2 * 32 + token) * 64 + (c ^ token / 2 % 4) * 16;
    }
    static __device__ __forceinline__ uint32_t place(uint32_t staging, uint32_t warp, uint32_t token, uint32_t i) {
        return chunk(staging, warp, token, warp % 2 * 2 + i);
    }

    static __device__ __forceinline__ void sync(uint32_t warp) { hopper::sync_some<64>(2 + warp / 2); }

    static __device__ __forceinline__ uint4 take(uint32_t staging, uint32_t warp, uint32_t lane, uint32_t turn, uint32_t& token, uint32_t& output) {
        token = warp % 2 * 16 + turn * 8 + lane / 4, output = warp / 2 * 32 + lane % 4 * 8;
        uint32_t pairs[4];
#pragma unroll
        for (uint32_t c = 0; c < 4; ++c) pairs[c] = __float_as_uint(ptx::load_shared4(chunk(staging, warp, token, c) + lane % 4 * 4));
        return make_uint4(__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410),
                          __byte_perm(pairs[0], pairs[1], 0x7632), __byte_perm(pairs[2], pairs[3], 0x7632));
    }
};

// Codes come in boxes of 64 rows by 64 bytes, elements in two boxes of 64 by 64, permuted within rows of a box.
template <typename T, bool Codes>
struct Columns {
    static constexpr bool kBranchFirst = true;
    static constexpr bool kColumns = true;
    static constexpr uint32_t kNext = 16 * kTileRow / 16;
    static constexpr uint32_t kHalf = kRows / 2, kCodeRow = kRows / 2;  // columns of a box of elements; bytes
    using Order = std::conditional_t<Codes, InterleavedOrder, NaturalOrder>;

    static __device__ __forceinline__ void copy(uint32_t to, const hopper::TensorMap& w, uint32_t row, uint32_t first_column, uint32_t barrier) {
        hopper::copy_box(to, w, Codes ? first_column / 2 : first_column, row, barrier);
        if (!Codes) hopper::copy_box(to + kSlice * kTileRow, w, first_column + kHalf, row, barrier);
    }

    static __device__ __forceinline__ uint32_t left(uint32_t tile, uint32_t warp) { return tile + warp / 4 * kSlice * kTileRow; }

    // The absmax of a slice: one for each row and 32 columns, which are in one block. A thread has two neighbouring rows of 32
    // columns, so that a warp's loads are of few rows.
    //
    // Lane (g, t) of those that multiply reads 16 bytes for every 16 rows, of rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. Those that
    // write together, four pieces of columns by such a row's halves, find them in different banks.
    struct Scales {
        uint32_t column, row;  // of the thread, in slice 0
        uint32_t to;

        __device__ __forceinline__ Scales(const Params& p, const Unit& unit) {
            const uint32_t piece = threadIdx.x % 4, half = threadIdx.x / 4 % 2, t = threadIdx.x / 8 % 4, sixteen = threadIdx.x / 32;
            column = unit.first_row + piece * 32, row = sixteen * 16 + half * 8 + t * 2;
            to = place(piece, sixteen, t) + half * 8;
        }

        static __device__ __forceinline__ uint32_t place(uint32_t piece, uint32_t sixteen, uint32_t t) {
            return piece * 256 + (sixteen ^ piece / 2) * 64 + (t ^ piece % 2 * 2) * 16;
        }

        __device__ __forceinline__ bool exists(const Params& p, uint32_t step, uint32_t i) const {
            return step * kSlice + row + i < p.k && column < p.n;
        }

        // The blocks of a slice and the next one.
        __device__ __forceinline__ void find(const Params& p, uint32_t step, uint64_t (&block)[4]) const {
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                const uint64_t at = uint64_t((step + i / 2) * kSlice + row + i % 2) * p.n + column;
                block[i] = exists(p, step + i / 2, i % 2) ? at >> p.weight.block_shift : 0;
            }
        }

        // Those of a slice and the next one. Asks L2 for those that follow eight slices later: rows lie far apart.
        __device__ __forceinline__ void request(const Params& p, uint32_t step, PendingAbsmax<4>& pending) const {
            uint64_t block[4];
            find(p, step, block);
            pending.request(p.weight.absmax, block);
            if (threadIdx.x % 4 != 0) return;
            const Absmax& absmax = p.weight.absmax;
            find(p, step + 8, block);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                hopper::prefetch_l2(absmax.plain != nullptr ? static_cast<const void*>(absmax.plain + block[i]) : absmax.q + block[i]);
            }
        }

        __device__ __forceinline__ uint32_t place() const { return to; }
    };

    // Lane (g, t) has columns 4 g and 4 g + 1 (of the second warp of two: 4 g + 2 and 4 g + 3) of their 32.
    struct Operands {
        PairColumn pairs;
        uint32_t first, second;  // selectors: the byte of the upper row, and of the lower
        uint32_t codes, scales;

        __device__ __forceinline__ Operands(uint32_t table, uint32_t warp, uint32_t lane)
            : pairs(table, lane), first(PairColumn::select(warp % 2)), second(PairColumn::select(warp % 2 + 2)) {
            codes = lane * kCodeRow + (warp / 2 ^ lane / 2 % 4) * 16;
            scales = warp / 2 * 256 + (lane % 4 ^ warp / 2 % 2 * 2) * 16;
            flip = warp / 4;
        }
        uint32_t flip;

        __device__ __forceinline__ void decode(uint32_t tile, uint32_t absmax, uint32_t (&operands)[4][4]) const {
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                uint32_t words[4];
                ptx::load_transposed(tile + codes + half * 32 * kCodeRow, words);
#pragma unroll
                for (uint32_t j = 0; j < 2; ++j) {
                    const uint4 scale = ptx::load_shared16(absmax + scales + ((half * 2 + j) ^ flip) * 64);
#pragma unroll
                    for (uint32_t i = 0; i < 2; ++i) {
                        float upper[2], lower[2];
                        pairs.look_up(words[j * 2 + i], first, upper[0], upper[1]);
                        pairs.look_up(words[j * 2 + i], second, lower[0], lower[1]);
                        const float above = __uint_as_float(word(scale, 2 * i)), below = __uint_as_float(word(scale, 2 * i + 1));
#pragma unroll
                        for (uint32_t c = 0; c < 2; ++c) {
                            operands[half * 2 + j][i * 2 + c] = Pair<T>::pack(__fmul_rn(upper[c], above), __fmul_rn(lower[c], below));
                        }
                    }
                }
            }
        }
    };

    // Of every slice of the layer's outputs: lora_a [rank, n] has a column for each output here.
    static __device__ __forceinline__ bool reaches(const Adapter&, uint32_t) { return true; }
    static __device__ __forceinline__ uint32_t row_of(const Adapter&, uint32_t output) { return output; }
    static __device__ __forceinline__ uint32_t rows_of(const Adapter&, const Params& p) { return p.n; }

    static __device__ __forceinline__ void load_pair(const Params& p, const Adapter& adapter, uint32_t column, uint32_t r, float& first, float& second) {
        const auto load = [&](uint32_t r) {
            if (r >= adapter.rank) return 0.0f;
            const size_t at = size_t(r) * p.n + column;
            return p.branch.b_is_f32 ? static_cast<const float*>(adapter.a)[at] : to_f32(static_cast<const T*>(adapter.a)[at]);
        };
        first = load(r), second = load(r + 1);
    }

    // Takes out of the sums, which hold nothing but the branch, what dropout took of x.
    template <int Tokens>
    static __device__ __forceinline__ void drop(const Dropout& dropout, uint32_t first_column, uint32_t first_token, uint32_t warp, uint32_t lane,
                                                float (&sums)[Tokens / 2]) {
        if (dropout.threshold == 0) return;
#pragma unroll
        for (uint32_t block = 0; block < Tokens / 64; ++block) {
            uint32_t dropped = 0;  // of the lane's 32 sums
#pragma unroll 1
            for (uint32_t m = 8; m-- > 0;) dropped = dropped << 4 | dropped_four(dropout, first_column, first_token + (block * 8 + m) * 8, warp, lane);
#pragma unroll
            for (uint32_t i = 0; i < 32; ++i) sums[block * 32 + i] = dropped >> i & 1 ? 0.0f : sums[block * 32 + i];
        }
    }

    // Which of the lane's four sums of eight tokens are dropped: row i of token 2 t + e is bit 2 i + e.
    static __device__ __forceinline__ uint32_t dropped_four(const Dropout& dropout, uint32_t first_column, uint32_t first_token, uint32_t warp,
                                                            uint32_t lane) {
        uint32_t dropped = 0;
        if constexpr (Codes) {
#pragma unroll
            for (uint32_t e = 0; e < 2; ++e) {
                const uint4 numbers = dropout.four(first_token + lane % 4 * 2 + e, first_column + warp / 2 * 32 + lane / 4 * 4);
                const uint32_t first = warp % 2 ? numbers.z : numbers.x, second = warp % 2 ? numbers.w : numbers.y;
                dropped |= uint32_t(first < dropout.threshold) << e | uint32_t(second < dropout.threshold) << (2 + e);
            }
        } else {
            // A lane has the numbers of four columns of one token; all lanes together have the warp's.
            const uint4 numbers = dropout.four(first_token + lane / 4, first_column + warp * 16 + lane % 4 * 4);
            uint32_t mine = 0;
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t of_column = __ballot_sync(kAllLanes, word(numbers, i) < dropout.threshold);
                mine = lane / 4 % 4 == i ? of_column : mine;
            }
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) dropped |= (mine >> ((lane % 4 * 2 + i % 2) * 4 + lane / 16 + i / 2 * 2) & 1) << i;
        }
        return dropped;
    }
};

PREFILL_ENTRIES(prefill_transposed, Columns, f16)
PREFILL_ENTRIES(prefill_transposed, Columns, bf16)
