// Looks batches up, tile by tile: finds the rows of the keys and pools them.
#pragma once

#include <vector>

#include "store/batch_copies.h"
#include "store/insertion.h"
#include "store/lookup.h"
#include "tables/key_finder.h"

namespace penstock {

class PooledLookups {
 public:
  PooledLookups(KeyedRows& rows, KeyFinder& finder, Insertion& insertion)
      : rows_(rows), finder_(finder), insertion_(insertion), copies_(rows.pool) {}

  Status look_up(const PoolingPlan& plan, const PackedKeys& given, bool insert, float* out, Lookup* lookup);
  // The vector that each key of the plan's features read, into vectors [keys, dim]; others are left alone.
  void read(const Lookup& lookup, float* vectors);

 private:
  // What a tile has to pool after its keys were found: the thread's misses [first .. last), and the others too unless they
  // are pooled already.
  struct TileMisses {
    int thread;
    bool others_are_pooled;
    size_t first;
    size_t last;
  };

  std::vector<Tile> tiles_of(const PoolingPlan& plan, const PackedKeys& batch) const;
  // Finds and pools in one pass, where each bag is one key: no other wait for a row than that of the machine.
  void look_up_tile(const PoolingPlan& plan, const PackedKeys& batch, const Tile& tile, uint32_t* slots, bool stream,
                    float* out, int thread);
  void pool_missed(const PoolingPlan& plan, const PackedKeys& batch, const TileMisses& missed, const Tile& tile,
                   const uint32_t* slots, bool stream, float* out);

  KeyedRows& rows_;
  KeyFinder& finder_;
  Insertion& insertion_;
  BatchCopies copies_;
  std::vector<TileMisses> tile_misses_;
};

}  // namespace penstock
