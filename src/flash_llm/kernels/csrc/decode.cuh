// From a bitmap and packed values to the tensor cores' A registers: docs/format.md has the layout.
//
// A lane's nonzeros of a tile are first written to a column of shared memory that only this lane touches (its bank is
// the lane's: no conflicts, no barriers). Every value is written twice, word q holding values q-1 and q. Then any pair
// of neighbouring elements is one aligned load: at word q, where q counts the nonzeros up to and including the pair's
// first element, the low half is that element if it is nonzero, and the high half the second one if that is nonzero.
// A mask made of the two bits clears what is not. That is 5 instructions for 2 elements, and no branch.
//
// Values of 8 bits are either multiplied as they are (X8, spmm_sm90.cu): then word q of the column holds values q to q+3,
// and any four neighbouring elements, a register, are one load. Or they become 16-bit ones on their way to the column
// (values.cuh), and all is as above.
#pragma once
#ifndef X8
#define X8 0
#endif
#include "values.cuh"

constexpr int LANES = 32;
constexpr int WORD_COLUMNS = 64;
constexpr int STRIP_ROWS = 16;
constexpr uint32_t COLUMN_STEP = 128;  // bytes from a word of a lane's column to the next: one word for each lane

// Packets of a tile stand in rows: the first packet of every lane that has one, then the second packets, and so on.
struct PacketRows {
  int mine;  // rows that this lane has a packet in
  int full;  // rows that every lane has one in
  int most;  // rows in all
};

template <int WORDS>
DEVICE PacketRows packet_rows(const uint32_t (&words)[WORDS]) {
  int count = 0;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) count += __popc(words[w]);
  PacketRows rows;
  rows.mine = (count + PACKET_VALUES - 1) >> PACKET_SHIFT;
  rows.full = __reduce_min_sync(0xffffffffu, rows.mine);
  rows.most = __reduce_max_sync(0xffffffffu, rows.mine);
  return rows;
}

// A tile's first AHEAD packets of this lane, loaded ahead into registers; the (rare) others are loaded when stored.
// FULL rows are expected to be full: then their loads need no thought. Other sparsities are slower, not wrong.
template <int AHEAD, int FULL>
struct Packets {
  uint4 held[AHEAD];
  PacketRows rows;
  const uint4* tile;
  int rest;  // where row AHEAD begins

  DEVICE void load(const uint4* tile_packets, const PacketRows& tile_rows, int lane) {
    rows = tile_rows;
    tile = tile_packets;
    rest = 0;
    if (rows.full >= FULL) {
#pragma unroll
      for (int r = 0; r < FULL; ++r) held[r] = load_stream(tile + r * LANES + lane);
      rest = FULL * LANES;
    } else {
#pragma unroll
      for (int r = 0; r < FULL; ++r) load_row(held[r], r, rest, lane);
    }
#pragma unroll
    for (int r = FULL; r < AHEAD; ++r) load_row(held[r], r, rest, lane);
  }

  // A row that only some lanes have a packet in: theirs stand in the order of the lanes.
  DEVICE void load_row(uint4& packet, int r, int& row, int lane) const {
    const uint32_t takers = __ballot_sync(0xffffffffu, r < rows.mine);
    load_stream_if(packet, r < rows.mine, tile + (row + __popc(takers & ((1u << lane) - 1))));
    row += __popc(takers);
  }

  // Lanes without a packet in a row write what they happen to hold: behind their last value, where nobody reads.
  DEVICE void store(uint32_t column, int lane) const {
    uint32_t previous = 0;
    if constexpr (X8) column -= 4 * COLUMN_STEP;  // the words of a register are written when the next one is known
#pragma unroll
    for (int r = 0; r < AHEAD; ++r) {
      if (r < FULL || r < rows.most) store_packet(column, previous, held[r], r == 0);
    }
    // One at a time. A packet that is loaded and then perhaps not stored would make the next load into its registers
    // wait for whatever else is under way.
    int row = rest;
    for (int r = AHEAD; r < rows.most; ++r) {
      uint4 packet = {};
      load_row(packet, r, row, lane);
      store_packet(column, previous, packet, false);
    }
    if constexpr (X8) {
      store_fours(column, previous, 0);
    } else {
      store_shared(column, previous >> 16);
    }
  }

