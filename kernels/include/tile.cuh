// Products of tiles in shared memory by tensor cores, k in slices of 64.
//
// The weight is the left operand and x the right one, so that a warp holds sums[row of w][token]. A slice is taken in one of two
// orders, the same for both operands, so that the sum is the same:
//
// * `kInOrder`: that of the instruction, by ldmatrix, which leaves operands in neighbouring registers.
// * The other: lane (g, t) = (lane / 4, lane % 4) takes the 16 elements from 16 t on of its rows g, g + 8, ... of w and of its tokens
//   g, g + 8, ..., so that codes, which a lane decodes itself, and x are read from shared memory in whole vectors.
//
// A tile of 16-bit elements has rows of 64: eight chunks of 16 bytes, chunk c of row r lying at c ^ r % 8. Then the eight lanes that
// shared memory serves at a time find eight different places, whether they have one chunk of eight rows, or of two neighbouring
// rows four chunks of one parity.
#pragma once

#include <cstdint>
#include <type_traits>

#include "nf4.cuh"
#include "pieces.cuh"
#include "product.cuh"
#include "ptx.cuh"
#include "vector.cuh"

constexpr uint32_t kSlice = 64;                // elements of k
constexpr uint32_t kTileRow = kSlice * 2;      // bytes
constexpr uint32_t kWarpRows = 32;             // rows of w that a warp multiplies: two operands of 16

// The offset of a chunk in a tile of 16-bit elements.
__device__ __forceinline__ uint32_t tile_offset(uint32_t row, uint32_t chunk) {
    return row * kTileRow + (chunk ^ row % 8) * 16;
}

// The weights of a warp's 32 rows in half a slice: operands for two multiplications of each 16 rows.
struct Operands {
    uint32_t a[2][2][4];

    // `pairs`: the eight elements of lane (g, t) in row 16 i + 8 half + g.
    __device__ __forceinline__ void set(int i, int half, const uint32_t (&pairs)[4]) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            a[i][j][half] = pairs[2 * j];
            a[i][j][2 + half] = pairs[2 * j + 1];
        }
    }
};

// sums[i][m] += 16 rows i of w by 8 tokens m, half a slice; `x` is the shared address of the tile of x.
template <typename T, bool InOrder, int Groups>
__device__ __forceinline__ void multiply(const Operands& w, uint32_t x, uint32_t half, uint32_t lane, float (&sums)[2][Groups][4]) {
    if constexpr (InOrder) {
        const uint32_t from = x + tile_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
#pragma unroll
            for (uint32_t m = 0; m < Groups; m += 2) {
                uint32_t b[4];
                ptx::load_matrices((from ^ (half * 4 + j * 2) * 16) + m * 8 * kTileRow, b);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma(T{}, sums[i][m], w.a[i][j], b[0], b[1]);
                    mma(T{}, sums[i][m + 1], w.a[i][j], b[2], b[3]);
                }
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < Groups; ++m) {
            const uint4 b = ptx::load_shared16(x + tile_offset(m * 8 + lane / 4, lane % 4 * 2 + half));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                mma(T{}, sums[i][m], w.a[i][0], b.x, b.y);
                mma(T{}, sums[i][m], w.a[i][1], b.z, b.w);
            }
        }
    }
}

// A warp's sums to staging[token * pitch + row], where rows are those of `Operands` in their order.
template <int Groups>
__device__ __forceinline__ void stage_sums(float* staging, uint32_t pitch, uint32_t lane, const float (&sums)[2][Groups][4]) {
#pragma unroll
    for (int m = 0; m < Groups; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const uint32_t token = m * 8 + lane % 4 * 2 + e % 2;
            staging[token * pitch + e / 2 * 8 + lane / 4] = sums[e / 4][m][e % 4];
        }
    }
}

// Copies a slice of `Rows` rows of a matrix to shared memory, `RowBytes` of each, in chunks of 16 bytes. A thread copies
// the same chunk of every few rows. Rows past the end repeat the last one: nobody looks at what is made of them. Columns
// past the end become zero.
template <int Rows, int RowBytes, int Threads>
struct RowCopier {
    static constexpr uint32_t kChunks = RowBytes / 16, kStride = Threads / kChunks, kElements = kSlice / kChunks;
    const uint8_t* from;  // the thread's chunk of slice 0 in its first row
    const uint32_t& k;    // of the kernel's parameters: a register less
    uint32_t last;        // rows that follow the thread's first

    __device__ __forceinline__ RowCopier(const void* matrix, uint32_t first_row, uint32_t rows, const uint32_t& k) : k(k) {
        const uint32_t row = min(first_row + threadIdx.x / kChunks, rows - 1), chunk = threadIdx.x % kChunks;
        from = static_cast<const uint8_t*>(matrix) + uint64_t(row) * pitch() + chunk * 16;
        last = rows - 1 - row;
    }

    // Bytes from row to row.
    __device__ __forceinline__ uint32_t pitch() const { return k / kElements * 16; }

