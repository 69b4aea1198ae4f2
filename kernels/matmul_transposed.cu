// dx = dy w + dropout(u a): the gradient of x where y = x w^T + (...) b^T. Sums are f32.
//
// It is `matmul` with another weight: what `Params` calls n are the inputs of the layer here, the outputs of this product, and
// what it calls k are the layer's outputs, the rows of w [k, n] as it is stored. A block takes 128 columns of w, 32 per warp.
// Slices are 64 rows of these columns; on the way to registers they are transposed. Elements are by ldmatrix; of codes a lane
// gets four neighbours of each of two rows in one word by the same instruction, decodes them one by one, and packs what lies
// in one column. So no weight is moved twice.

#include "block_product.cuh"

struct TransposedParams {
    Params product;
    Dropout dropout;
};
static_assert(sizeof(TransposedParams) == 248, "the Rust twin has this size");

constexpr uint32_t kColumns = kRows;  // of w, of a block

// The tile of elements: 64 rows of 16 chunks. The eight rows that ldmatrix reads together have them in different places.
__device__ __forceinline__ uint32_t transposed_offset(uint32_t row, uint32_t chunk) { return row * kColumns * 2 + (chunk ^ row % 8) * 16; }

// Copies the slices' rows of a block's columns, `RowBytes` of each; zero outside of the matrix.
template <int RowBytes>
struct SliceCopier {
    static constexpr uint32_t kChunks = RowBytes / 16, kElements = kColumns / kChunks;
    const uint8_t* from;  // the thread's chunk of row 0
    const Params& p;
    bool inside;          // it has columns of the matrix

    __device__ __forceinline__ SliceCopier(const Params& p, uint32_t first_column) : p(p) {
        const uint32_t column = first_column + threadIdx.x % kChunks * kElements;
        inside = column < p.n;
        from = static_cast<const uint8_t*>(p.weight.data) + (inside ? column / kElements * 16 : 0);
    }

    template <typename Offset>
    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice, Offset offset) const {
        const uint32_t first = threadIdx.x / kChunks, left = inside ? p.k - slice * kSlice : 0;
        const uint64_t pitch = p.n / kElements * 16;
        const uint8_t* at = from + (slice * kSlice + first) * pitch;
#pragma unroll
        for (uint32_t i = 0; i < kSlice; i += kThreads / kChunks, at += kThreads / kChunks * pitch) {
            const bool exists = first + i < left;
            ptx::copy_async16(shared + offset(first + i, threadIdx.x % kChunks), exists ? at : from, exists ? 16 : 0);
        }
    }
};

// The row of a slice that lane l's matrix row is, when four matrices are loaded for half a slice: matrix l / 8 is part l / 8 of
// the operands' order, and its rows are pairs of neighbours of each t.
__device__ __forceinline__ uint32_t operand_row(uint32_t half, uint32_t lane, uint32_t part) {
    return lane % 8 / 2 * 16 + half * 8 + part * 2 + lane % 2;
}

// Elements of dy's type. The interface is DenseTile's.
template <typename T, int, int>
struct TransposedDense {
    static constexpr bool kInOrder = true;
    static constexpr uint32_t kBytes = kSlice * kColumns * 2;
    SliceCopier<kColumns * 2> copier;
    uint32_t tile;  // shared address of the lane's chunk

    __device__ __forceinline__ TransposedDense(const Params& p, uint32_t first_column, uint32_t) : copier(p, first_column) {}

    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice) const { copier.copy(shared, slice, transposed_offset); }
    __device__ __forceinline__ void fetch_scales(const Params&, uint32_t, uint32_t) {}
    // Of the four matrices of a multiplication the second has the next eight columns, the other two the next eight rows.
    __device__ __forceinline__ void begin(const Params&, uint32_t shared, uint32_t, uint32_t column, uint32_t lane) {
        tile = shared + transposed_offset(lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2);
    }

    __device__ __forceinline__ void load(Operands& w, uint32_t half, uint32_t) const {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
            for (uint32_t j = 0; j < 2; ++j) ptx::load_transposed((tile ^ i * 32) + transposed_offset(half * 32 + j * 16, 0), w.a[i][j]);
        }
    }

    template <int Groups>
    static __device__ __forceinline__ void stage(float* staging, uint32_t pitch, uint32_t lane, const float (&sums)[2][Groups][4]) {
        stage_sums(staging, pitch, lane, sums);
    }
};