  static DEVICE void store_packet(uint32_t& column, uint32_t& previous, const uint4& packet, bool first) {
    if constexpr (X8) {
      if (!first) store_fours(column, previous, packet.x);
      store_fours(column + 4 * COLUMN_STEP, packet.x, packet.y);
      store_fours(column + 8 * COLUMN_STEP, packet.y, packet.z);
      store_fours(column + 12 * COLUMN_STEP, packet.z, packet.w);
      previous = packet.w;
      column += PACKET_VALUES * COLUMN_STEP;
      return;
    }
    uint32_t pairs[PACKET_PAIRS];
    packet_pairs(pairs, packet);
#pragma unroll
    for (int i = 0; i < PACKET_PAIRS; ++i) {
      store_shared(column + 2 * i * COLUMN_STEP, prmt(previous, pairs[i], 0x5432));
      store_shared(column + (2 * i + 1) * COLUMN_STEP, pairs[i]);
      previous = pairs[i];
    }
    column += PACKET_VALUES * COLUMN_STEP;
  }

  // The four words that begin with a value of `four`, of which `next` has the following ones.
  static DEVICE void store_fours(uint32_t column, uint32_t four, uint32_t next) {
    store_shared(column, four);
    store_shared(column + COLUMN_STEP, prmt(four, next, 0x4321));
    store_shared(column + 2 * COLUMN_STEP, prmt(four, next, 0x5432));
    store_shared(column + 3 * COLUMN_STEP, prmt(four, next, 0x6543));
  }
};

// Where register i of a word's pairs, taken in the order of its elements, belongs among the A registers.
DEVICE constexpr int pair_place(int i) { return VALUES ? (i & ~3) | (i & 1) << 1 | (i >> 1 & 1) : i; }

// A word of 8-bit values' bits, in the order that expand_word takes: that of 16-bit values.
DEVICE uint32_t reordered(uint32_t word) {
  const uint32_t bytes = prmt(__brev(word), 0, 0x1230), last = bytes & 0xffu;  // elements 3, 7, ... in the lowest byte
  return (bytes & 0xffffff00u) | last >> 1 | (last & 1u) << 7;
}

// Expands one word, 64 columns: a[4 s ...] are the A registers of its K step s of 16. `column` is the address of the
// lane's word q for the nonzeros so far, and moves on.
DEVICE void expand_word(uint32_t (&a)[16], uint32_t word, uint32_t& column) {
  if constexpr (VALUES) word = reordered(word);
  const uint32_t first = word & 0x80808080u;
  uint32_t bits = word;  // shifted so that elements 4s-1, 4s, 4s+1, 4s+2 are the four bytes' top bits
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const uint32_t next = s < 7 ? bits << 1 : word;  // element 31 stands where element -1 would
    const uint32_t tops = bits & 0x80808080u;
    column = dp4a(tops, s == 0 ? 0x00000100u : 0x00000101u, column);
    a[pair_place(2 * s)] = load_shared(column) & prmt(bits, bits, 0xAA99);
    column = dp4a(tops, 0x01010000u, column);
    a[pair_place(2 * s + 1)] = load_shared(column) & prmt(bits, next, 0xCCBB);
    bits = next;
  }
  column = dp4a(first, 0x00000001u, column);
}

// The same for 8-bit values that are multiplied as they are: a[4 s ...] are the A registers of K step s of 32.
//
// Elements 4r to 4r+3 are bits r of the four bytes. Of the word at the running count of nonzeros, element j takes byte
// number (nonzeros among the elements before it) if it is nonzero itself: that is a selector for prmt, whose four digits
// are sums of the four bits with constant weights. Without the 4 of its own bit a digit selects a zero.
DEVICE void expand_word(uint32_t (&a)[8], uint32_t word, uint32_t& column) {
  constexpr uint32_t FIRST = 0x1114, SECOND = 0x1140, THIRD = 0x1400, FOURTH = 0x4000;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int up = r % 3;  // that far the weights can be made smaller in place of shifting the bits
    const uint32_t bits = word >> (r - up) & 0x01010101u << up;
    const uint32_t low = dp2a_low((FIRST | SECOND << 16) >> up, bits, 0);
    const uint32_t selector = dp2a_high((THIRD | FOURTH << 16) >> up, bits, low);
    a[r] = prmt(0, load_shared(column), selector);
    column = dp4a(bits, (COLUMN_STEP >> up) * 0x01010101u, column);
  }
}