    // `offset(row, chunk)` is the chunk's place in the tile, and grows evenly with every `kStride` rows.
    template <typename Offset>
    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice, Offset offset) const {
        const uint32_t row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
        const bool inside = slice * kSlice + chunk * kElements < k;
#pragma unroll
        for (uint32_t i = 0; i < Rows; i += kStride) {
            const uint8_t* at = from + uint64_t(min(i, last)) * pitch() + slice * RowBytes;
            ptx::copy_async16(shared + offset(row, chunk) + i * RowBytes, inside ? at : from, inside ? 16 : 0);
        }
    }
};

// The same for rows of x, as `share` names them: the tile's tokens.
template <int Tokens, int RowBytes, int Threads, typename Share>
struct InputCopier;

template <int Tokens, int RowBytes, int Threads, int Rows>
struct InputCopier<Tokens, RowBytes, Threads, Share<Rows, Tokens>> : RowCopier<Tokens, RowBytes, Threads> {
    __device__ __forceinline__ InputCopier(const Params& p, const Share<Rows, Tokens>& share)
        : RowCopier<Tokens, RowBytes, Threads>(p.x, share.first_token, p.tokens, p.k) {}
};

template <int Tokens, int RowBytes, int Threads, int Rows>
struct InputCopier<Tokens, RowBytes, Threads, ExpertShare<Rows, Tokens>> {
    static constexpr uint32_t kChunks = RowBytes / 16, kStride = Threads / kChunks, kElements = kSlice / kChunks;
    const Params& p;
    uint32_t* rows;  // of x, in shared memory: a register each is too many

    __device__ __forceinline__ InputCopier(const Params& p, const ExpertShare<Rows, Tokens>& share) : p(p) {
        static_assert(Tokens <= Threads, "a thread for each");
        __shared__ uint32_t memory[Tokens];
        rows = memory;
        if (threadIdx.x < Tokens) rows[threadIdx.x] = share.input(min(share.first_token + threadIdx.x, share.last - 1));
        __syncthreads();
    }

    template <typename Offset>
    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice, Offset offset) const {
        const uint32_t token = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
        const bool inside = slice * kSlice + chunk * kElements < p.k;
        const uint8_t* from = static_cast<const uint8_t*>(p.x) + (inside ? slice * RowBytes + chunk * 16 : 0);
#pragma unroll
        for (uint32_t i = 0; i < Tokens / kStride; ++i) {
            const uint8_t* at = from + uint64_t(rows[token + i * kStride]) * (p.k / kElements * 16);
            ptx::copy_async16(shared + offset(token, chunk) + i * kStride * RowBytes, at, inside ? 16 : 0);
        }
    }
};

// The weights of a block as the pipeline sees them: how a slice of `Rows` rows is copied to shared memory, and how a warp
// makes operands of it.
//
// Dense weights of x's type.
template <typename T, int Rows, int Threads>
struct DenseTile {
    static constexpr bool kInOrder = true;
    static constexpr uint32_t kBytes = Rows * kTileRow;
    RowCopier<Rows, kTileRow, Threads> copier;
    uint32_t rows;  // shared address of the lane's chunk of the warp's rows

    __device__ __forceinline__ DenseTile(const Params& p, uint32_t first_row, uint32_t, uint32_t above = 0)
        : copier(p.weight.data, above + first_row, above + p.n, p.k) {}

    template <int Groups>
    static __device__ __forceinline__ void stage(float* staging, uint32_t pitch, uint32_t lane, const float (&sums)[2][Groups][4]) {
        stage_sums(staging, pitch, lane, sums);
    }

    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice) const { copier.copy(shared, slice, tile_offset); }
    __device__ __forceinline__ void fetch_scales(const Params&, uint32_t, uint32_t) {}
    __device__ __forceinline__ void begin(const Params&, uint32_t shared, uint32_t, uint32_t row, uint32_t lane) {
        rows = shared + row * kTileRow + tile_offset(lane % 16, lane / 16);
    }

    __device__ __forceinline__ void load(Operands& w, uint32_t half, uint32_t) const {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
            for (uint32_t j = 0; j < 2; ++j) {
                ptx::load_matrices((rows ^ (half * 4 + j * 2) * 16) + i * 16 * kTileRow, w.a[i][j]);
            }
        }
    }
};

// 4-bit codes, decoded to what the reference has: round_T(value * absmax).
template <typename T, int Rows, int Threads>
struct CodeTile {
    static constexpr bool kInOrder = false;
    static constexpr uint32_t kRowBytes = kSlice / 2, kBytes = Rows * kRowBytes;
    RowCopier<Rows, kRowBytes, Threads> copier;
    WarpDecoder decoder;
    RowBlocks blocks;  // from the lane's row g on
    uint2 codes[4];    // of the rows g, g + 8, g + 16, g + 24: 16 each
    PendingAbsmax<4> next;
    float scales[4];

    // `row` is the warp's first; `above` as in `Column`.
    __device__ __forceinline__ CodeTile(const Params& p, uint32_t first_row, uint32_t row, uint32_t above = 0)
        : copier(p.weight.data, above + first_row, above + p.n, p.k),
          decoder(p.weight.codebook),
          blocks(p, row + threadIdx.x % 32 / 4, above) {}

