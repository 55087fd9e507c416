// What the multiplying kernels share: how the work is dealt out, how a warp finds its tiles, and how sums are finished.
//
// Y[N, M] = X[N, K] W[M, K]^T + bias for a packed W. A block of WARPS warps works on as many strips of 16 rows side by
// side, a row block, so that they share the same columns of X, which are streamed through shared memory. A job is a row
// block times N_TILE rows of X; the jobs of the first rows of X come first. The work of the whole product, in units of
// (job, tile), is dealt out evenly to one block for each multiprocessor, in one contiguous range each. A job that is
// shared by several blocks is summed by the last of them to finish, in a fixed order, so that the result is the same at
// every run. docs/architecture.md says why.
#pragma once
#include "decode.cuh"

// Compiled with TILE_WORDS, N_BLOCKS (of 8 rows of X), CHUNK_WORDS (columns of X that are streamed at a time, in words),
// RAGGED (TILE_WORDS doesn't divide the words of a strip), PACKETS_AHEAD and LIKELY_FULL (see Packets), WARPS, BF16
// and VALUES (see values.cuh).
struct SpmmParams {
  const uint32_t* bitmap;
  const uint4* packets;
  const uint32_t* offsets;
  const uint16_t* x;
  const uint16_t* bias;  // or null
  const float* scales;   // of the rows; null with 16-bit values
  const float* x_scales; // [tiles][rows of X, in whole jobs]; null where X has 16 bits
  uint16_t* y;
  float* partial;      // [2 * blocks][N_BLOCKS * 4][threads]: each block's share of the jobs it didn't do alone
  uint32_t* arrivals;  // [jobs][warps], zero before and after
  long long x_stride;
  int rows, columns, n;
  int strips, words, tiles;  // words and tiles of a strip
  int row_blocks;
  int units;                 // jobs * tiles
  int column_bytes;          // shared memory of a warp
};

constexpr int THREADS = WARPS * LANES;  // that multiply
constexpr int CHUNKS = (TILE_WORDS + CHUNK_WORDS - 1) / CHUNK_WORDS;  // of a tile
constexpr int ACCUMULATORS = N_BLOCKS * 4;  // of a thread
constexpr int N_TILE = N_BLOCKS * 8;

// Which row block, and which rows of X, from row n on.
struct Job {
  int row_block, n;

  DEVICE Job(const SpmmParams& p, int job) {
    const int before = job / p.row_blocks;
    row_block = job - before * p.row_blocks;
    n = before * N_TILE;
  }
};

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
      if (strip >= p.row_blocks * WARPS) strip -= p.row_blocks * WARPS;  // again, for the next rows of X
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

DEVICE void clear(float (&sum)[N_BLOCKS][4]) {
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) sum[i / 4][i % 4] = 0.f;
}

// Applies the scales, adds the bias, rounds and writes a strip's 16 rows, for 8 * BLOCKS rows of X from `first` on.
template <int BLOCKS>
DEVICE void write_strip(const SpmmParams& p, const float (&sum)[BLOCKS][4], int strip, int first, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = strip * STRIP_ROWS + (lane >> 2) + 8 * h;
    if (row >= p.rows) continue;
    const float bias = p.bias ? widen_value(p.bias[row]) : 0.f;
    const float scale = row_scale(p.scales, row);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = first + j * 8 + (lane & 3) * 2 + e;
        if (n < p.n) p.y[(long long)n * p.rows + row] = round_value(sum[j][2 * h + e] * scale + bias);
      }
    }
  }
}

DEVICE float* partial_slot(const SpmmParams& p, int block, int job) {
  const int slot = 2 * block + (first_unit(p, block) / p.tiles == job ? 0 : 1);
  return p.partial + (long long)slot * ACCUMULATORS * THREADS + threadIdx.x;
}

// Adds up what the blocks first to last left, in their order, and writes it. Several blocks' sums are asked for at a time,
// and of many sums a part at a time.
DEVICE void write_partials(const SpmmParams& p, int job, int first, int last, int warp, int lane) {
  constexpr int BLOCKS = N_BLOCKS > 8 ? 4 : N_BLOCKS, PART = BLOCKS * 4;
  constexpr int AT_ONCE = PART > 16 ? 1 : 16 / PART;
  const Job done(p, job);
  const int strip = done.row_block * WARPS + warp;
#pragma unroll 1
  for (int part = 0; part < ACCUMULATORS; part += PART) {
    float sum[BLOCKS][4] = {};
    for (int block = first; block <= last; block += AT_ONCE) {
      float theirs[AT_ONCE][PART];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        const float* slot = partial_slot(p, min(block + k, last), job) + part * THREADS;
#pragma unroll
        for (int i = 0; i < PART; ++i) theirs[k][i] = __ldcg(slot + i * THREADS);
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
#pragma unroll
        for (int i = 0; i < PART; ++i) sum[i / 4][i % 4] += block + k <= last ? theirs[k][i] : 0.f;
      }
    }
    if (strip < p.strips) write_strip(p, sum, strip, done.n + part / 4 * 8, lane);
  }
}

// Finishes a warp's strip of a job that several blocks share: each leaves its sums, and the last to arrive adds them all up
// in the order of their columns and writes the result. Nobody waits for anybody, not even for the block's other warps.
DEVICE void reduce_and_write(const SpmmParams& p, const float (&sum)[N_BLOCKS][4], int job, int warp, int lane) {
  const int first = block_of_unit(p, job * p.tiles);
  const int last = block_of_unit(p, job * p.tiles + p.tiles - 1);
  float* mine = partial_slot(p, blockIdx.x, job);
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) __stcg(mine + i * THREADS, sum[i / 4][i % 4]);
  // Release what the warp wrote, acquire what the others did.
  uint32_t* arrivals = p.arrivals + job * WARPS + warp;
  uint32_t arrived = 0;
  __syncwarp();
  if (lane == 0) arrived = atomic_add_acq_rel(arrivals, 1);
  __syncwarp();
  if (__shfl_sync(0xffffffffu, arrived, 0) != last - first) return;
  if (lane == 0) *arrivals = 0;  // ready for the next launch
  write_partials(p, job, first, last, warp, lane);
}

// At the end of a block's part of a job: writes its results, or leaves them to be summed.
DEVICE void finish_job(const SpmmParams& p, const float (&sum)[N_BLOCKS][4], int job, int begin, int end, int warp, int lane) {
  const bool alone = begin <= job * p.tiles && (job + 1) * p.tiles <= end;
  if (!alone) {
    reduce_and_write(p, sum, job, warp, lane);
  } else {
    const Job done(p, job);
    const int strip = done.row_block * WARPS + warp;
    if (strip < p.strips) write_strip(p, sum, strip, done.n, lane);
  }
}
