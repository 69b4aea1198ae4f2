// y = row_scale * (x w^T + v b^T) + bias for 16-bit x and many tokens, on Hopper: outputs are rows of w. The other kernels of
// `matmul` serve devices that are not Hopper.

#include "prefill.cuh"

// Codes come in boxes of 128 rows by 32 bytes, elements in boxes of 128 by 64, permuted within rows of a box.
template <typename T, bool Codes>
struct Rows {
    static constexpr bool kBranchFirst = false;
    static constexpr bool kColumns = false;
    static constexpr uint32_t kNext = 2;
    using Order = NaturalOrder;

    static __device__ __forceinline__ void copy(uint32_t to, const hopper::TensorMap& w, uint32_t k, uint32_t first_row, uint32_t barrier) {
        hopper::copy_box(to, w, Codes ? k / 2 : k, first_row, barrier);
    }

    static __device__ __forceinline__ uint32_t left(uint32_t tile, uint32_t warp) { return tile + warp / 4 * 64 * kTileRow; }

    // A thread has the absmax of one row of codes, of both halves of a slice.
    struct Scales {
        RowBlocks blocks;

        // Asks L2 for all of them, in lines of 128 bytes.
        __device__ __forceinline__ Scales(const Params& p, const Unit& unit) : blocks(p, unit.first_row + threadIdx.x) {
            if (!Codes) return;
            const Absmax& absmax = p.weight.absmax;
            const bool plain = absmax.plain != nullptr;
            const uint64_t begin = blocks.find(p, 0, unit.begin * kSlice), end = blocks.find(p, 0, min(unit.end * kSlice, p.k) - 1);
            const uint32_t size = plain ? sizeof(float) : 1;
            const uint8_t* from = plain ? reinterpret_cast<const uint8_t*>(absmax.plain) : absmax.q;
#pragma unroll 1
            for (uint64_t block = begin; block <= end; block += 128 / size) hopper::prefetch_l2(from + block * size);
        }

        // Those of a slice and the next one.
        __device__ __forceinline__ void request(const Params& p, uint32_t step, PendingAbsmax<4>& pending) const {
            uint64_t block[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t k = step * kSlice + i * 32;
                block[i] = blocks.find(p, 0, k < p.k ? k : 0);
            }
            pending.request(p.weight.absmax, block);
        }

        __device__ __forceinline__ bool exists(const Params& p, uint32_t step, uint32_t half) const { return half == 0 || step * kSlice + 32 < p.k; }
        __device__ __forceinline__ uint32_t place() const { return threadIdx.x * 8; }
    };

    // Lane (g, t) has rows g and g + 8; its byte of a word of codes is byte t.
    struct Operands {
        PairColumn pairs;
        uint32_t selector, codes, chunk, scales;

        __device__ __forceinline__ Operands(uint32_t table, uint32_t warp, uint32_t lane)
            : pairs(table, lane), selector(PairColumn::select(lane % 4)) {
            const uint32_t row = warp * 16 + lane / 4;
            codes = row * (kSlice / 2), chunk = row / 4 & 1, scales = row * 8;
        }

        __device__ __forceinline__ uint32_t operator()(uint32_t word, float scale) const {
            float low, high;
            pairs.look_up(word, selector, low, high);
            return Pair<T>::pack(__fmul_rn(low, scale), __fmul_rn(high, scale));
        }

        __device__ __forceinline__ void decode(uint32_t tile, uint32_t absmax, uint32_t (&operands)[4][4]) const {
            const uint2 low = ptx::load_shared8(absmax + scales), high = ptx::load_shared8(absmax + scales + 64);
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t at = tile + codes + (half ^ chunk) * 16;
                const uint4 a = ptx::load_shared16(at), b = ptx::load_shared16(at + 256);
                const float scale_a = __uint_as_float(half ? low.y : low.x), scale_b = __uint_as_float(half ? high.y : high.x);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    uint32_t(&operand)[4] = operands[half * 2 + j];
                    operand[0] = (*this)(word(a, 2 * j), scale_a);
                    operand[1] = (*this)(word(b, 2 * j), scale_b);
                    operand[2] = (*this)(word(a, 2 * j + 1), scale_a);
                    operand[3] = (*this)(word(b, 2 * j + 1), scale_b);
                }
            }
        }
    };

    static __device__ __forceinline__ bool reaches(const Adapter& adapter, uint32_t first_row) { return ::reaches(adapter, first_row, kRows); }
    // Outside of the slice it is large.
    static __device__ __forceinline__ uint32_t row_of(const Adapter& adapter, uint32_t output) { return output - adapter.first_row; }
    static __device__ __forceinline__ uint32_t rows_of(const Adapter& adapter, const Params&) { return adapter.rows; }

    // Two ranks of a row of lora_b; zero where there is none.
    static __device__ __forceinline__ void load_pair(const Params& p, const Adapter& adapter, uint32_t row, uint32_t r, float& first, float& second) {
        float values[2];
        if (p.branch.b_is_f32) {
            load_padded(static_cast<const float*>(adapter.b) + size_t(row) * adapter.rank, r, adapter.rank, values);
        } else {
            load_padded(static_cast<const T*>(adapter.b) + size_t(row) * adapter.rank, r, adapter.rank, values);
        }
        first = values[0], second = values[1];
    }

    template <int Tokens>
    static __device__ __forceinline__ void drop(const Dropout&, uint32_t, uint32_t, uint32_t, uint32_t, float (&)[Tokens / 2]) {}
};

PREFILL_ENTRIES(prefill, Rows, f16)
PREFILL_ENTRIES(prefill, Rows, bf16)
