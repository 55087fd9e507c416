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
// RAGGED (words of a strip's last tile, or 0 if it is whole), PACKETS_AHEAD and LIKELY_FULL (see Packets), EARLY (see
// Weights), LOAD_AFTER (the same), WARPS, BF16 and VALUES (see values.cuh).
struct SpmmParams {
  const uint32_t* bitmap;
  const uint4* packets;
  const uint32_t* offsets;
  const uint16_t* x;
  const uint16_t* bias;  // or null
  const float* scales;   // of the rows; null with 16-bit values
  const float* x_scales; // [tiles][rows of X, in whole jobs]; null where X has 16 bits
  uint16_t* y;
  float* partial;      // [2 * blocks][N_BLOCKS][threads][4]: each block's share of shared jobs
  uint32_t* arrivals;  // [jobs][warps], zero before and after
  long long x_stride;
  int rows, columns, n;
  int strips, words, tiles;  // words and tiles of a strip
  int row_blocks;
  int share, larger, late;   // of a block: `larger` blocks have one more, those from block `late` on one less
  int units, whole;          // all, and those before a last row block that counts two thirds, where it has few rows
  int column_bytes;          // shared memory of a warp
  float least;               // what results are raised to: 0, or minus infinity
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

// A zero that the compiler takes for a number of each lane's own. What it knows to be the same in all lanes it may keep in
// a uniform register: moving what was loaded there waits for all loads under way, the next tile's packets too, and a
// condition that is the same for all becomes a branch around each load.
DEVICE int lanes_zero(const SpmmParams& p, int lane) { return lane & p.n >> 31; }

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
  DEVICE uint32_t word(const SpmmParams& p, int w, int lane) const {
    if (RAGGED == 0 || w < RAGGED) return load_stream(bitmap + w * LANES);
    return load_stream_if_less(tile + lanes_zero(p, lane), p.tiles - 1, bitmap + w * LANES);
  }
  // Where the tile's packets begin.
  DEVICE uint32_t packets(const SpmmParams& p, int lane) const { return __ldg(offset + lanes_zero(p, lane)); }
};

// Brings a warp's first two tiles' bitmaps near before anything else is done: where its packets are depends on them.
DEVICE void prefetch_bitmaps(const SpmmParams& p, int strip, int tile, int lane) {
  const int word = tile * TILE_WORDS + lane;
  if (lane < 2 * TILE_WORDS && word < p.words && strip < p.strips)
    prefetch_line(p.bitmap + ((long long)strip * p.words + word) * LANES);
}

// A warp's weights: the tile that is multiplied, and what is under way of the two after it.
//
// The packets of the next tile are asked for after word LOAD_AFTER of this one: then the bitmaps that say where they are
// have had some time to come, and most of the tile is left for the packets.
//
// What is loaded is waited for together: by storing a tile's packets, and by a wait for shared memory, too, which decoding
// has many of. So of the first words nothing is asked for before the packets are; and with EARLY all that is asked for
// during a tile is asked for then. Else a bitmap word of the tile after the next is asked for when its register is free,
// the last ones right before they are waited for.
struct Weights {
  Cursor cursor;  // at the tile whose bitmaps are asked for next
  uint32_t words[TILE_WORDS];  // of this tile; those that were multiplied made room for the next one's
  uint32_t later[TILE_WORDS];  // of the next tile; without EARLY those taken over make room for the one after it
  uint32_t latest[EARLY ? TILE_WORDS : 1];  // of the tile after the next, with EARLY
  Packets<PACKETS_AHEAD, LIKELY_FULL> packets;  // of this tile until they are stored, then of the next
  uint32_t next_offset;  // where the next tile's packets begin

  // Asks for the first tiles.
  DEVICE Weights(const SpmmParams& p, int tile, int strip, int tiles, int lane)
      : cursor{tile, strip, tiles}, packets{} {
    cursor.begin_strip(p, lane);
    ask_for(p, words, TILE_WORDS, lane);
    const uint32_t first_offset = cursor.packets(p, lane);
    cursor.advance(p, lane);
    if constexpr (EARLY)
      ask_for(p, latest, TILE_WORDS, lane);
    else
      ask_for(p, later, TILE_WORDS, lane);
    next_offset = cursor.packets(p, lane);
    packets.load(p.packets + first_offset, packet_rows(words), lane);
  }

