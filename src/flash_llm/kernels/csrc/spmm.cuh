// What the multiplying kernels share: how the work is dealt out, how a warp finds its tiles, and how sums are finished.
//
// Y[N, M] = X[N, K] W[M, K]^T + bias for a packed W and a small N. A block of WARPS warps works on as many strips of 16
// rows side by side, so that they share the same columns of X, which are streamed through shared memory. The work of the
// whole matrix, in units of (row block, tile), is dealt out evenly to one block for each multiprocessor, in one contiguous
// range each. A row block that is shared by several blocks is summed by the last of them to finish, in a fixed order, so
// that the result is the same at every run. docs/architecture.md says why.
#pragma once
#include "decode.cuh"

// Compiled with TILE_WORDS, N_BLOCKS (of 8 rows of X), CHUNK_WORDS (columns of X that are streamed at a time, in words),
// RAGGED (TILE_WORDS doesn't divide the words of a strip), PACKETS_AHEAD and LIKELY_FULL (see Packets), WARPS, BF16 and
// VALUES (see values.cuh).
struct SpmmParams {
  const uint32_t* bitmap;
  const uint4* packets;
  const uint32_t* offsets;
  const uint16_t* x;
  const uint16_t* bias;  // or null
  const float* scales;   // of the rows; null with 16-bit values
  uint16_t* y;
  float* partial;      // [2 * blocks][N_BLOCKS * 4][threads]: each block's share of the row blocks it didn't do alone
  uint32_t* arrivals;  // [row blocks], zero before and after
  long long x_stride;
  int rows, columns, n;
  int strips, words, tiles;  // words and tiles of a strip
  int units;                 // row blocks * tiles
  int column_bytes;          // shared memory of a warp
};

constexpr int THREADS = WARPS * LANES;  // that multiply
constexpr int CHUNKS = (TILE_WORDS + CHUNK_WORDS - 1) / CHUNK_WORDS;  // of a tile
constexpr int ACCUMULATORS = N_BLOCKS * 4;  // of a thread

// Where a warp's next tile is. It stops at the warp's last tile (and past the matrix's last strip, at that strip), so
// that loading ahead needs no conditions: some tiles are then read once more, from L2, to no effect.
struct Cursor {
  int tile, strip, left;
  const uint32_t* bitmap;
  const uint32_t* offset;

  DEVICE void begin_strip(const SpmmParams& p, int lane) {
    const long long s = min(strip, p.strips - 1);
    bitmap = p.bitmap + (s * p.words + tile * TILE_WORDS) * LANES + lane;
    offset = p.offsets + s * p.tiles + tile;
  }
  DEVICE void advance(const SpmmParams& p, int lane) {
    if (left <= 1) return;
    --left;
    ++offset;
    bitmap += TILE_WORDS * LANES;
    if (++tile == p.tiles) {
      tile = 0;
      strip += WARPS;
      begin_strip(p, lane);
    }
  }
  DEVICE uint32_t word(const SpmmParams& p, int w) const {
    if constexpr (RAGGED) return load_stream_if(tile * TILE_WORDS + w < p.words, bitmap + w * LANES);
    return load_stream(bitmap + w * LANES);
  }
};

// The packets of the next tile are asked for after word LOAD_AFTER of this one: then the bitmaps that say where they are
// have had some time to come, and most of the tile is left for the packets. By then `words` has the next tile's bitmaps up
// to that word, and `later` the others.
constexpr int LOAD_AFTER = TILE_WORDS / 8;

DEVICE PacketRows next_packet_rows(const uint32_t (&words)[TILE_WORDS], const uint32_t (&later)[TILE_WORDS]) {
  uint32_t next[TILE_WORDS];
#pragma unroll
  for (int w = 0; w < TILE_WORDS; ++w) next[w] = w <= LOAD_AFTER ? words[w] : later[w];
  return packet_rows(next);
}

