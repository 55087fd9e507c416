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

// Copies a box of a 2-D tensor, beginning at (column, row), to shared memory; what lies outside comes as zeros.
DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
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
// For each size: blocks of n, rows of x, what d's registers are called, the numbers of the operands after them, and
// which registers d's are.
#define WGMMA_OF(blocks, size, outs, a0, a1, a2, a3, x, p, ...)                                \
  DEVICE void wgmma(float (&d)[blocks][4], const uint32_t* a, uint64_t b, int add) {           \
    asm volatile(WGMMA_TEXT(size, %p) "{" outs "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, " \
                 "%" #x ", add, 1, 1, 0;}"                                                     \
                 : __VA_ARGS__ : A_REGISTERS, "l"(b), "r"(add));                               \
  }
WGMMA_OF(4, 32, OUT10() "%10, %11, %12, %13, %14, %15", 16, 17, 18, 19, 20, 21, SUM16(0))
WGMMA_OF(6, 48, OUT20(, 1) "%20, %21, %22, %23", 24, 25, 26, 27, 28, 29, SUM16(0), SUM4(4), SUM4(5))
WGMMA_OF(8, 64, OUT20(, 1) OUT10(2) "%30, %31", 32, 33, 34, 35, 36, 37, SUM16(0), SUM16(4))
WGMMA_OF(10, 80, OUT20(, 1) OUT10(2) "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39",
         40, 41, 42, 43, 44, 45, SUM16(0), SUM16(4), SUM4(8), SUM4(9))
WGMMA_OF(12, 96, OUT20(, 1) OUT20(2, 3) "%40, %41, %42, %43, %44, %45, %46, %47",
         48, 49, 50, 51, 52, 53, SUM16(0), SUM16(4), SUM16(8))
WGMMA_OF(14, 112, OUT20(, 1) OUT20(2, 3) OUT10(4) "%50, %51, %52, %53, %54, %55",
         56, 57, 58, 59, 60, 61, SUM16(0), SUM16(4), SUM16(8), SUM4(12), SUM4(13))
WGMMA_OF(16, 128, OUT60 "%60, %61, %62, %63", 64, 65, 66, 67, 68, 69, SUM64(0))
WGMMA_OF(20, 160, OUT60 OUT10(6) "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79",
         80, 81, 82, 83, 84, 85, SUM64(0), SUM16(16))
WGMMA_OF(24, 192, OUT60 OUT20(6, 7) OUT10(8) "%90, %91, %92, %93, %94, %95",
         96, 97, 98, 99, 100, 101, SUM64(0), SUM16(16), SUM16(20))
WGMMA_OF(28, 224, OUT100 OUT10(10) "%110, %111",
         112, 113, 114, 115, 116, 117, SUM64(0), SUM16(16), SUM16(20), SUM16(24))
WGMMA_OF(32, 256, OUT100 OUT20(10, 11) "%120, %121, %122, %123, %124, %125, %126, %127",
         128, 129, 130, 131, 132, 133, SUM64(0), SUM64(16))
#undef WGMMA_OF

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
