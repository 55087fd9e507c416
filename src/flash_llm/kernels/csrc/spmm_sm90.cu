// The multiplying kernel for Hopper: X comes by the tensor copy engine, and from N = 32 on wgmma multiplies.
//
// Also compiled with STAGES, the pieces of X that are in flight or in use, REGISTERS of a multiplying thread,
// FETCH_REGISTERS of a fetching one, RESIDENT blocks that are to share a multiprocessor, WGMMA, 0 or 1, X8: whether X and W
// are multiplied in 8 bits, and GROUP: how many words are multiplied together, 1 or 2 (of an even number of groups a tile).
// A warp of its own fetches the pieces; the others wait only for the piece they need and tell when they are done with it,
// so that they may drift apart.
//
// With X8 a row of X is two rows of 8-bit numbers, whose sum is close to 16 bits: split_x.cu makes them. So all of W's
// values go to the tensor cores as they are stored, X loses next to nothing, and N is twice what it would be, which the
// tensor cores have time for.
#include "hopper.cuh"
#include "spmm.cuh"

struct Params {
  TensorMap x;  // boxes of N_TILE rows, or twice that, and 64 columns, swizzled by the 128 bytes of a row, or 64
  SpmmParams spmm;
};

constexpr int X_WORD = N_TILE * WORD_COLUMNS * 2;  // bytes of X for one word: of 16 bits, or two times 8
constexpr int X_STAGE = CHUNK_WORDS * X_WORD;
constexpr int X_SCALES = X8 ? N_TILE * 4 : 0;       // bytes of X's scales for one tile
constexpr int A_WORD = X8 ? 8 : 16;                 // A registers of a word
constexpr int RING_ALIGN = 1024;                    // of a swizzled box
constexpr int FETCH_THREADS = 128;                  // a warpgroup, since registers are dealt out by warpgroups

// Where the ring holds whole tiles, it goes on by a tile at a time, and a tile's pieces are so many places ahead: what is
// reckoned with is known when the kernel is compiled, but for the tile's place.
constexpr bool HOLDS_TILES = STAGES % CHUNKS == 0;
DEVICE constexpr int ahead(int chunk) { return HOLDS_TILES ? chunk : 0; }

// The ring of pieces of X, as one warp sees it. Each place has two barriers: the piece is there; all are done with it.
struct Ring {
  uint32_t stages, full, empty, all_scales;
  int place, parity;

  DEVICE void advance(int pieces = 1) {
    if ((place += pieces) == STAGES) {
      place = 0;
      parity ^= 1;
    }
  }
  DEVICE uint32_t piece() const { return stages + place * X_STAGE; }
  DEVICE uint32_t scales(int places = 0) const { return all_scales + (place + places) * X_SCALES; }  // of a tile's last

  // For warps that multiply, piece `chunk` of a tile after the other. First: waits until it is there.
  DEVICE void wait(int chunk) const { barrier_wait(full + (place + ahead(chunk)) * 8, parity); }
  // Says that this warp is done with the piece before. `zero` is added to the address: it carries a dependency.
  DEVICE void release_before(int chunk, uint32_t zero) const {
    const int before = place == 0 ? STAGES - 1 : place - 1;
    barrier_arrive(empty + (ahead(chunk) > 0 ? place + ahead(chunk) - 1 : before) * 8 + zero);
  }
  DEVICE void go_on(int chunk) {
    if (!HOLDS_TILES)
      advance();
    else if (chunk == CHUNKS - 1)
      advance(CHUNKS);
  }
};

DEVICE const float* x_scales(const SpmmParams& p, int tile, int n) {
  return p.x_scales + (long long)tile * ((p.n + N_TILE - 1) / N_TILE * N_TILE) + n;
}

// One thread fetches all pieces of X that this block's tiles need, in order.
DEVICE void fetch_x(const Params& p, Ring ring, int job, int tile, int units) {
  int n = Job(p.spmm, job).n;
  for (; units > 0; --units) {
    for (int part = 0; part < CHUNKS; ++part) {
      const int words = min(CHUNK_WORDS, TILE_WORDS - part * CHUNK_WORDS);
      const int first = (tile * TILE_WORDS + part * CHUNK_WORDS) * WORD_COLUMNS;
      const uint32_t full = ring.full + ring.place * 8;
      barrier_wait_asleep(ring.empty + ring.place * 8, ring.parity ^ 1);
      const bool scales = X8 && part == CHUNKS - 1;
      barrier_expect(full, words * X_WORD + (scales ? X_SCALES : 0));
      if (scales) copy_bytes(ring.scales(), x_scales(p.spmm, tile, n), X_SCALES, full);
      for (int i = 0; i < words; ++i)
        copy_box(ring.piece() + i * X_WORD, &p.x, first + i * WORD_COLUMNS, n * (1 + X8), full);
      ring.advance();
    }
    if (++tile == p.spmm.tiles) {
      tile = 0;
      n = Job(p.spmm, ++job).n;
    }
  }
}

