// Packed to dense, a warp a tile. Compiled with TILE_WORDS, BF16 and VALUES.
#include "decode.cuh"

struct UnpackParams {
  const uint32_t* bitmap;
  const uint4* packets;
  const uint32_t* offsets;
  const float* scales;  // of the rows; null with 16-bit values
  uint16_t* dense;
  int rows, columns, words, tiles;  // words and tiles of a strip
  int total_tiles;
  int column_bytes;  // shared memory of a warp
};

constexpr int PACKETS_AHEAD = (TILE_WORDS < 3 ? 64 : 96) / PACKET_VALUES;  // the most that a lane may have

DEVICE uint32_t scale_pair(uint32_t pair, float scale) {
  if constexpr (VALUES == 0) return pair;
  const uint32_t low = round_value(widen_value((uint16_t)pair) * scale);
  return low | (uint32_t)round_value(widen_value((uint16_t)(pair >> 16)) * scale) << 16;
}

// Two neighbouring elements, as one store where that is aligned and inside.
DEVICE void write_pair(const UnpackParams& p, int row, int column, uint32_t pair) {
  if (row >= p.rows) return;
  uint16_t* target = p.dense + (long long)row * p.columns + column;
  if (p.columns % 2 == 0) {
    if (column < p.columns) *(uint32_t*)target = pair;
    return;
  }
  if (column < p.columns) target[0] = (uint16_t)pair;
  if (column + 1 < p.columns) target[1] = (uint16_t)(pair >> 16);
}

extern "C" __global__ void __launch_bounds__(256) unpack(const __grid_constant__ UnpackParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t base = shared_address(memory) + warp * p.column_bytes + lane * 4;
  const int warps = blockDim.x >> 5;
  for (int tile = blockIdx.x * warps + warp; tile < p.total_tiles; tile += gridDim.x * warps) {
    const int strip = tile / p.tiles, first = (tile - strip * p.tiles) * TILE_WORDS;
    const uint32_t* bitmap = p.bitmap + ((long long)strip * p.words + first) * LANES + lane;
    uint32_t words[TILE_WORDS];
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) words[w] = first + w < p.words ? load_stream(bitmap + w * LANES) : 0;
    Packets<PACKETS_AHEAD, 1> packets = {};
    packets.load(p.packets + p.offsets[tile], packet_rows(words), lane);
    packets.store(base, lane);
    uint32_t column = base;
    const int row = strip * STRIP_ROWS + (lane >> 2);
    const float scales[2] = {row_scale(p.scales, min(row, p.rows - 1)), row_scale(p.scales, min(row + 8, p.rows - 1))};
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) {
      if (first + w >= p.words) break;
      uint32_t a[16];
      expand_word(a, words[w], column);
      const int at = (first + w) * WORD_COLUMNS + 2 * (lane & 3);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t pair = scale_pair(a[i], scales[i & 1]);
        write_pair(p, row + 8 * (i & 1), at + 16 * (i >> 2) + 8 * ((i >> 1) & 1), pair);
      }
    }
  }
}