// 4-bit codes, decoded to what the reference has: round_T(value * absmax). Lane (g, t) holds columns 4 g to 4 g + 3 of the
// warp's 32, of 16 rows from 16 t on. The absmax of a slice come through shared memory, one for each row and 32 columns, which
// are in one block.
template <typename T, int, int>
struct TransposedCodes {
    static constexpr bool kInOrder = false;
    static constexpr uint32_t kRowBytes = kColumns / 2, kBytes = kSlice * kRowBytes;
    SliceCopier<kRowBytes> copier;
    WarpDecoder decoder;
    PendingAbsmax<2> next;
    uint32_t first_column, tile, scales;  // the block's; shared addresses of the slice's codes and of the warp's absmax

    __device__ __forceinline__ TransposedCodes(const Params& p, uint32_t first_column, uint32_t)
        : copier(p, first_column), decoder(p.weight.codebook), first_column(first_column) {
        request(p, Range((p.k + kSlice - 1) / kSlice, blockIdx.y, p.splits).begin);
    }

    static __device__ __forceinline__ uint32_t offset(uint32_t row, uint32_t chunk) { return row * kRowBytes + (chunk ^ row / 16) * 16; }
    // The row whose absmax lies at a place: lanes t read four neighbouring rows of 16 t at a time.
    static __device__ __forceinline__ uint32_t row_at(uint32_t place) { return place / 4 % 4 * 16 + place / 16 * 4 + place % 4; }

    __device__ __forceinline__ void copy(uint32_t shared, uint32_t slice) const { copier.copy(shared, slice, offset); }

    // A thread has one row of a slice, and two pieces of 32 columns. Nothing of this is kept in registers between slices.
    struct Share {
        uint32_t place, piece;
        uint64_t row;
        __device__ __forceinline__ explicit Share(uint32_t slice) {
            const uint32_t thread = ptx::thread_now();
            place = thread % kSlice, piece = thread / kSlice * 2, row = slice * kSlice + row_at(place);
        }
    };
    __device__ __forceinline__ uint32_t column(const Share& share, uint32_t i) const { return first_column + (share.piece + i) * 32; }
    __device__ __forceinline__ void request(const Params& p, uint32_t slice) {
        const Share share(slice);
        uint64_t block[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const bool exists = share.row < p.k && column(share, i) < p.n;
            block[i] = exists ? (share.row * p.n + column(share, i)) >> p.weight.block_shift : 0;
        }
        next.request(p.weight.absmax, block);
    }