  // Waits for the tile to multiply next, and has its values in shared memory.
  DEVICE void begin_tile(const SpmmParams& p, uint32_t column, int lane) {
    packets.store(column, lane);
    if constexpr (EARLY) {
#pragma unroll
      for (int w = 0; w < TILE_WORDS; ++w) later[w] = latest[w];
    }
    cursor.advance(p, lane);
  }

  // To be called once word w of the tile is multiplied: then it makes room for the next tile's.
  DEVICE void load_ahead(const SpmmParams& p, int w, int lane) {
    words[w] = later[w];
    if (!EARLY && w > LOAD_AFTER) later[w] = cursor.word(p, w, lane);
    if (w != LOAD_AFTER) return;
    const uint4* next_packets = p.packets + next_offset;
    const PacketRows rows = next_rows();
    if constexpr (EARLY) {
      // The packets last: with anything asked for after them, the compiler copies a bitmap, and that waits for all.
      ask_for(p, latest, TILE_WORDS, lane);
      next_offset = cursor.packets(p, lane);
      packets.load(next_packets, rows, lane);
    } else {
      packets.load(next_packets, rows, lane);
      next_offset = cursor.packets(p, lane);
      ask_for(p, later, LOAD_AFTER + 1, lane);
    }
  }

  template <int SIZE>
  DEVICE void ask_for(const SpmmParams& p, uint32_t (&bitmaps)[SIZE], int count, int lane) const {
#pragma unroll
    for (int w = 0; w < SIZE; ++w)
      if (w < count) bitmaps[w] = cursor.word(p, w, lane);
  }

  // The next tile's, after word LOAD_AFTER of this one.
  DEVICE PacketRows next_rows() const {
    uint32_t next[TILE_WORDS];
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) next[w] = w <= LOAD_AFTER ? words[w] : later[w];
    return packet_rows(next);
  }
};

// A block's units begin here. The first blocks have a unit more than the others, and the late ones perhaps a unit less.
// From unit `whole` on three count as two, but with wide X or X8, which have no register left for that.
constexpr bool SOME_COUNT_LESS = N_BLOCKS <= 8 && !X8;
DEVICE int first_unit(const SpmmParams& p, int block) {
  const int counted = block * p.share + min(block, p.larger) - max(0, block - p.late);
  return !SOME_COUNT_LESS || counted <= p.whole ? counted : min(p.units, p.whole + (counted - p.whole) * 3 / 2);
}
DEVICE int block_of_unit(const SpmmParams& p, int unit) {
  const int counted = !SOME_COUNT_LESS || unit < p.whole ? unit : p.whole + ((unit - p.whole) * 2 + 1) / 3;
  const int of_larger = p.larger * (p.share + 1), before_late = p.late * p.share + p.larger;
  if (counted < of_larger) return counted / (p.share + 1);
  if (counted < before_late) return p.larger + (counted - of_larger) / p.share;
  return p.late + (counted - before_late) / max(1, p.share - 1);
}

DEVICE void clear(float (&sum)[N_BLOCKS][4]) {
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; ++i) sum[i / 4][i % 4] = 0.f;
}

// What is applied to the sums of a lane's two rows of a strip.
struct RowTerms {
  float scale[2], bias[2];

  DEVICE void load(const SpmmParams& p, int strip, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(strip * STRIP_ROWS + (lane >> 2) + 8 * h, p.rows - 1);
      bias[h] = p.bias ? widen_value(p.bias[row]) : 0.f;
      scale[h] = row_scale(p.scales, row);
    }
  }
};

// Applies scales and bias, raises to the least, rounds and writes a strip's 16 rows, for N_TILE rows of X from `first` on.
DEVICE void write_strip(const SpmmParams& p, const float (&sum)[N_BLOCKS][4], const RowTerms& terms, int strip, int first,
                        int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = strip * STRIP_ROWS + (lane >> 2) + 8 * h;
    if (row >= p.rows) continue;
#pragma unroll
    for (int j = 0; j < N_BLOCKS; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = first + j * 8 + (lane & 3) * 2 + e;
        if (n >= p.n) continue;
        const float result = sum[j][2 * h + e] * terms.scale[h] + terms.bias[h];
        p.y[(long long)n * p.rows + row] = round_value(maximum(result, p.least));
      }
    }
  }
}