    template <int Groups>
    static __device__ __forceinline__ void stage(float* staging, uint32_t pitch, uint32_t lane, const float (&sums)[2][Groups][4]) {
        stage_sums(staging, pitch, lane, sums);
    }

    // Requests the absmax of the blocks that the lane's codes of a slice lie in.
    __device__ __forceinline__ void fetch_scales(const Params& p, uint32_t slice, uint32_t lane) {
        const uint32_t k = slice * kSlice + lane % 4 * 16;
        uint64_t block[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) block[i] = blocks.find(p, i * 8, k < p.k ? k : 0);
        next.request(p.weight.absmax, block);
    }

    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice) const {
        copier.copy(shared, slice, [](uint32_t row, uint32_t chunk) { return row * kRowBytes + chunk * 16; });
    }

    __device__ __forceinline__ void begin(const Params& p, uint32_t shared, uint32_t slice, uint32_t row, uint32_t lane) {
        const bool inside = slice * kSlice + lane % 4 * 16 < p.k;
        next.get(p.weight.absmax, scales);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            codes[i] = ptx::load_shared8(shared + (row + i * 8 + lane / 4) * kRowBytes + lane % 4 * 8);
            scales[i] = inside ? scales[i] : 0.0f;
        }
    }

    __device__ __forceinline__ void load(Operands& w, uint32_t half, uint32_t) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float v[8];
            decoder.decode(half == 0 ? codes[i].x : codes[i].y, scales[i], v);
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = Pair<T>::pack(v[2 * j], v[2 * j + 1]);
            w.set(i / 2, i % 2, pairs);
        }
    }
};

// The products of one slice.
template <typename T, typename Weights, int Groups>
__device__ __forceinline__ void multiply_slice(const Weights& weights, uint32_t x, uint32_t lane, float (&sums)[2][Groups][4]) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        Operands w;
        weights.load(w, half, lane);
        multiply<T, Weights::kInOrder>(w, x, half, lane, sums);
    }
}

// A tile of `Rows` by `Columns` 16-bit elements of a matrix [rows, columns], one element after the other: for rows that are
// not aligned to 16 bytes. Zero outside; `offset(row, chunk)` is the place of eight elements, `order` says where rows lie.
template <int Rows, int Columns, int Threads, typename T, typename Offset, typename Order = InOrder>
__device__ __forceinline__ void fill_tile(uint8_t* tile, const T* matrix, uint32_t first_row, uint32_t rows, uint32_t first_column,
                                          uint32_t columns, Offset offset, const Order& order = Order{}) {
    for (uint32_t i = threadIdx.x; i < Rows * Columns; i += Threads) {
        const uint32_t row = i / Columns, column = i % Columns;
        const bool inside = first_row + row < rows && first_column + column < columns;
        const T value = inside ? matrix[size_t(order.input(first_row + row)) * columns + first_column + column] : T{};
        *reinterpret_cast<T*>(tile + offset(row, column / 8) + column % 8 * sizeof(T)) = value;
    }
}

// The same tile out of 4-bit codes, in pieces of 32 that are aligned in the flat weight: a row of the tile touches one more
// than it would if it were aligned.
template <int Rows, int Columns, int Threads, typename T, typename Offset>
__device__ __forceinline__ void decode_tile(uint8_t* tile, const Weight& weight, const WarpDecoder& decoder, uint32_t first_row,
                                            uint32_t rows, uint32_t first_column, uint32_t columns, Offset offset) {
    constexpr uint32_t kPieces = Columns / 32 + 1, kItems = (Rows * kPieces + Threads - 1) / Threads * Threads;
    if (first_row + Rows > rows || first_column + Columns > columns) {
        for (uint32_t i = threadIdx.x; i < Rows * Columns / 8; i += Threads) {
            reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }
    const uint64_t bytes = (uint64_t(rows) * columns + 1) / 2;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kItems; i += Threads) {  // decoding takes whole warps
        const uint32_t row = i / kPieces;
        const uint64_t begin = uint64_t(first_row + row) * columns + first_column;
        const uint32_t length = min(uint32_t(Columns), columns - first_column), lead = begin % 32;
        const uint32_t at = i % kPieces * 32;  // from begin - lead on
        const bool inside = row < Rows && first_row + row < rows && at < lead + length;
        const uint64_t flat = inside ? begin - lead + at : 0;
        const uint4 piece = load_piece(static_cast<const uint8_t*>(weight.data), flat / 2, bytes);
        const uint64_t block[1] = {flat >> weight.block_shift};
        float absmax[1];
        weight.absmax.load(block, absmax);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            float values[8];
            decoder.decode(word(piece, q), absmax[0], values);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const uint32_t column = at + q * 8 + e - lead;  // wraps below 0, and then is not below length
                if (inside && column < length) {
                    *reinterpret_cast<T*>(tile + offset(row, column / 8) + column % 8 * sizeof(T)) = from_f32<T>(values[e]);
                }
            }
        }
    }
}
