// X of 16 bits as two matrices of 8 bits: x is close to (HIGH_COUNTS high + LOW_COUNTS low) / scale. There is a scale for
// each row and tile of W's columns, a power of two. int8: high and low byte of a number of 15 bits. float8 e4m3: x and 16
// times what is left of it, 8 bits of mantissa between them. Compiled with BF16, of X; VALUES, of the result: 1 for float8
// e4m3, 2 for int8; TILE_WORDS; and WARPS of a block, each of which takes a row of a tile.
//
// A row of X makes two rows of the result, which are next to each other so that their sums are a thread's own: of 8 rows
// the even ones come first. Columns go by 16 in the order in which a lane's 8-bit elements follow each other.
#include "values.cuh"

struct SplitParams {
  const uint16_t* x;
  uint8_t* split;  // [16 * (rows of X / 8, rounded up), pitch]
  float* scales;   // [tiles][scale_pitch], one over each scale; NaN where there are numbers that are not finite
  long long x_stride;
  int n, columns;  // a multiple of 8
  int pitch, tiles, scale_pitch;
};

constexpr int COLUMNS = 16;  // of a lane at a time
constexpr int TILE_COLUMNS = TILE_WORDS * 64;
constexpr int STEPS = (TILE_COLUMNS + 32 * COLUMNS - 1) / (32 * COLUMNS);
constexpr uint32_t INFINITE = BF16 ? 0x7f80 : 0x7c00;
constexpr int TOP = VALUES == 1 ? 7 : 14;  // the largest number of a tile's row becomes 2^TOP to 2^(TOP + 1)
constexpr int LEAST_EXPONENT = -100;       // of that largest number; where it is smaller yet the scale stays

// Two numbers' high and low parts, each pair in the lower 16 bits.
DEVICE void split_pair(uint32_t& high, uint32_t& low, uint32_t pair, float scale) {
  const float a = widen_value((uint16_t)pair) * scale, b = widen_value((uint16_t)(pair >> 16)) * scale;
#if VALUES == 1
  uint16_t h, l;
  uint32_t back;
  float a_high, b_high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(h) : "f"(b), "f"(a));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(back) : "h"(h));
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(a_high), "=f"(b_high) : "r"(back));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(l) : "f"((b - b_high) / LOW_COUNTS), "f"((a - a_high) / LOW_COUNTS));
  high = h;
  low = l;
#else
  const int a_whole = __float2int_rn(a), b_whole = __float2int_rn(b);
  high = ((a_whole + 128) >> 8 & 0xff) | ((b_whole + 128) >> 8 & 0xff) << 8;
  low = (a_whole & 0xff) | (b_whole & 0xff) << 8;
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) split_x(const __grid_constant__ SplitParams p) {
  launch_dependents();
  const int lane = threadIdx.x & 31;
  const int number = blockIdx.x * WARPS + (threadIdx.x >> 5);
  const int row = number / p.tiles, tile = number - row * p.tiles;
  if (row >= p.n) return;
  wait_dependencies();

  const int end = min((tile + 1) * TILE_COLUMNS, p.pitch);
  uint4 halves[STEPS][2] = {};
  uint32_t most = 0;  // the largest magnitude, as bits, which are ordered as numbers are
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = tile * TILE_COLUMNS + (s * 32 + lane) * COLUMNS + 8 * h;
      if (column < min(end, p.columns)) halves[s][h] = *(const uint4*)(p.x + row * p.x_stride + column);
      const uint32_t words[4] = {halves[s][h].x, halves[s][h].y, halves[s][h].z, halves[s][h].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) most = max(most, max(words[w] & 0x7fffu, words[w] >> 16 & 0x7fffu));
    }
  }
  most = __reduce_max_sync(0xffffffffu, most);
  const float number_most = widen_value((uint16_t)most);
  const int exponent = max((int)(__float_as_uint(number_most) >> 23) - 127, LEAST_EXPONENT);
  float scale = __uint_as_float((uint32_t)(127 + TOP - exponent) << 23);
  if (VALUES == 2 && number_most * scale > 127 * 256) scale *= 0.5f;  // the high byte ends at 127
  if (lane == 0) p.scales[tile * p.scale_pitch + row] = most < INFINITE ? 1.f / scale : __uint_as_float(0x7fc00000);

  const int place = row / 8 * 16 + row % 2 * 8 + row % 8 / 2 * 2;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const int column = tile * TILE_COLUMNS + (s * 32 + lane) * COLUMNS;
    const uint32_t lower[4] = {halves[s][0].x, halves[s][0].y, halves[s][0].z, halves[s][0].w};
    const uint32_t upper[4] = {halves[s][1].x, halves[s][1].y, halves[s][1].z, halves[s][1].w};
    uint32_t high[4], low[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // columns 2t, 2t + 1, 2t + 8, 2t + 9
      uint32_t h[2], l[2];
      split_pair(h[0], l[0], lower[t], scale);
      split_pair(h[1], l[1], upper[t], scale);
      high[t] = h[0] | h[1] << 16;
      low[t] = l[0] | l[1] << 16;
    }
    if (column >= end) continue;
    uint8_t* target = p.split + (long long)place * p.pitch + column;
    *(uint4*)target = {high[0], high[1], high[2], high[3]};
    *(uint4*)(target + p.pitch) = {low[0], low[1], low[2], low[3]};
  }
}