// Where this thread leaves its sums of a block's part of a job. A block may have parts of two jobs: the job that it begins
// with, and one that it ends with but began before.
DEVICE float* partial_slot(const SpmmParams& p, int block, int job) {
  const int slot = 2 * block + (first_unit(p, block) < job * p.tiles ? 1 : 0);
  return p.partial + (long long)slot * ACCUMULATORS * THREADS + threadIdx.x * 4;
}
DEVICE void leave(float* slot, int j, const float (&sum)[4]) {
  __stcg((float4*)(slot + j * 4 * THREADS), make_float4(sum[0], sum[1], sum[2], sum[3]));
}
DEVICE void fetch(float (&sum)[4], const float* slot, int j) {
  const float4 four = __ldcg((const float4*)(slot + j * 4 * THREADS));
  sum[0] = four.x, sum[1] = four.y, sum[2] = four.z, sum[3] = four.w;
}

// The blocks that have a part of a job.
struct Sharers {
  int first, last;

  DEVICE Sharers(const SpmmParams& p, int job)
      : first(block_of_unit(p, job * p.tiles)), last(block_of_unit(p, job * p.tiles + p.tiles - 1)) {}
};

// Equal parts of blocks of n, of 8 at most.
DEVICE constexpr int largest_part(int blocks) {
  int part = blocks < 8 ? blocks : 8;
  while (blocks % part) --part;
  return part;
}

// Adds the sums that a job's blocks left, of which this is one, in their order: (b0 + b1) + b2 and so on. Which of
// two numbers comes first makes no difference, so that this block's own, if it is one of the first two, are added to where
// they are. As much is asked for at a time as registers hold, since each time takes as long as the L2 cache to answer.
DEVICE void add_partials(const SpmmParams& p, float (&sum)[N_BLOCKS][4], const Sharers& sharers, int job) {
  const int first = sharers.first, last = sharers.last;
  constexpr int PART = largest_part(N_BLOCKS), AT_ONCE = N_BLOCKS < 4 ? 2 : 1;
  const int own = (int)blockIdx.x <= first + 1 ? blockIdx.x : last + 1;  // not to be read
  if (own > last) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) sum[i / 4][i % 4] = -0.f;  // which changes nothing that is added to it
  }
  const int others = last - first + (own > last);
#pragma unroll 1
  for (int k = 0; k < others; k += AT_ONCE) {
#pragma unroll
    for (int part = 0; part < N_BLOCKS; part += PART) {
      float theirs[AT_ONCE][PART][4];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int block = first + min(k + i, others - 1);
        const float* slot = partial_slot(p, block < own ? block : block + 1, job);
#pragma unroll
        for (int j = 0; j < PART; ++j) fetch(theirs[i][j], slot, part + j);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
        for (int j = 0; j < PART * 4; ++j) sum[part + j / 4][j % 4] += k + i < others ? theirs[i][j / 4][j % 4] : -0.f;
      }
    }
  }
}

// Leaves this block's sums of a warp's strip of a job that several blocks share. Nobody waits for anybody, not even for the
// block's other warps. Returns whether this block is the last, which has all the others' sums to add up then.
DEVICE bool leave_sums(const SpmmParams& p, const float (&sum)[N_BLOCKS][4], const Sharers& sharers, int job, int strip,
                       int lane) {
  float* mine = partial_slot(p, blockIdx.x, job);
#pragma unroll
  for (int j = 0; j < N_BLOCKS; ++j) leave(mine, j, sum[j]);
  // Release what the warp wrote, acquire what the others did.
  uint32_t* arrivals = p.arrivals + job * WARPS + strip % WARPS;
  uint32_t arrived = 0;
  __syncwarp();
  if (lane == 0) arrived = atomic_add_acq_rel(arrivals, 1);
  __syncwarp();
  if (__shfl_sync(0xffffffffu, arrived, 0) != sharers.last - sharers.first) return false;
  if (lane == 0) *arrivals = 0;  // ready for the next launch
  return true;
}

// At the end of a block's part of a job: writes its results, or leaves them to be summed.
DEVICE void finish_job(const SpmmParams& p, float (&sum)[N_BLOCKS][4], int job, int begin, int end, int warp, int lane) {
  const Job done(p, job);
  const int strip = done.row_block * WARPS + warp;
  if (strip >= p.strips) return;
  const bool alone = begin <= job * p.tiles && (job + 1) * p.tiles <= end;
  const Sharers sharers(p, job);
  if (!alone && !leave_sums(p, sum, sharers, job, strip, lane)) return;
  RowTerms terms;
  if constexpr (N_BLOCKS == 1) terms.load(p, strip, lane);  // while nothing else has to wait; with more, registers lack
  if (!alone) add_partials(p, sum, sharers, job);
  if constexpr (N_BLOCKS > 1) terms.load(p, strip, lane);
  write_strip(p, sum, terms, strip, done.n, lane);
}
