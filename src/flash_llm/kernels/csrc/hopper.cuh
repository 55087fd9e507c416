// Hopper's own instructions: barriers in shared memory, the tensor copy engine, and warpgroup matrix multiplies.
#pragma once
#include "ptx.cuh"

struct __align__(64) TensorMap {
  uint64_t opaque[16];
};

DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// The same for who has nothing else to do: asleep meanwhile, since asking again and again takes the others' turns.
DEVICE void barrier_wait_asleep(uint32_t barrier, uint32_t parity) {
  const uint32_t nanoseconds = 1000000;
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity), "r"(nanoseconds) : "memory");
}

// Registers of each thread of a warpgroup: some have more than they need, some need more than they began with.
template <int COUNT>
DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// The same for threads of a block of THREADS that may have begun with more or with less: each with its even share.
template <int COUNT, int THREADS>
DEVICE void set_registers() {
  constexpr int SHARE = 65536 / THREADS / 8 * 8;
  if constexpr (COUNT > SHARE) take_registers<COUNT>();
  if constexpr (COUNT < SHARE) give_registers<COUNT>();
}

// Four 8x8 matrices of 16-bit numbers: lanes 0-7 give where the rows of the first go, and so on.
DEVICE void store_matrices(uint32_t address, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// What this thread wrote to shared memory is to be seen by the tensor cores and the copy engine.
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies a box of a 2-D tensor, beginning at (column, row), to shared memory; what lies outside comes as zeros.
DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// The same to this place in each block of the cluster that `blocks` has a bit for, and their barriers.
DEVICE void copy_box_to(uint32_t blocks, uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((uint16_t)blocks) : "memory");
}

// Arrives at a barrier of the cluster's block `block`, given by its address in this one.
DEVICE void barrier_arrive_in(uint32_t block, uint32_t barrier) {
  asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier), "r"(block) : "memory");
}
// Waits until all threads of the cluster that have not ended are here.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed; barrier.cluster.wait;" ::: "memory");
}

// Fetches the description itself ahead of its first use.
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Copies bytes that follow each other, a multiple of 16, to shared memory.
DEVICE void copy_bytes(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(target), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

// B in shared memory: rows of ROW bytes, 128 or 64, that are 64 columns, 8 rows to a swizzled group.
template <int ROW>
DEVICE uint64_t swizzled_descriptor(uint32_t address) {
  const uint64_t stride = 8 * ROW >> 4, swizzle = 128 / ROW;
  return (uint64_t)((address & 0x3FFFF) >> 4) | (1ull << 16) | (stride << 32) | (swizzle << 62);
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

#define SUM "+f"
#define SUM4(j) SUM(d[j][0]), SUM(d[j][1]), SUM(d[j][2]), SUM(d[j][3])
#define SUM16(j) SUM4(j), SUM4(j + 1), SUM4(j + 2), SUM4(j + 3)
#define SUM64(j) SUM16(j), SUM16(j + 4), SUM16(j + 8), SUM16(j + 12)
#define OUT10(a)                                                                                     \
  "%" #a "0, %" #a "1, %" #a "2, %" #a "3, %" #a "4, %" #a "5, %" #a "6, %" #a "7, %" #a "8, %" #a "9, "
#define OUT20(a, b) OUT10(a) OUT10(b)
#define OUT60 OUT20(, 1) OUT20(2, 3) OUT20(4, 5)
#define OUT100 OUT60 OUT20(6, 7) OUT20(8, 9)
#define A_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define WGMMA_HEAD(p) "{.reg .pred add; setp.ne.b32 add, " #p ", 0; "
#define WGMMA_TEXT(n, p) WGMMA_HEAD(p) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." VALUE "." VALUE " "

// d [64 x 8 BLOCKS] = a [64 x 16] from registers times b [16 x 8 BLOCKS] from shared memory, plus what d was, if `add`.
DEVICE void wgmma(float (&d)[4][4], const uint32_t* a, uint64_t b, int add) {
  asm volatile(WGMMA_TEXT(32, %21) "{" OUT10() "%10, %11, %12, %13, %14, %15}, "
               "{%16, %17, %18, %19}, %20, add, 1, 1, 0;}"
               : SUM16(0) : A_REGISTERS, "l"(b), "r"(add));
}
DEVICE void wgmma(float (&d)[8][4], const uint32_t* a, uint64_t b, int add) {
  asm volatile(WGMMA_TEXT(64, %37) "{" OUT20(, 1) OUT10(2) "%30, %31}, "
               "{%32, %33, %34, %35}, %36, add, 1, 1, 0;}"
               : SUM16(0), SUM16(4) : A_REGISTERS, "l"(b), "r"(add));
}

// The same with A from shared memory too, for so many BLOCKS from d on.
template <int BLOCKS>
DEVICE void wgmma_shared(float (*d)[4], uint64_t a, uint64_t b, int add);
template <>
DEVICE void wgmma_shared<12>(float (*d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(WGMMA_TEXT(96, %50) "{" OUT20(, 1) OUT20(2, 3) "%40, %41, %42, %43, %44, %45, %46, %47}, "
               "%48, %49, add, 1, 1, 0, 0;}"
               : SUM16(0), SUM16(4), SUM16(8) : "l"(a), "l"(b), "r"(add));
}
template <>
DEVICE void wgmma_shared<16>(float (*d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(WGMMA_TEXT(128, %66) "{" OUT60 "%60, %61, %62, %63}, %64, %65, add, 1, 1, 0, 0;}"
               : SUM64(0) : "l"(a), "l"(b), "r"(add));
}

// The same with 8 bits on both sides and K steps of 32: float8 e4m3 into float32, or int8 into int32.
#undef SUM
#if VALUES == 2
typedef int Sum8;
#define SUM "+r"
#define WGMMA8_TEXT(n, p) WGMMA_HEAD(p) "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 "
#define WGMMA8_END "add;}"
#else
typedef float Sum8;
#define SUM "+f"
#define WGMMA8_TEXT(n, p) WGMMA_HEAD(p) "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 "
#define WGMMA8_END "add, 1, 1;}"
#endif
DEVICE void wgmma8(Sum8 (&d)[2][4], const uint32_t* a, uint64_t b, int add) {
  asm volatile(WGMMA8_TEXT(16, %13) "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, " WGMMA8_END
               : SUM4(0), SUM4(1) : A_REGISTERS, "l"(b), "r"(add));
}
DEVICE void wgmma8(Sum8 (&d)[4][4], const uint32_t* a, uint64_t b, int add) {
  asm volatile(WGMMA8_TEXT(32, %21) "{" OUT10() "%10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, " WGMMA8_END
               : SUM16(0) : A_REGISTERS, "l"(b), "r"(add));
}
DEVICE void wgmma8(Sum8 (&d)[8][4], const uint32_t* a, uint64_t b, int add) {
  asm volatile(WGMMA8_TEXT(64, %37) "{" OUT20(, 1) OUT10(2) "%30, %31}, {%32, %33, %34, %35}, %36, " WGMMA8_END
               : SUM16(0), SUM16(4) : A_REGISTERS, "l"(b), "r"(add));
}
#undef SUM
#undef WGMMA8_TEXT
#undef WGMMA8_END
#undef WGMMA_HEAD
#undef SUM4
#undef SUM16
#undef SUM64
#undef OUT10
#undef OUT20
#undef OUT60
#undef OUT100
#undef A_REGISTERS
#undef WGMMA_TEXT
