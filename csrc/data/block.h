// Blocks of decoded rows that lie in several chunks, and how batches are copied out of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>
#include <vector>

namespace penstock {

// One feature of one decoded chunk: bag r is values[offsets[r], offsets[r + 1]), or values[r] alone without offsets.
struct JaggedColumn {
  const int64_t* values;
  const int64_t* offsets;  // [rows + 1] or null
  const float* weights;    // by value; null, then in every part: each is 1
};

// Rows of a block in the order in which they are wanted, found once for all columns.
class Places {
 public:
  size_t size() const { return n_; }
  uint64_t block() const { return block_; }

 private:
  friend class JaggedBlock;

  // A run of rows has no list. Otherwise a place is its part, shifted by the block's `row_bits_`, and the row within
  // the chunk: in few bits where they suffice, because each feature passes over all of them.
  uint64_t block_ = 0;  // number of the one that found them
  bool is_run_ = false;
  int64_t first_ = 0;
  size_t n_ = 0;
  std::variant<std::vector<uint16_t>, std::vector<uint32_t>, std::vector<uint64_t>> list_;
};

// Which rows each feature of a cut is taken of.
using PlacesOfFeatures = std::vector<const Places*>;

// The jagged columns of a block, none of them copied. Row r of the block is row
// starts[p] + r - (rows of the parts before p) of the chunk p that holds it. Chunks have under 2^32 rows.
class JaggedBlock {
 public:
  JaggedBlock(std::vector<JaggedColumn> columns,  // [parts * features], part by part
               std::vector<int64_t> starts,        // [parts] first row taken of each chunk
               std::vector<int64_t> stops);        // [parts]

  uint64_t number() const { return number_; }  // of all blocks of the process
  size_t num_features() const { return num_features_; }
  size_t num_parts() const { return starts_.size(); }
  int64_t stop(size_t part) const { return stops_[part]; }

  // Whether every bag has one key, so that offsets need not be made.
  bool one_key_a_bag() const;

  // Whether some column has weights, so that all get them.
  bool has_weights() const;

  // False if one of the rows lies outside the block.
  bool locate(const int64_t* rows, size_t n, Places* places) const;
  bool locate_run(int64_t first, size_t n, Places* places) const;

  // Cutting rows into batches takes a few calls: places, offsets, values and, if there are any, weights. Each batch is
  // packed feature by feature, batch after batch; all have `batch` rows but the last. Feature by feature over all
  // batches, so that the source stays in cache. All places are of `n` rows.

  // Offsets of every batch, from 0, batch after batch; and where the batches begin in the values.
  void cut_offsets(const PlacesOfFeatures& places, size_t n, size_t batch,
                   int64_t* out,            // [features * n + batches]
                   int64_t* starts) const;  // [batches + 1]
  void cut_values(const PlacesOfFeatures& places, size_t n, size_t batch,
                  const int64_t* offsets,  // from cut_offsets; null: one key a bag
                  const int64_t* starts,   // from cut_offsets; null: one key a bag
                  int64_t* out) const;     // [starts[batches]]
  void cut_weights(const PlacesOfFeatures& places, size_t n, size_t batch, const int64_t* offsets,
                   const int64_t* starts,
                   float* out) const;  // as cut_values; 1 where a column has none

  // Rows of a plain array that lies in the same chunks: row r of chunk p is parts[p][r * row_bytes, (r + 1) * row_bytes).
  void take(const Places& places, const std::vector<const char*>& parts, size_t row_bytes, char* out) const;

 private:
  template <typename Element>
  struct Column;
  template <typename Element>
  struct Cut;

  template <typename Visit>
  void each_run(int64_t first, size_t n, Visit visit) const;
  template <typename Visit>
  void with_list(const Places& places, Visit visit) const;
  template <typename Element>
  void cut_elements(const Element* JaggedColumn::*elements, const PlacesOfFeatures& places, size_t n, size_t batch,
                    const int64_t* offsets, const int64_t* starts, Element* out) const;

  uint64_t number_;
  std::vector<JaggedColumn> columns_;
  std::vector<int64_t> starts_, stops_;
  std::vector<int64_t> ends_;  // rows of the block up to the end of each part
  int row_bits_ = 0, place_bits_ = 0;
  size_t num_features_ = 0;
  int64_t num_rows_ = 0;
};

}  // namespace penstock
