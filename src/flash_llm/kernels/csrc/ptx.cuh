// Single instructions, by their PTX names. No header is included anywhere: NVRTC alone builds the kernels.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

#define DEVICE __device__ __forceinline__

DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
DEVICE uint4 load_shared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
DEVICE float2 load_shared2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
// The larger one, or not a number if one of them is none.
DEVICE float maximum(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value));
}

// Asks L2 for a line of 128 bytes.
DEVICE void prefetch_line(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

// Weights are read once: they pass by L1 and ask L2 for the whole 128-byte line.
DEVICE uint32_t load_stream(const uint32_t* pointer) {
  uint32_t value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.b32 %0, [%1];" : "=r"(value) : "l"(pointer));
  return value;
}
DEVICE uint4 load_stream(const uint4* pointer) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
  return v;
}

// The same if a < b; else 0.
DEVICE uint32_t load_stream_if_less(int a, int b, const uint32_t* pointer) {
  uint32_t value = 0;
  asm volatile("{.reg .pred p; setp.lt.s32 p, %2, %3; @p ld.global.nc.L1::no_allocate.L2::128B.b32 %0, [%1];}"
               : "+r"(value) : "l"(pointer), "r"(a), "r"(b));
  return value;
}
// The same where `wanted`; elsewhere the packet stays what it was.
DEVICE void load_stream_if(uint4& v, bool wanted, const uint4* pointer) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0;"
               "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(pointer), "r"((int)wanted));
}

DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t value;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(selector));
  return value;
}
DEVICE uint32_t dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  uint32_t value;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(sum));
  return value;
}
// a's two 16-bit numbers times b's lower two bytes, or its upper two.
DEVICE uint32_t dp2a_low(uint32_t a, uint32_t b, uint32_t sum) {
  uint32_t value;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(sum));
  return value;
}
DEVICE uint32_t dp2a_high(uint32_t a, uint32_t b, uint32_t sum) {
  uint32_t value;
  asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(sum));
  return value;
}

// Pairs of 16-bit floats, and of 8-bit ones, where one instruction makes two float16 of two float8.
#ifndef FLOAT8_CONVERTS
#define FLOAT8_CONVERTS (__CUDA_ARCH__ >= 890)
#endif
#if FLOAT8_CONVERTS
DEVICE void float8_to_float16(uint32_t (&pairs)[2], uint32_t v) {
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(v));
}
#endif
// Exact for what 8 bits can be: the mantissa's bits that get lost are 0.
DEVICE uint32_t float16_to_bfloat16(uint32_t pair) {
  uint32_t low, high;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=r"(low), "=r"(high) : "r"(pair));
  return prmt(low, high, 0x7632);
}
DEVICE uint32_t subtract_float16(uint32_t a, uint32_t b) {
  uint32_t value;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(value) : "r"(a), "r"(b));
  return value;
}
DEVICE uint32_t fma_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t value;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(c));
  return value;
}

// Copies 16 bytes, or writes 16 zero bytes where `valid` is false.
DEVICE void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

DEVICE uint32_t atomic_add_acq_rel(uint32_t* pointer, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(pointer), "r"(value) : "memory");
  return before;
}

// Programmatic dependent launch: let the next kernel start, and wait for the one before to have finished.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16-bit floats as raw bits; BF16 chooses which of the two they are.
#if BF16
#define VALUE "bf16"
#else
#define VALUE "f16"
#endif

DEVICE uint16_t round_value(float x) {
  uint16_t bits;
  asm("cvt.rn." VALUE ".f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
DEVICE float widen_value(uint16_t bits) {
  float x;
#if BF16
  x = __uint_as_float((uint32_t)bits << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
#endif
  return x;
}
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." VALUE "." VALUE ".f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
