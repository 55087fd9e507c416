// The multiplying kernel for every GPU from compute capability 8.0: mma.sync and cp.async.
#include "spmm.cuh"

constexpr int X_PITCH = CHUNK_WORDS * WORD_COLUMNS * 2 + 16;          // 16 bytes more: rows start in different banks
constexpr int X_STAGE = N_BLOCKS * 8 * X_PITCH;
constexpr int X_PIECES_ROW = CHUNK_WORDS * WORD_COLUMNS / 8;
constexpr int X_ROWS_PASS = THREADS / X_PIECES_ROW;  // rows of X that the block copies at a time
constexpr int X_PASSES = (N_BLOCKS * 8 + X_ROWS_PASS - 1) / X_ROWS_PASS;

// A thread's share of copying X to shared memory, 16 bytes a piece; zeros outside of X.
struct XCopy {
  const uint16_t* source;  // of this thread's first piece in column 0
  uint32_t target;
  int row, column, left;  // left: rows of X from this job's first on

  DEVICE XCopy(const SpmmParams& p, uint32_t stages, int n) {
    row = threadIdx.x / X_PIECES_ROW;
    column = (threadIdx.x % X_PIECES_ROW) * 8;
    target = stages + row * X_PITCH + column * 2;
    begin_job(p, n);
  }
  DEVICE void begin_job(const SpmmParams& p, int n) {
    source = p.x + (n + row) * p.x_stride + column;
    left = p.n - n;
  }
  // Columns [first, first + CHUNK_WORDS * 64).
  DEVICE void start(const SpmmParams& p, uint32_t stage, int first) const {
    if (threadIdx.x < X_ROWS_PASS * X_PIECES_ROW) {
#pragma unroll
      for (int i = 0; i < X_PASSES; ++i) {
        const int r = row + i * X_ROWS_PASS;
        const bool valid = r < left && first + column < p.columns;
        if (r < N_BLOCKS * 8) {
          copy_async(target + stage + i * X_ROWS_PASS * X_PITCH,
                     valid ? source + first + i * X_ROWS_PASS * p.x_stride : p.x, valid);
        }
      }
    }
    copy_commit();
  }
};

// Multiplies one word, 64 columns, by the piece of X at `x` (this lane's address for ldmatrix).
DEVICE void multiply_word(float (&sum)[N_BLOCKS][4], uint32_t word, uint32_t& column, uint32_t x) {
  uint32_t a[16];
  expand_word(a, word, column);
  if constexpr (N_BLOCKS == 1) {
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      uint32_t b[4];
      load_matrices(b, x + s * 32);
      mma_m16n8k16(sum[0], a + 4 * s, b[0], b[1]);
      mma_m16n8k16(sum[0], a + 4 * s + 4, b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int j = 0; j < N_BLOCKS; j += 2) {
        uint32_t b[4];
        load_matrices(b, x + j * 8 * X_PITCH + s * 32);
        mma_m16n8k16(sum[j], a + 4 * s, b[0], b[1]);
        mma_m16n8k16(sum[j + 1], a + 4 * s, b[2], b[3]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) spmm(const __grid_constant__ SpmmParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  launch_dependents();
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const uint32_t x_stages = shared_address(memory);
  const uint32_t base = x_stages + 2 * X_STAGE + warp * p.column_bytes + lane * 4;
  // ldmatrix: lanes 0-7 give the rows of the first 8x8 matrix, and so on. One block of n: its four matrices are four
  // pieces of 8 columns; more: two pieces of columns for each of two blocks of n.
  const int x_row = N_BLOCKS == 1 ? lane & 7 : (lane & 7) + (lane >> 4) * 8;
  const int x_piece = N_BLOCKS == 1 ? lane >> 3 : (lane >> 3) & 1;
  const uint32_t x_lane = x_stages + x_row * X_PITCH + x_piece * 16;

  const int begin = first_unit(p, blockIdx.x), end = first_unit(p, blockIdx.x + 1);
  if (begin == end) return;
  int job = begin / p.tiles, tile = begin - job * p.tiles;
  const Job begun(p, job);

  // The weights of the first tiles are on their way before X may be read.
  Weights weights(p, tile, begun.row_block * WARPS + warp, end - begin, lane);

  wait_dependencies();
  XCopy x_copy(p, x_stages, begun.n);
  x_copy.start(p, 0, tile * TILE_WORDS * WORD_COLUMNS);
  uint32_t stage = 0;  // offset of the stage in use
  float sum[N_BLOCKS][4] = {};

  for (int unit = begin; unit < end; ++unit) {
    weights.begin_tile(p, base, lane);
    const bool last_tile = tile + 1 == p.tiles;
    uint32_t column = base;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      copy_wait<0>();
      __syncthreads();  // this chunk of X is here, and nobody reads the one before any more
      if (c + 1 < CHUNKS) {
        x_copy.start(p, stage ^ X_STAGE, (tile * TILE_WORDS + (c + 1) * CHUNK_WORDS) * WORD_COLUMNS);
      } else if (unit + 1 < end) {
        if (last_tile) x_copy.begin_job(p, Job(p, job + 1).n);
        x_copy.start(p, stage ^ X_STAGE, last_tile ? 0 : (tile + 1) * TILE_WORDS * WORD_COLUMNS);
      }
      const uint32_t x = x_lane + stage;
#pragma unroll
      for (int i = 0; i < CHUNK_WORDS; ++i) {
        const int w = c * CHUNK_WORDS + i;
        if (w < TILE_WORDS) {
          multiply_word(sum, weights.words[w], column, x + i * WORD_COLUMNS * 2);
          weights.load_ahead(p, w, lane);
        }
      }
      stage ^= X_STAGE;
    }
    if (last_tile || unit + 1 == end) {
      finish_job(p, sum, job, begin, end, warp, lane);
      clear(sum);
    }
    if (last_tile) {
      tile = 0;
      ++job;
    } else {
      ++tile;
    }
  }
}
