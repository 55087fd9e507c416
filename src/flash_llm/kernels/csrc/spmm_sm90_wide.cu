// The multiplying kernel for Hopper and more than 64 rows of X: some warps decode, others multiply, and two blocks, a
// cluster, share what they fetch of X.
//
// Where each warp does both (spmm_sm90.cu), it is held up while its products wait for the tensor cores behind those of other
// warps, and decodes nothing meanwhile. Here a block's first warps, in warpgroups, multiply; as many others decode a strip
// each, and leave it word by word in shared memory, a ring of A. One warp more fetches X into a ring of its own. All of them
// wait for each other at barriers in shared memory only, and run ahead of each other as far as the rings allow.
//
// X is most of what passes from L2 to the multiprocessors. So each of the two blocks of a cluster fetches one half of the
// rows of X for both; and they work side by side on one row block, half of its strips each.
//
// Also compiled with CLUSTER, 2; STAGES and A_STAGES, places of the rings of X and A, each for one word's 64 columns; and the
// registers of a thread: MULTIPLY_REGISTERS, DECODE_REGISTERS and FETCH_REGISTERS.
#include "hopper.cuh"
#include "spmm.cuh"

struct Params {
  TensorMap x;  // boxes of N_TILE / CLUSTER rows and 64 columns, swizzled by the 128 bytes of a row
  SpmmParams spmm;
};

constexpr int BLOCK_WARPS = WARPS / CLUSTER, BLOCK_THREADS = BLOCK_WARPS * LANES;  // that multiply; as many decode
constexpr int FETCH_THREADS = 128;                 // a warpgroup, since registers are dealt out by warpgroups
constexpr int ALL_THREADS = 2 * BLOCK_THREADS + FETCH_THREADS;
constexpr int GROUPS = BLOCK_WARPS / 4;            // warpgroups that multiply, 64 rows of W each
constexpr int AT_ONCE = N_BLOCKS > 16 ? N_BLOCKS / 2 : N_BLOCKS;  // blocks of n; for more, registers don't suffice
constexpr int X_STAGE = N_TILE * WORD_COLUMNS * 2;
constexpr int A_STRIP = STRIP_ROWS * WORD_COLUMNS * 2;
constexpr int A_STAGE = BLOCK_WARPS * A_STRIP;
constexpr int RING_ALIGN = 1024;                   // of swizzled rows
constexpr int BARRIER_BYTES = 512;

// A ring's places, as one warp sees them. Each place has two barriers: it is full; all are done with it.
template <int PLACES, int BYTES>
struct Ring {
  uint32_t data, full, empty;
  int place = 0, parity = 0;

  DEVICE Ring(uint32_t data, uint32_t barriers) : data(data), full(barriers), empty(barriers + PLACES * 8) {}
  DEVICE void advance() {
    if (++place == PLACES) {
      place = 0;
      parity ^= 1;
    }
  }
  DEVICE uint32_t piece() const { return data + place * BYTES; }
  DEVICE uint32_t full_barrier() const { return full + place * 8; }
  DEVICE void wait_full() const { barrier_wait(full + place * 8, parity); }
  DEVICE void wait_empty() const { barrier_wait(empty + place * 8, parity ^ 1); }
  DEVICE void wait_empty_asleep() const { barrier_wait_asleep(empty + place * 8, parity ^ 1); }
  DEVICE void fill() const { barrier_arrive(full + place * 8); }
  DEVICE uint32_t empty_before() const { return empty + (place == 0 ? PLACES - 1 : place - 1) * 8; }
};
using XRing = Ring<STAGES, X_STAGE>;
using ARing = Ring<A_STAGES, A_STAGE>;
static_assert((2 * STAGES + 2 * A_STAGES * GROUPS) * 8 <= BARRIER_BYTES, "barriers");

// Words of a block's units from `unit` to `last`, of one job: the last tile of a row may have fewer than the others.
DEVICE int words_of(const SpmmParams& p, int job, int unit, int last) {
  const int tile = unit - job * p.tiles, behind = last - job * p.tiles;
  return min(behind * TILE_WORDS, p.words) - tile * TILE_WORDS;
}

