// The two arenas of a store, values and optimizer states, and which of their slots are free.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "index/index.h"
#include "rows/row_kernels.h"
#include "system/memory.h"
#include "tables/status.h"

namespace penstock {

// What the rows of a store look like.
struct RowLayout {
  uint32_t dim;
  ValueType type;
  uint32_t state_dim;
  uint32_t usage_dim;

  uint32_t value_bytes() const { return dim * bytes_of(type); }
  uint64_t state_bytes() const { return uint64_t{state_dim + usage_dim} * sizeof(float); }  // with the marks of use
};

// The slots of default rows are the first ones, and never free.
class SlotPool {
 public:
  SlotPool(const RowLayout& layout, uint64_t max_bytes, uint32_t num_defaults, int num_threads);

  // Takes addresses, and memory for the default rows. False: there is none.
  bool open();

  Rows rows() const {
    return {values_.data(),    reinterpret_cast<float*>(states_.data()), layout_.dim, layout_.state_dim, layout_.usage_dim,
            layout_.type, value_bytes_};
  }

  // A slot for a row whose key is in this shard, which the caller owns.
  Status take(uint32_t shard, uint32_t* slot);

  // Where a thread notes the slots of rows that it has erased, for `give_back`.
  std::vector<uint32_t>& freed(int thread) { return freed_[thread].slots; }
  void give_back();

  // Rises whenever rows are erased: slots that were found before hold as long as it is the same.
  uint64_t erase_version() const { return erase_version_; }
  void erased() noexcept { ++erase_version_; }

  uint64_t end() const { return handed_out_; }  // all slots are below it
  uint64_t capacity() const { return handed_out_ - num_defaults_; }
  uint64_t num_free() const;
  // Adds to uses [end()] one for each slot that is free.
  void count_free(std::vector<uint8_t>* uses) const;

 private:
  static constexpr uint64_t kLeastExtent = 16;  // slots; all extents are multiples of it
  struct alignas(64) Shard {
    std::vector<uint32_t> free;
    uint32_t next = 0;
    uint32_t end = 0;  // [next, end) is this shard's current extent
  };
  struct alignas(64) Freed {
    std::vector<uint32_t> slots;
  };

  bool commit(uint64_t slots);
  uint64_t extent_rows() const;  // slots that a shard takes at a time
  uint32_t first_owner(uint32_t slot) const { return first_owners_[(slot - num_defaults_) / kLeastExtent]; }

  const RowLayout layout_;
  const uint32_t value_bytes_;
  const uint64_t max_bytes_;
  const uint32_t num_defaults_;
  Region values_;
  Region states_;
  std::mutex growth_;
  uint64_t handed_out_ = 0;
  uint64_t erase_version_ = 1;
  std::vector<uint32_t> free_;  // for any shard
  std::vector<uint8_t> first_owners_;  // of each kLeastExtent slots behind the default rows: the shard that took them
  std::vector<Shard> shards_;
  std::vector<Freed> freed_;
};

}  // namespace penstock
