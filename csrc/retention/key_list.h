// The keys of one table, in no particular order, in blocks: a long list grows without a second copy of itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace penstock {

class KeyList {
 public:
  uint64_t size() const { return size_; }
  uint64_t operator[](uint64_t i) const { return blocks_[i / kBlock][i % kBlock]; }
  uint64_t memory_bytes() const {
    return sizeof(uint64_t) * (blocks_.empty() ? 0 : first_capacity_ + (blocks_.size() - 1) * kBlock);
  }

  // Takes memory for so many keys in all. May throw bad_alloc; then nothing has changed.
  void reserve(uint64_t size) {
    if (blocks_.empty() || first_capacity_ < std::min(size, kBlock)) {
      // Short lists grow by a quarter: with many small tables they are most of the memory.
      const uint64_t capacity = std::min(kBlock, std::max<uint64_t>({size, first_capacity_ + first_capacity_ / 4, 4}));
      auto block = std::make_unique_for_overwrite<uint64_t[]>(capacity);
      if (blocks_.empty()) {
        blocks_.push_back(std::move(block));
      } else {
        std::copy_n(blocks_[0].get(), std::min(size_, kBlock), block.get());
        blocks_[0] = std::move(block);
      }
      first_capacity_ = capacity;
    }
    while (blocks_.size() * kBlock < size) blocks_.push_back(std::make_unique_for_overwrite<uint64_t[]>(kBlock));
  }

  // There must be room, by `reserve`.
  void push_back(uint64_t key) {
    blocks_[size_ / kBlock][size_ % kBlock] = key;
    ++size_;
  }

  // The last key takes the place of the i-th.
  void remove(uint64_t i) {
    --size_;
    blocks_[i / kBlock][i % kBlock] = (*this)[size_];
    // One block more than needed stays, so that a list that shrinks and grows does not ask for memory each time.
    while (blocks_.size() > 2 && size_ <= (blocks_.size() - 2) * kBlock) blocks_.pop_back();
  }

  // The memory stays, so that there is room for as many; `remove` gives up what is too much of it.
  void clear() { size_ = 0; }

 private:
  static constexpr uint64_t kBlock = 1024;

  std::vector<std::unique_ptr<uint64_t[]>> blocks_;  // the first of first_capacity_ keys, the others of kBlock
  uint64_t first_capacity_ = 0;
  uint64_t size_ = 0;
};

}  // namespace penstock