#if X8
// Multiplies words by their columns of X in 8 bits, asynchronously, as below. X's two parts have columns of their own, next
// to each other in one thread. After each tile they meet in the sums, by the tile's scales: X has one for each row and tile,
// and the tensor cores add up float8 products with some 14 bits only. That is done when the next tile's first words are
// ready to be multiplied: by then nobody has to wait for the tile's last products.
struct Multiplier {
  uint64_t x;
  uint32_t scales;
  Sum8 raw[2 * N_BLOCKS][4];

  DEVICE void begin_job(float (&sum)[N_BLOCKS][4]) const { clear(sum); }
  DEVICE void begin_pieces(const Ring& ring) { x = swizzled_descriptor<64>(ring.piece()); }
  DEVICE void multiply(float (&sum)[N_BLOCKS][4], const uint32_t (&a)[GROUP][8], int place, bool first_of_tile,
                       bool first_of_job) {
    if (first_of_tile && !first_of_job) fold(sum);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 2 * GROUP; ++s)
      wgmma8(raw, a[s / 2] + s % 2 * 4, x + ((place + s / 2 * X_WORD + s % 2 * 32) >> 4), s > 0 || !first_of_tile);
    wgmma_commit();
    wgmma_wait<1>();
  }
  DEVICE void finish_tile(const Ring& ring) {
    scales = ring.scales(ahead(CHUNKS - 1)) + (threadIdx.x & 3) * 8;
    if constexpr (TILE_WORDS / GROUP % 2 == 1) wgmma_wait<0>();  // as below
  }
  DEVICE void finish_job(float (&sum)[N_BLOCKS][4]) const { fold(sum); }
  DEVICE void fold(float (&sum)[N_BLOCKS][4]) const {
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < N_BLOCKS; ++j) {
      const float2 scale = load_shared2(scales + j * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Sum8* both = raw[2 * j + i % 2] + i / 2 * 2;
        sum[j][i] += (both[0] * HIGH_COUNTS + both[1] * LOW_COUNTS) * (i % 2 == 0 ? scale.x : scale.y);
      }
    }
  }
};
#elif WGMMA
// Multiplies words by their columns of X, asynchronously: the products of the word before are done when multiply returns.
// `anew` begins new sums. (Setting them to zero instead would make the compiler keep two sets of registers; and a job's end
// inside of the loop over its tiles would make it wait for all products after each tile.)
struct Multiplier {
  uint64_t x;

  DEVICE void begin_job(float (&)[N_BLOCKS][4]) const {}
  // wgmma reads A from two words' registers in turn. After an odd number of words the next tile's first would be written
  // while it is still read: unless the compiler sees that nothing is under way, it makes every wgmma wait.
  DEVICE void finish_tile(const Ring&) const {
    if constexpr (TILE_WORDS % 2 == 1) wgmma_wait<0>();
  }
  DEVICE void finish_job(float (&)[N_BLOCKS][4]) const { wgmma_wait<0>(); }
  DEVICE void begin_pieces(const Ring& ring) { x = swizzled_descriptor<128>(ring.piece()); }
  DEVICE void multiply(float (&sum)[N_BLOCKS][4], const uint32_t (&a)[GROUP][16], int place, bool, bool anew) const {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) wgmma(sum, a[0] + 4 * s, x + ((place + s * 32) >> 4), s > 0 || !anew);
    wgmma_commit();
    wgmma_wait<1>();
  }
};
#else
// Multiplies words by their columns of X.
struct Multiplier {
  static constexpr int LOADS = N_BLOCKS == 1 ? 2 : 4;  // of a word, for one block of n or two
  uint32_t x[LOADS];

  DEVICE void begin_job(float (&sum)[N_BLOCKS][4]) const { clear(sum); }
  DEVICE void finish_tile(const Ring&) const {}
  DEVICE void finish_job(float (&)[N_BLOCKS][4]) const {}
  // ldmatrix: lanes 0-7 give the rows of the first 8x8 matrix, and so on. One block of n: its four matrices are four
  // pieces of 8 columns; more: two pieces of columns for each of two blocks of n. Swizzled: piece ^ row.
  DEVICE void begin_pieces(const Ring& ring) {
    const uint32_t piece = ring.piece();
    const int lane = threadIdx.x & 31;
    const int row = N_BLOCKS == 1 ? lane & 7 : (lane & 7) + (lane >> 4) * 8;
    const int column = N_BLOCKS == 1 ? lane >> 3 : (lane >> 3) & 1;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) x[i] = piece + row * 128 + (((column + i * (8 / LOADS)) ^ (lane & 7)) << 4);
  }
  DEVICE void multiply(float (&sum)[N_BLOCKS][4], const uint32_t (&a)[GROUP][16], int place, bool, bool) const {
    uint32_t b[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if constexpr (N_BLOCKS == 1) {
        if (s % 2 == 0) load_matrices(b, x[s / 2] + place);
        mma_m16n8k16(sum[0], a[0] + 4 * s, b[s % 2 * 2], b[s % 2 * 2 + 1]);
      } else {
#pragma unroll
        for (int j = 0; j < N_BLOCKS; j += 2) {
          load_matrices(b, x[s] + place + j * 1024);
          mma_m16n8k16(sum[j], a[0] + 4 * s, b[0], b[1]);
          mma_m16n8k16(sum[j + 1], a[0] + 4 * s, b[2], b[3]);
        }
      }
    }
  }
};
#endif