// One thread fetches this block's share of X for all words of the cluster's units, in order.
DEVICE void fetch_x(const Params& p, XRing ring, int begin, int end, int rank) {
  constexpr uint32_t ALL = (1 << CLUSTER) - 1;
  int job = begin / p.spmm.tiles;
  for (int unit = begin; unit < end; ++job) {
    const int last = min(end, (job + 1) * p.spmm.tiles);
    const int n = Job(p.spmm, job).n + rank * (N_TILE / CLUSTER);
    const int words = words_of(p.spmm, job, unit, last);
    int column = (unit - job * p.spmm.tiles) * TILE_WORDS * WORD_COLUMNS;
    for (int i = 0; i < words; ++i, column += WORD_COLUMNS) {
      ring.wait_empty_asleep();  // in all blocks
      barrier_expect(ring.full_barrier(), X_STAGE);
      copy_box_to(ALL, ring.piece() + rank * (X_STAGE / CLUSTER), &p.x, column, n, ring.full_barrier());
      ring.advance();
    }
    unit = last;
  }
}

// Decodes a word and leaves it in shared memory: 16 rows of 128 bytes, swizzled. `in_piece` is where this lane's row of 16
// bytes belongs for the first K step. Half a word at a time, since registers are few.
DEVICE void store_word(const ARing& ring, uint32_t word, uint32_t& column, uint32_t in_piece) {
  Expander expander(word);
  uint32_t a[2][8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    expander.step(a[half], 2 * half, column);
    expander.step(a[half] + 4, 2 * half + 1, column);
    if (half == 0) ring.wait_empty();
    const uint32_t corner = ring.piece() + in_piece;
    store_matrices(corner ^ half << 6, a[half]);
    store_matrices(corner ^ (half << 6 | 32), a[half] + 4);
  }
}

// A warp decodes its strips of all of this block's units. `warp` is its number in the block.
DEVICE void decode(const SpmmParams& p, ARing ring, uint32_t base, int strip, int tile, int units, int warp, int lane) {
  const int matrix_row = lane & 7, row = matrix_row + (lane >> 3 & 1) * 8;
  const uint32_t in_piece = warp * A_STRIP + row * 128 + ((lane >> 4 ^ matrix_row) << 4);
  Cursor ahead{tile, strip, units};
  ahead.begin_strip(p, lane);
  uint32_t words[TILE_WORDS], later[TILE_WORDS];
  Packets<PACKETS_AHEAD, LIKELY_FULL> packets = {};
#pragma unroll
  for (int w = 0; w < TILE_WORDS; ++w) words[w] = ahead.word(p, w);
  const uint32_t first_offset = __ldg(ahead.offset);
  ahead.advance(p, lane);
#pragma unroll
  for (int w = 0; w < TILE_WORDS; ++w) later[w] = ahead.word(p, w);
  uint32_t next_offset = __ldg(ahead.offset);
  packets.load(p.packets + first_offset, packet_rows(words), lane);

  for (; units > 0; --units) {
    packets.store(base, lane);
    ahead.advance(p, lane);  // to the tile after the next
    uint32_t column = base;
#pragma unroll
    for (int w = 0; w < TILE_WORDS; ++w) {
      if (!RAGGED || tile * TILE_WORDS + w < p.words) {
        store_word(ring, words[w], column, in_piece);
        __syncwarp();
        if (lane == 0) ring.fill();
        ring.advance();
      }
      words[w] = later[w];
      later[w] = ahead.word(p, w);
      if (w == LOAD_AFTER) {
        packets.load(p.packets + next_offset, next_packet_rows(words, later), lane);  // of the next tile
        next_offset = __ldg(ahead.offset);
      }
    }
    if (++tile == p.tiles) tile = 0;
  }
}

// Says that this warp is done with the word before: in all blocks of the cluster, as far as X is concerned.
DEVICE void release_before(const XRing& x, const ARing& a, int lane) {
  if (lane < CLUSTER) barrier_arrive_in(lane, x.empty_before());
  if (lane == 0) barrier_arrive(a.empty_before());
}

