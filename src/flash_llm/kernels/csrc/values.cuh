// From a packet to 16-bit pairs, exactly. Compiled with VALUES: 0 for 16-bit values, which are taken as they are, 1 for
// float8 e4m3 and 2 for int8; and BF16. The scale of a row is no part of this: it is applied to sums, once.
#pragma once
#include "ptx.cuh"

constexpr int PACKET_SHIFT = VALUES ? 4 : 3;
constexpr int PACKET_VALUES = 1 << PACKET_SHIFT;
constexpr int PACKET_PAIRS = PACKET_VALUES / 2;

// Pairs are this much too small, which the scales make up for: the bits of an e4m3, placed in a float16, are read with a
// bias of 15 instead of 7.
constexpr float VALUE_FACTOR = VALUES == 1 && !BF16 && !FLOAT8_CONVERTS ? 256.f : 1.f;

// What the two parts of X count where it is split into 8-bit numbers (split_x.cu), as 8-bit weights are multiplied.
constexpr float HIGH_COUNTS = VALUES == 1 ? 1.f : 256.f, LOW_COUNTS = VALUES == 1 ? 1.f / 16 : 1.f;

// Bytes l0 h0 l1 h1, and l2 h2 l3 h3, of the words l and h.
DEVICE void interleave(uint32_t (&pairs)[2], uint32_t l, uint32_t h) {
  pairs[0] = prmt(l, h, 0x5140);
  pairs[1] = prmt(l, h, 0x7362);
}

// Two pairs of a word's four e4m3, each a sign, 4 bits of exponent and 3 of mantissa.
DEVICE void widen_float8(uint32_t (&pairs)[2], uint32_t v) {
#if FLOAT8_CONVERTS
  float8_to_float16(pairs, v);
  if constexpr (BF16) {
    pairs[0] = float16_to_bfloat16(pairs[0]);
    pairs[1] = float16_to_bfloat16(pairs[1]);
  }
#elif BF16
  // The 7 bits below the sign go to exponent and mantissa, 4 up from the bottom: 2^120 too small, also where they are
  // subnormal. As that is too little to add up in float32, it is undone here.
  interleave(pairs, v << 4 & 0xf0f0f0f0u, v & 0x80808080u | v >> 4 & 0x07070707u);
  pairs[0] = fma_bfloat16(pairs[0], 0x7b807b80u, 0x80008000u);
  pairs[1] = fma_bfloat16(pairs[1], 0x7b807b80u, 0x80008000u);
#else
  interleave(pairs, v << 7 & 0x80808080u, v & 0x80808080u | v >> 1 & 0x3f3f3f3fu);
#endif
}

// Two pairs of a word's four int8, by numbers whose lowest mantissa bit counts 1.
DEVICE void widen_int8(uint32_t (&pairs)[2], uint32_t v) {
#if BF16
  // 128 + the lower 7 bits, less 128, or less 256 if the sign is set: bfloat16 has no room for all 8 bits at once.
  const uint32_t low = v & 0x7f7f7f7fu, sign = v & 0x80808080u;
  pairs[0] = fma_bfloat16(prmt(sign, 0x43434343u, 0x4140), 0xbf80bf80u, prmt(low, 0x43434343u, 0x4140));
  pairs[1] = fma_bfloat16(prmt(sign, 0x43434343u, 0x4342), 0xbf80bf80u, prmt(low, 0x43434343u, 0x4342));
#else
  const uint32_t shifted = v ^ 0x80808080u;  // by 128: not negative
  pairs[0] = subtract_float16(prmt(shifted, 0x64646464u, 0x4140), 0x64806480u);  // 1024 + 128
  pairs[1] = subtract_float16(prmt(shifted, 0x64646464u, 0x4342), 0x64806480u);
#endif
}

DEVICE void packet_pairs(uint32_t (&pairs)[PACKET_PAIRS], const uint4& packet) {
  const uint32_t words[4] = {packet.x, packet.y, packet.z, packet.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (VALUES == 0) {
      pairs[w] = words[w];
    } else {
      uint32_t two[2];
      if constexpr (VALUES == 1) {
        widen_float8(two, words[w]);
      } else {
        widen_int8(two, words[w]);
      }
      pairs[2 * w] = two[0];
      pairs[2 * w + 1] = two[1];
    }
  }
}

// What a row's sums are to be multiplied by.
DEVICE float row_scale(const float* scales, int row) { return VALUES ? __ldg(scales + row) * VALUE_FACTOR : 1.f; }