// Whether a warp has no rows in the last job, nor have those that it multiplies together with. Else it multiplies by what it
// finds there.
DEVICE bool idle(const SpmmParams& p, int job, int warp) {
  if constexpr (!SOME_COUNT_LESS) return false;
  return p.n <= N_TILE && job * WARPS + (WGMMA ? warp & ~3 : warp) >= p.strips;
}

extern "C" __global__ void __launch_bounds__(THREADS + FETCH_THREADS, RESIDENT) spmm(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  const SpmmParams& p = params.spmm;
  launch_dependents();
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int begin = first_unit(p, blockIdx.x), end = first_unit(p, blockIdx.x + 1);
  if (begin == end) return;
  int job = begin / p.tiles, tile = begin - job * p.tiles;

  if (warp < WARPS) prefetch_bitmaps(p, Job(p, job).row_block * WARPS + warp, tile, lane);

  const uint32_t stages = (shared_address(memory) + RING_ALIGN - 1) & ~(RING_ALIGN - 1u);
  static_assert(2 * STAGES * 8 <= 128, "there is room for so many barriers");
  const uint32_t full = stages + STAGES * X_STAGE;
  Ring ring{stages, full, full + STAGES * 8, full + 128, 0, 0};
  if (threadIdx.x < 2 * STAGES) barrier_init(full + threadIdx.x * 8, threadIdx.x < STAGES ? 1 : WARPS);
  barrier_init_done();
  __syncthreads();
  if (warp >= WARPS) {
    give_registers<FETCH_REGISTERS>();
    if (threadIdx.x != THREADS) return;
    prefetch_map(&params.x);
    wait_dependencies();
    fetch_x(params, ring, job, tile, end - begin);
    return;
  }
  take_registers<REGISTERS>();

  // The weights of the first tiles are on their way before X may be read.
  const uint32_t base = full + 128 + STAGES * X_SCALES + warp * p.column_bytes + lane * 4;
  Weights weights(p, tile, Job(p, job).row_block * WARPS + warp, end - begin, lane);
  wait_dependencies();
  float sum[N_BLOCKS][4] = {};
  Multiplier multiplier;
  // A piece of X may be overwritten once ldmatrix has delivered it, not once it was issued, and nothing but the use of
  // what it delivers tells that. So the release is made to depend on the last product, through a zero that the compiler
  // can't know to be one. (wgmma has wgmma_wait for this. But X's scales, with X8, are loaded like anything else.)
  const uint32_t never = WGMMA ? 0 : (uint32_t)p.n >> 31;
  uint32_t products_done = 0;

  for (int unit = begin; unit < end; ++job) {
    const int first = unit, last = min(end, (job + 1) * p.tiles);
    if (idle(p, job, warp)) {  // only says that it is done with each piece
      for (int piece = 0; piece < (last - first) * CHUNKS; ++piece) {
        const int c = piece % CHUNKS;
        ring.wait(c);
        if (lane == 0 && (piece > 0 || first > begin)) ring.release_before(c, products_done);
        ring.go_on(c);
      }
      return;
    }
    multiplier.begin_job(sum);
    for (; unit < last; ++unit) {
      weights.begin_tile(p, base, lane);
      uint32_t column = base;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        ring.wait(c);
        if (ahead(c) == 0) multiplier.begin_pieces(ring);
#pragma unroll
        for (int i = 0; i < CHUNK_WORDS; ++i) {
          const int w = c * CHUNK_WORDS + i;
          if (w < TILE_WORDS) {
            if (i % GROUP == 0) {
              uint32_t a[GROUP][A_WORD];
#pragma unroll
              for (int g = 0; g < GROUP; ++g) expand_word(a[g], weights.words[w + g], column);
              const int place = ahead(c) * X_STAGE + i * X_WORD;
              multiplier.multiply(sum, a, place, w == 0, w == 0 && unit == first);
            }
            // Only now are all products of the piece before this one done.
            if (i == 0 && lane == 0 && (c > 0 || unit > begin))
              ring.release_before(c, X8 ? __float_as_uint(sum[N_BLOCKS - 1][3]) & never : products_done);
            weights.load_ahead(p, w, lane);
          }
        }
        if (c == CHUNKS - 1) multiplier.finish_tile(ring);
        products_done = __float_as_uint(sum[N_BLOCKS - 1][0]) & never;
        ring.go_on(c);
      }
    }
    multiplier.finish_job(sum);
    finish_job(p, sum, job, begin, end, warp, lane);
  }
}