    // Publishes the absmax of a slice, the next after the one that is multiplied, and requests those of the one after it.
    __device__ __forceinline__ void fetch_scales(const Params& p, uint32_t slice, uint32_t) {
        const Share share(slice);
        float values[2];
        next.get(p.weight.absmax, values);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const bool exists = share.row < p.k && column(share, i) < p.n;
            published(slice)[share.piece + i][share.place] = exists ? values[i] : 0.0f;
        }
        request(p, slice + 1);
    }

    static __device__ __forceinline__ float (&published(uint32_t slice))[kWarps][kSlice] {
        __shared__ alignas(16) float absmax[2][kWarps][kSlice];
        return absmax[slice % 2];
    }

    __device__ __forceinline__ void begin(const Params&, uint32_t shared, uint32_t slice, uint32_t column, uint32_t) {
        tile = shared;
        scales = ptx::shared_address(published(slice)[column / kWarpRows]);
    }

    __device__ __forceinline__ void load(Operands& w, uint32_t half, uint32_t lane) const {
        uint32_t codes[4];
        ptx::load_transposed(tile + offset(operand_row(half, lane, lane / 8), threadIdx.x / 32), codes);
        const uint4 low = ptx::load_shared16(scales + half * 128 + lane % 4 * 16), high = ptx::load_shared16(scales + half * 128 + 64 + lane % 4 * 16);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const uint4& scale = q < 2 ? low : high;
            float first[4], second[4];
            decoder.decode(codes[q], __uint_as_float(word(scale, q % 2 * 2)), first);
            decoder.decode(codes[q] >> 16, __uint_as_float(word(scale, q % 2 * 2 + 1)), second);
#pragma unroll
            for (int i = 0; i < 4; ++i) w.a[i / 2][q / 2][i % 2 + q % 2 * 2] = Pair<T>::pack(first[i], second[i]);
        }
    }

    template <int Groups>
    static __device__ __forceinline__ void stage(float* staging, uint32_t pitch, uint32_t lane, const float (&sums)[2][Groups][4]) {
        const uint32_t to = ptx::shared_address(staging + lane % 4 * 2 * pitch + lane / 4 * 4);
        const auto bits = [](float x) { return __float_as_uint(x); };
#pragma unroll
        for (int m = 0; m < Groups; ++m) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const uint4 four = make_uint4(bits(sums[0][m][e]), bits(sums[0][m][2 + e]), bits(sums[1][m][e]), bits(sums[1][m][2 + e]));
                ptx::store_shared16(to + (m * 8 + e) * pitch * sizeof(float), four);
            }
        }
    }
};

__device__ __forceinline__ OfInputs side_of(const TransposedParams& p) { return OfInputs{p.product.n, p.dropout}; }

template <typename T, template <typename, int, int> class Tile, int Tokens, int Stages>
__device__ __forceinline__ void matmul_transposed(const TransposedParams& p) {
    multiply_block<T, Tile, Tokens, Stages>(p.product, side_of(p));
}

template <typename T, bool Codes, int Tokens>
__device__ __forceinline__ void matmul_transposed_ragged(const TransposedParams& all) {
    const Params& p = all.product;
    const WarpDecoder decoder(p.weight.codebook);
    const auto fill = [&](uint8_t* tile, uint32_t first_column, uint32_t first_row) {
        if constexpr (Codes) {
            decode_tile<kSlice, kColumns, kThreads, T>(tile, p.weight, decoder, first_row, p.k, first_column, p.n, transposed_offset);
        } else {
            fill_tile<kSlice, kColumns, kThreads>(tile, static_cast<const T*>(p.weight.data), first_row, p.k, first_column, p.n, transposed_offset);
        }
    };
    multiply_block_ragged<T, TransposedDense<T, kRows, kThreads>, Tokens>(p, fill, side_of(all));
}

// f32 dy, with f32 products: 64 tokens by 64 columns, four by four for a thread, 16 rows of w at a time.
constexpr uint32_t kF32Tile = 64, kF32Step = 16, kF32Threads = 256, kF32Pitch = kF32Tile + 4;