DEVICE int first_unit(const SpmmParams& p, int block) { return (int)((long long)p.units * block / gridDim.x); }
DEVICE int block_of_unit(const SpmmParams& p, int unit) {
  return (int)(((long long)(unit + 1) * gridDim.x - 1) / p.units);
}

// Applies the scales, adds the bias, rounds and writes a strip's 16 rows.
DEVICE void write_strip(const SpmmParams& p, const float (&sum)[N_BLOCKS][4], int strip, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = strip * STRIP_ROWS + (lane >> 2) + 8 * h;
    if (row >= p.rows) continue;
    const float bias = p.bias ? widen_value(p.bias[row]) : 0.f;
    const float scale = row_scale(p.scales, row);
#pragma unroll
    for (int j = 0; j < N_BLOCKS; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = j * 8 + (lane & 3) * 2 + e;
        if (n < p.n) p.y[(long long)n * p.rows + row] = round_value(sum[j][2 * h + e] * scale + bias);
      }
    }
  }
}

DEVICE float* partial_slot(const SpmmParams& p, int block, int row_block) {
  const int slot = 2 * block + (first_unit(p, block) / p.tiles == row_block ? 0 : 1);
  return p.partial + (long long)slot * ACCUMULATORS * THREADS + threadIdx.x;
}

// Adds up what the blocks first to last left, in their order. Several blocks' sums are asked for at a time.
DEVICE void add_partials(const SpmmParams& p, float (&sum)[N_BLOCKS][4], int row_block, int first, int last) {
  constexpr int AT_ONCE = ACCUMULATORS > 16 ? 1 : 16 / ACCUMULATORS;
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) sum[i / 4][i % 4] = 0.f;
  for (int block = first; block <= last; block += AT_ONCE) {
    float theirs[AT_ONCE][ACCUMULATORS];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const float* slot = partial_slot(p, min(block + k, last), row_block);
#pragma unroll
      for (int i = 0; i < ACCUMULATORS; ++i) theirs[k][i] = __ldcg(slot + i * THREADS);
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
#pragma unroll
      for (int i = 0; i < ACCUMULATORS; ++i) sum[i / 4][i % 4] += block + k <= last ? theirs[k][i] : 0.f;
    }
  }
}

// Finishes a row block that several blocks share: each leaves its sums, and the last to arrive adds them all up in the
// order of their columns and writes the result. Nobody waits for anybody.
DEVICE void reduce_and_write(const SpmmParams& p, float (&sum)[N_BLOCKS][4], int row_block, int strip, int lane) {
  __shared__ uint32_t arrived;
  const int first = block_of_unit(p, row_block * p.tiles);
  const int last = block_of_unit(p, row_block * p.tiles + p.tiles - 1);
  float* mine = partial_slot(p, blockIdx.x, row_block);
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) __stcg(mine + i * THREADS, sum[i / 4][i % 4]);
  block_barrier(THREADS);
  // Release what the whole block wrote, acquire what the others did.
  if (threadIdx.x == 0) arrived = atomic_add_acq_rel(p.arrivals + row_block, 1);
  block_barrier(THREADS);
  if (arrived != last - first) return;
  if (threadIdx.x == 0) p.arrivals[row_block] = 0;  // ready for the next launch
  add_partials(p, sum, row_block, first, last);
  if (strip < p.strips) write_strip(p, sum, strip, lane);
}

// At the end of a block's part of a row block: writes its results, or leaves them to be summed; the sums begin anew.
DEVICE void finish_row_block(const SpmmParams& p, float (&sum)[N_BLOCKS][4], int row_block, int begin, int end, int warp,
                             int lane) {
  const int strip = row_block * WARPS + warp;
  const bool alone = begin <= row_block * p.tiles && (row_block + 1) * p.tiles <= end;
  if (!alone) {
    reduce_and_write(p, sum, row_block, strip, lane);
  } else if (strip < p.strips) {
    write_strip(p, sum, strip, lane);
  }
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) sum[i / 4][i % 4] = 0.f;
}
