// Packed to dense, a warp a tile. Compiled with TILE_WORDS, ALIGNED (rows of the result are whole pieces of 16 bytes),
// BF16 and VALUES.
#include "decode.cuh"

struct UnpackParams {
  const uint32_t* bitmap;
  const uint4* packets;
  const uint32_t* offsets;
  const float* scales;  // of the rows; null with 16-bit values
  uint16_t* dense;
  int rows, columns, words, tiles;  // words and tiles of a strip
  int total_tiles;
  int column_bytes;  // shared memory of a warp, besides STAGE_BYTES
};

constexpr int PACKETS_AHEAD = (TILE_WORDS < 3 ? 64 : 96) / PACKET_VALUES;  // the most that a lane may have
constexpr int STAGE_PITCH = WORD_COLUMNS * 2 + 16;  // 16 bytes more: rows start in different banks
constexpr int STAGE_BYTES = STRIP_ROWS * STAGE_PITCH;

// A warp's place in the matrix.
struct Tile {
  int number, strip, first;  // first word

  DEVICE Tile(const UnpackParams& p, int number) : number(number), strip(number / p.tiles) {
    first = (number - strip * p.tiles) * TILE_WORDS;
  }
  DEVICE void load_words(const UnpackParams& p, uint32_t (&words)[TILE_WORDS], int lane) const {
    const uint32_t* bitmap = p.bitmap + ((long long)strip * p.words + first) * LANES + lane;
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) words[w] = load_stream_if_less(first + w, p.words, bitmap + w * LANES);
  }
};

// Applies the scales to a word's pairs, of two rows in turn.
DEVICE void scale_word(const UnpackParams& p, uint32_t (&a)[16], int strip, int lane) {
  if constexpr (VALUES == 0) return;
  const int row = strip * STRIP_ROWS + (lane >> 2);
  const float scales[2] = {row_scale(p.scales, min(row, p.rows - 1)), row_scale(p.scales, min(row + 8, p.rows - 1))};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t low = round_value(widen_value((uint16_t)a[i]) * scales[i & 1]);
    a[i] = low | (uint32_t)round_value(widen_value((uint16_t)(a[i] >> 16)) * scales[i & 1]) << 16;
  }
}

#if ALIGNED
// Writes a word's 16 x 64 elements. They are put in order in shared memory, so that whole lines are written.
DEVICE void write_word(const UnpackParams& p, const uint32_t (&a)[16], uint32_t stage, int strip, int word, int lane) {
  const uint32_t mine = stage + (lane >> 2) * STAGE_PITCH + (lane & 3) * 4;
#pragma unroll
  for (int i = 0; i < 16; ++i) store_shared(mine + (i & 1) * 8 * STAGE_PITCH + (i >> 1) * 16, a[i]);
  __syncwarp();
  const int row = lane >> 3, column = word * WORD_COLUMNS + (lane & 7) * 8;
  uint16_t* target = p.dense + (long long)(strip * STRIP_ROWS + row) * p.columns + column;
#pragma unroll
  for (int r = 0; r < STRIP_ROWS; r += 4) {
    const uint4 piece = load_shared4(stage + (row + r) * STAGE_PITCH + (lane & 7) * 16);
    if (strip * STRIP_ROWS + row + r < p.rows && column < p.columns) *(uint4*)(target + (long long)r * p.columns) = piece;
  }
  __syncwarp();
}
#else
DEVICE void write_word(const UnpackParams& p, const uint32_t (&a)[16], uint32_t, int strip, int word, int lane) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = strip * STRIP_ROWS + (lane >> 2) + 8 * (i & 1);
    const int column = word * WORD_COLUMNS + 2 * (lane & 3) + 8 * (i >> 1);
    uint16_t* target = p.dense + (long long)row * p.columns + column;
    if (row < p.rows && column < p.columns) target[0] = (uint16_t)a[i];
    if (row < p.rows && column + 1 < p.columns) target[1] = (uint16_t)(a[i] >> 16);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(256, 2) unpack(const __grid_constant__ UnpackParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warps = blockDim.x >> 5, step = gridDim.x * warps;
  const uint32_t stage = shared_address(memory) + warp * STAGE_BYTES;
  const uint32_t base = shared_address(memory) + warps * STAGE_BYTES + warp * p.column_bytes + lane * 4;
  int number = blockIdx.x * warps + warp;
  if (number >= p.total_tiles) return;

  Tile tile(p, number);
  uint32_t words[TILE_WORDS], next_words[TILE_WORDS];
  Packets<PACKETS_AHEAD, 1> packets = {};
  tile.load_words(p, words, lane);
  packets.load(p.packets + p.offsets[number], packet_rows(words), lane);
  for (; number < p.total_tiles; number += step) {
    packets.store(base, lane);
    const Tile next(p, min(number + step, p.total_tiles - 1));  // past the end: the last, to no effect
    next.load_words(p, next_words, lane);
    const uint32_t next_offset = __ldg(p.offsets + next.number);
    uint32_t column = base;
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) {
      if (tile.first + w < p.words) {
        uint32_t a[16];
        expand_word(a, words[w], column);
        scale_word(p, a, tile.strip, lane);
        write_word(p, a, stage, tile.strip, tile.first + w, lane);
      }
      if (w == TILE_WORDS / 2) packets.load(p.packets + next_offset, packet_rows(next_words), lane);
    }
    tile = next;
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) words[w] = next_words[w];
  }
}