template <bool Codes>
__device__ __forceinline__ void matmul_transposed_f32(const TransposedParams& all) {
    __shared__ alignas(16) float memory[kF32Tile * kF32Pitch];
    const Params& p = all.product;
    float(&dy)[kF32Step][kF32Pitch] = *reinterpret_cast<float(*)[kF32Step][kF32Pitch]>(memory);
    float(&w)[kF32Step][kF32Pitch] = *reinterpret_cast<float(*)[kF32Step][kF32Pitch]>(memory + kF32Step * kF32Pitch);
    const uint32_t token_tiles = (p.tokens - 1) / kF32Tile + 1;
    const uint32_t first_column = blockIdx.x / token_tiles * kF32Tile, first_token = blockIdx.x % token_tiles * kF32Tile;
    const uint32_t m = threadIdx.x / 16 * 4, c = threadIdx.x % 16 * 4;
    const Range range((p.k + kF32Step - 1) / kF32Step, blockIdx.y, p.splits);
    const WarpDecoder decoder(p.weight.codebook);
    float sums[4][4] = {};
#pragma unroll 1
    for (uint32_t step = range.begin; step < range.end; ++step) {
        __syncthreads();
#pragma unroll
        for (uint32_t i = threadIdx.x; i < kF32Step * kF32Tile; i += kF32Threads) {
            const uint32_t token = first_token + i / kF32Step, n = step * kF32Step + i % kF32Step;
            const bool exists = token < p.tokens && n < p.k;
            dy[i % kF32Step][i / kF32Step] = exists ? static_cast<const float*>(p.x)[size_t(token) * p.k + n] : 0.0f;
            const uint32_t row = step * kF32Step + i / kF32Tile, column = first_column + i % kF32Tile;
            const bool inside = row < p.k && column < p.n;
            const uint64_t flat = inside ? uint64_t(row) * p.n + column : 0;
            float value[1] = {0.0f};
            if constexpr (Codes) {
                const uint64_t block[1] = {flat >> p.weight.block_shift};
                float absmax[1];
                p.weight.absmax.load(block, absmax);
                const uint32_t code = static_cast<const uint8_t*>(p.weight.data)[flat / 2] >> (flat % 2 ? 0 : 4);
                decoder.decode(code << 4, absmax[0], value);  // the first element is the high nibble's
            } else if (inside) {
                value[0] = static_cast<const float*>(p.weight.data)[flat];
            }
            w[i / kF32Tile][i % kF32Tile] = inside ? value[0] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (uint32_t n = 0; n < kF32Step; ++n) {
            const float4 x = *reinterpret_cast<const float4*>(&dy[n][m]), y = *reinterpret_cast<const float4*>(&w[n][c]);
            const float of_token[4] = {x.x, x.y, x.z, x.w}, of_column[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(of_token[i], of_column[j], sums[i][j]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<float4*>(&memory[(m + i) * kF32Pitch + c]) = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    }
    if (p.branch.adapters.entries != nullptr) {
        add_low_rank<float, kF32Tile, kF32Tile>(p.branch, first_token, p.tokens, first_column, p.n, memory, kF32Pitch, blockIdx.y, p.splits, side_of(all));
    }
    __syncthreads();
    const uint32_t column = threadIdx.x % kF32Tile;
    if (first_column + column >= p.n) return;
    const Column<float> output(p.output, p.n, first_column + column);
    for (uint32_t i = threadIdx.x / kF32Tile; i < kF32Tile && first_token + i < p.tokens; i += kF32Threads / kF32Tile) {
        output.store(first_token + i, memory[i * kF32Pitch + column], blockIdx.y, p.tokens);
    }
}

#define ENTRY(NAME, ...) BLOCK_ENTRY(NAME, TransposedParams, __VA_ARGS__)
#define TILES(KIND, T, TILE, STAGES, CODES)                                              \
    ENTRY(matmul_transposed_##KIND##_##T##_t16, matmul_transposed<T, TILE, 16, STAGES>)   \
    ENTRY(matmul_transposed_##KIND##_##T##_t64, matmul_transposed<T, TILE, 64, STAGES>)   \
    ENTRY(matmul_transposed_##KIND##_##T##_t128, matmul_transposed<T, TILE, 128, STAGES>) \
    ENTRY(matmul_transposed_##KIND##_##T##_t64_ragged, matmul_transposed_ragged<T, CODES, 64>)

TILES(nf4, f16, TransposedCodes, 4, true)
TILES(nf4, bf16, TransposedCodes, 4, true)
TILES(dense, f16, TransposedDense, 3, false)
TILES(dense, bf16, TransposedDense, 3, false)

#define ENTRY_F32(KIND, CODES)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(kF32Threads, 2) matmul_transposed_##KIND##_f32(const __grid_constant__ TransposedParams p) { \
        matmul_transposed_f32<CODES>(p);                                                                                                 \
    }
ENTRY_F32(nf4, true)
ENTRY_F32(dense, false)