// A warpgroup multiplies its 64 rows of A by X, and finishes its jobs. `warp` is its number in the cluster.
DEVICE void multiply(const SpmmParams& p, XRing x, ARing a, int begin, int end, int warp, int lane) {
  float sum[N_BLOCKS][4];
  const uint32_t in_piece = warp % BLOCK_WARPS / 4 * 4 * A_STRIP;
  int job = begin / p.tiles;
  for (int unit = begin; unit < end; ++job) {
    const int last = min(end, (job + 1) * p.tiles);
    const int words = words_of(p, job, unit, last);
    clear(sum);
#pragma unroll 1
    for (int i = 0; i < words; ++i) {
      x.wait_full();
      a.wait_full();
      async_fence();
      const uint64_t a_words = swizzled_descriptor<128>(a.piece() + in_piece);
      const uint64_t x_words = swizzled_descriptor<128>(x.piece());
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int part = 0; part < N_BLOCKS; part += AT_ONCE)
          wgmma_shared<AT_ONCE>(sum + part, a_words + 2 * s, x_words + part * 8 * 128 / 16 + 2 * s, 1);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0) release_before(x, a, lane);  // only now are the products of the word before this one done
      x.advance();
      a.advance();
    }
    wgmma_wait<0>();
    release_before(x, a, lane);
    finish_job(p, sum, job, begin, end, warp, lane);
    unit = last;
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(ALL_THREADS, 1)
    spmm(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  const SpmmParams& p = params.spmm;
  launch_dependents();
  const int lane = threadIdx.x & 31, rank = blockIdx.x % CLUSTER;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int begin = first_unit(p, worker()), end = first_unit(p, worker() + 1);
  if (begin == end) return;
  const int job = begin / p.tiles, tile = begin - job * p.tiles;
  const int strip = Job(p, job).row_block * WARPS + rank * BLOCK_WARPS + warp % BLOCK_WARPS;
  if (warp >= BLOCK_WARPS && warp < 2 * BLOCK_WARPS) prefetch_bitmaps(p, strip, tile, lane);

  const uint32_t stages = (shared_address(memory) + RING_ALIGN - 1) & ~(RING_ALIGN - 1u);
  const uint32_t a_stages = stages + STAGES * X_STAGE;
  const uint32_t barriers = a_stages + A_STAGES * A_STAGE, a_barriers = barriers + 2 * STAGES * 8;
  const XRing x(stages, barriers);
  const ARing a(a_stages, a_barriers + warp % BLOCK_WARPS / 4 * 2 * A_STAGES * 8);
  if (threadIdx.x < 2 * STAGES) barrier_init(barriers + threadIdx.x * 8, threadIdx.x < STAGES ? 1 : WARPS);
  if (threadIdx.x < 2 * A_STAGES * GROUPS) barrier_init(a_barriers + threadIdx.x * 8, 4);
  barrier_init_done();
  cluster_sync();

  if (warp >= 2 * BLOCK_WARPS) {
    give_registers<FETCH_REGISTERS>();
    if (threadIdx.x == 2 * BLOCK_THREADS) {
      prefetch_map(&params.x);
      wait_dependencies();
      fetch_x(params, x, begin, end, rank);
    }
    __syncwarp();
  } else if (warp >= BLOCK_WARPS) {
    set_registers<DECODE_REGISTERS, ALL_THREADS>();
    const uint32_t base = barriers + BARRIER_BYTES + (warp - BLOCK_WARPS) * p.column_bytes + lane * 4;
    decode(p, a, base, strip, tile, end - begin, warp - BLOCK_WARPS, lane);
  } else {
    set_registers<MULTIPLY_REGISTERS, ALL_THREADS>();
    wait_dependencies();
    multiply(p, x, a, begin, end, rank * BLOCK_WARPS + warp, lane);
  }
  cluster_sync();  // a block's shared memory is there until the other one has said all it has to say
}
