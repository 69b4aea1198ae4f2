// Hopper's own instructions, one function each: barriers that count arrivals, registers that move between warps, and the
// products of warpgroups (four warps). They exist for compute_90a alone.
#pragma once

#include <cstdint>

#include "dtype.cuh"

namespace hopper {

// --- Barriers in shared memory: a phase ends when `arrivals` threads have arrived.

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the current phase if `parity` is that phase's (0 for the first); returns at once for the other.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (done == 0);
}

// Arrives, and lets the phase last until `bytes` more have been copied here.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Lets the phase last until `bytes` more have been copied here; does not arrive.
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// What `arrive` and `wait` of other threads refer to is there.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Makes what this thread has written to shared memory visible to wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for `Threads` threads of the block, those that name the same barrier (1..15).
template <int Threads>
__device__ __forceinline__ void sync_some(uint32_t barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(Threads) : "memory");
}

// --- Blocks of a cluster, which reach each other's shared memory.

// Called once by all threads: says that the block has started and its barriers are there.
__device__ __forceinline__ void meet_blocks() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// Called once by all threads, later: waits for that of all blocks.
__device__ __forceinline__ void wait_for_blocks() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The place in a block's shared memory that `shared` is in this one's. Of use to the functions below.
__device__ __forceinline__ uint32_t address_in(uint32_t block, uint32_t shared) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(block));
    return address;
}

__device__ __forceinline__ void store_at(uint32_t address, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void arrive_at(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// `wait` for arrivals of other blocks: what they stored before can be read.
__device__ __forceinline__ void wait_for_others(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (done == 0);
}

// --- Copies of bytes.

// Copies `bytes` bytes, a multiple of 16, between addresses that are multiples of 16; `barrier` counts them.
__device__ __forceinline__ void copy_bytes(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// What this thread has written to shared memory comes before what is copied there after the next barrier.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Copies of boxes of a matrix in global memory, described by the host.

// A CUtensorMap: 128 bytes that nobody but the copying unit understands.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box whose first element is `column` of `row` to shared memory; `barrier` counts its bytes. Elements outside of
// the matrix are zero.
__device__ __forceinline__ void copy_box(uint32_t shared, const TensorMap& map, uint32_t column, uint32_t row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Asks L2 for the 128 bytes that `global` lies in.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// --- Registers per thread, for all warps of a warpgroup.

template <int Registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// --- Transposing store: lane l names the 16 bytes that row l % 8 of matrix l / 8 goes to; a lane (g, t) = (l / 4, l % 4)
// gives elements [2t][g] and [2t + 1][g] of every matrix.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// --- Products of a warpgroup: d [64, N] (+)= a [64, 16] b [N, 16]^T in f32. Warp w holds rows 16 w to 16 w + 15; its lane
// (g, t) holds d[g + 8 i][8 j + 2 t + e] in d[4 j + 2 i + e], and of a in registers what `ptx::mma_bf16` says.

// A tile in shared memory whose lines are 128 bytes, 16-byte chunk c of line r lying at c ^ (r % 8); aligned to 1 KiB. Lines
// are rows of a or b, and `+ 2` is 16 elements further along k. Or they are 64 rows of a at one k (`Columns` of the product),
// and `+ 128` is 16 lines further.
__device__ __forceinline__ uint64_t describe(uint32_t address) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32, kUnused = uint64_t(1) << 16;
    return (address & 0x3ffff) >> 4 | kUnused | kEightRows | kSwizzle128;
}

// Between writing registers and giving them to a product.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <typename T, int N>
struct Product;

#define OUT8(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3]), "+f"(d[I + 4]), "+f"(d[I + 5]), "+f"(d[I + 6]), "+f"(d[I + 7])
#define OUT32(I) OUT8(I), OUT8(I + 8), OUT8(I + 16), OUT8(I + 24)
#define OUT64(I) OUT32(I), OUT32(I + 32)
#define OUT128(I) OUT64(I), OUT64(I + 64)
#define D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D64 \
    D32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D128 \
    D64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// X0 to X5: the names of the operands after d's: four registers of a (or, in X0, a descriptor), then b's descriptor, then
// whether to add to what d holds (and whether a's lines are its columns).
#define PRODUCT(T, N, COUNT, X0, X1, X2, X3, X4, X5)                                                                          \
    template <>                                                                                                               \
    struct Product<T, N> {                                                                                                    \
        static __device__ __forceinline__ void add(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, uint32_t add) {     \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " X5 ", 0;\n"                                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " {" D##COUNT "}, {" X0 ", " X1 ", " X2  \
                         ", " X3 "}, " X4 ", p, 1, 1, 0;}"                                                                    \
                         : OUT##COUNT(0)                                                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                     \
        }                                                                                                                     \
        template <bool Columns = false>                                                                                       \
        static __device__ __forceinline__ void add(float (&d)[COUNT], uint64_t a, uint64_t b, uint32_t add) {                 \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " X2 ", 0;\n"                                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " {" D##COUNT "}, " X0 ", " X1           \
                         ", p, 1, 1, " X3 ", 0;}"                                                                             \
                         : OUT##COUNT(0)                                                                                      \
                         : "l"(a), "l"(b), "r"(add), "n"(int(Columns)));                                                      \
        }                                                                                                                     \
    };
PRODUCT(f16, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
PRODUCT(bf16, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
PRODUCT(f16, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
PRODUCT(bf16, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
PRODUCT(f16, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
PRODUCT(bf16, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
#undef PRODUCT
#undef D128
#undef D64
#undef D32
#undef OUT128
#undef OUT64
#undef OUT32
#undef OUT8

}  // namespace hopper
