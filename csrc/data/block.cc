// Finding rows in chunks, cutting bags into batches, taking rows of plain arrays.
#include "data/block.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

namespace penstock {
namespace {

std::atomic<uint64_t> blocks_made{0};

constexpr size_t kCacheLine = 64;
// Columns up to this size are brought into the second-level cache at once before rows are picked from them: in order
// that is twice as fast as line by line when each is first met.
constexpr size_t kCachedBytes = size_t{768} << 10;

template <typename Element>
inline __attribute__((always_inline)) void fetch(const Element* begin, const Element* end) {
  for (; begin < end; begin += kCacheLine / sizeof(Element)) __builtin_prefetch(begin, 0, 2);
}

}  // namespace

JaggedBlock::JaggedBlock(std::vector<JaggedColumn> columns, std::vector<int64_t> starts, std::vector<int64_t> stops)
    : number_(blocks_made.fetch_add(1) + 1), columns_(std::move(columns)), starts_(std::move(starts)), stops_(std::move(stops)) {
  num_features_ = starts_.empty() ? 0 : columns_.size() / starts_.size();
  ends_.reserve(stops_.size());
  for (size_t p = 0; p < stops_.size(); ++p) {
    num_rows_ += stops_[p] - starts_[p];
    const auto last = static_cast<uint64_t>(std::max<int64_t>(stops_[p], 1) - 1);
    row_bits_ = std::max(row_bits_, static_cast<int>(std::bit_width(last)));
    ends_.push_back(num_rows_);
  }
  const size_t last_part = std::max<size_t>(stops_.size(), 1) - 1;
  place_bits_ = row_bits_ + static_cast<int>(std::bit_width(last_part));
}

bool JaggedBlock::one_key_a_bag() const {
  return std::all_of(columns_.begin(), columns_.end(), [](const JaggedColumn& column) { return !column.offsets; });
}

bool JaggedBlock::has_weights() const {
  return std::any_of(columns_.begin(), columns_.end(), [](const JaggedColumn& column) { return column.weights; });
}

bool JaggedBlock::locate_run(int64_t first, size_t n, Places* places) const {
  if (first < 0 || first > num_rows_ || n > static_cast<uint64_t>(num_rows_ - first)) return false;
  places->block_ = number_;
  places->is_run_ = true;
  places->first_ = first;
  places->n_ = n;
  return true;
}

bool JaggedBlock::locate(const int64_t* rows, size_t n, Places* places) const {
  places->block_ = number_;
  places->n_ = n;
  if (place_bits_ > 32) {
    places->list_.emplace<std::vector<uint64_t>>(n);
  } else if (place_bits_ > 16) {
    places->list_.emplace<std::vector<uint32_t>>(n);
  } else {
    places->list_.emplace<std::vector<uint16_t>>(n);
  }
  return std::visit(
      [&](auto& list) {
        using Place = typename std::remove_reference_t<decltype(list)>::value_type;
        for (size_t i = 0; i < n; ++i) {
          const int64_t row = rows[i];
          if (row < 0 || row >= num_rows_) return false;
          size_t part = 0;
          while (row >= ends_[part]) ++part;
          const int64_t before = part ? ends_[part - 1] : 0;
          const auto in_chunk = static_cast<uint64_t>(starts_[part] + row - before);
          list[i] = static_cast<Place>(static_cast<uint64_t>(part) << row_bits_ | in_chunk);
        }
        return true;
      },
      places->list_);
}

// Calls visit(part, row in its chunk, rows, how many rows came before) for the stretches of a run.
template <typename Visit>
void JaggedBlock::each_run(int64_t first, size_t n, Visit visit) const {
  const int64_t stop = first + static_cast<int64_t>(n);
  size_t part = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), first) - ends_.begin());
  for (int64_t row = first; row < stop; ++part) {
    const int64_t end = std::min(stop, ends_[part]), before = part ? ends_[part - 1] : 0;
    if (row < end) visit(part, starts_[part] + row - before, end - row, row - first);
    row = std::max(row, end);
  }
}

template <typename Visit>
void JaggedBlock::with_list(const Places& places, Visit visit) const {
  std::visit([&](const auto& list) { visit(list.data()); }, places.list_);
}

void JaggedBlock::cut_offsets(const PlacesOfFeatures& places, size_t n, size_t batch, int64_t* out,
                               int64_t* starts) const {
  // Lengths first, feature by feature; then each batch's sums.
  for (size_t f = 0; f < num_features_; ++f) {
    const auto length = [&](size_t part, int64_t row) {
      const int64_t* const offsets = columns_[part * num_features_ + f].offsets;
      return offsets ? offsets[row + 1] - offsets[row] : 1;
    };
    for (size_t begin = 0, b = 0; begin < n; begin += batch, ++b) {
      const size_t size = std::min(batch, n - begin);
      int64_t* const lengths = out + begin * num_features_ + b + f * size + 1;
      if (places[f]->is_run_) {
        each_run(places[f]->first_ + static_cast<int64_t>(begin), size,
                 [&](size_t part, int64_t row, int64_t rows, int64_t done) {
                   for (int64_t i = 0; i < rows; ++i) lengths[done + i] = length(part, row + i);
                 });
        continue;
      }
      with_list(*places[f], [&](const auto* list) {
        const uint64_t mask = (uint64_t{1} << row_bits_) - 1;
        for (size_t i = 0; i < size; ++i) {
          const uint64_t place = list[begin + i];
          lengths[i] = length(place >> row_bits_, static_cast<int64_t>(place & mask));
        }
      });
    }
  }
  *starts = 0;
  for (size_t begin = 0; begin < n; begin += batch) {
    int64_t total = 0;
    *out++ = 0;
    for (size_t bag = std::min(batch, n - begin) * num_features_; bag > 0; --bag, ++out) *out = total += *out;
    starts[1] = starts[0] + total;
    ++starts;
  }
}

// A feature in every part.
template <typename Element>
struct JaggedBlock::Column {
  const Element* elements;
  const int64_t* offsets;
};

// The copy of one feature of one batch.
template <typename Element>
struct JaggedBlock::Cut {
  const Column<Element>* columns;
  size_t size;
  const int64_t* bags;  // [size + 1] where each bag begins in `out`; null: one key a bag
  Element* out;         // with `bags`, of the batch; otherwise of the feature

  void copy_run(size_t part, int64_t row, int64_t rows, int64_t done) const {
    const Column<Element>& from = columns[part];
    const int64_t begin = from.offsets ? from.offsets[row] : row, end = from.offsets ? from.offsets[row + rows] : row + rows;
    if (end > begin) {
      std::memcpy(out + (bags ? bags[done] : done), from.elements + begin, static_cast<size_t>(end - begin) * sizeof(Element));
    }
  }

  template <typename Place>
  void copy_list(const Place* list, int row_bits) const {
    const uint64_t mask = (uint64_t{1} << row_bits) - 1;
    if (!bags) {
      for (size_t i = 0; i < size; ++i) {
        const uint64_t place = list[i];
        out[i] = columns[place >> row_bits].elements[place & mask];
      }
      return;
    }
    for (size_t i = 0; i < size; ++i) {
      const uint64_t place = list[i], row = place & mask;
      const Column<Element>& from = columns[place >> row_bits];
      const Element* of_bag = from.elements + (from.offsets ? from.offsets[row] : static_cast<int64_t>(row));
      Element* to = out + bags[i];
      for (int64_t left = bags[i + 1] - bags[i]; left > 0; --left) *to++ = *of_bag++;
    }
  }

  // All rows lie in one chunk, as most do if blocks are as large as chunks.
  template <typename Place>
  void copy_list_of_one_part(const Place* list) const {
    const Element* const elements = columns[0].elements;
    for (size_t i = 0; i < size; ++i) out[i] = elements[list[i]];
  }
};

template <typename Element>
void JaggedBlock::cut_elements(const Element* JaggedColumn::*elements, const PlacesOfFeatures& places, size_t n,
                                size_t batch, const int64_t* offsets, const int64_t* starts, Element* out) const {
  std::vector<Column<Element>> columns(starts_.size());
  for (size_t f = 0; f < num_features_; ++f) {
    for (size_t p = 0; p < columns.size(); ++p) {
      const JaggedColumn& from = columns_[p * num_features_ + f];
      columns[p] = {from.*elements, from.offsets};
    }
    const bool absent = std::is_same_v<Element, float> && !columns.empty() && !columns[0].elements;
    if (!absent && !places[f]->is_run_ && static_cast<size_t>(num_rows_) * sizeof(Element) <= kCachedBytes) {
      for (size_t p = 0; p < columns.size(); ++p) {
        if (!columns[p].offsets) fetch(columns[p].elements + starts_[p], columns[p].elements + stops_[p]);
      }
    }
    for (size_t begin = 0, b = 0; begin < n; begin += batch, ++b) {
      const size_t size = std::min(batch, n - begin);
      const int64_t* const bags = offsets ? offsets + begin * num_features_ + b + f * size : nullptr;
      Element* const to = bags ? out + starts[b] : out + begin * num_features_ + f * size;
      const Cut<Element> cut{columns.data(), size, bags, to};
      if (absent) {
        std::fill_n(bags ? to + bags[0] : to, bags ? static_cast<size_t>(bags[size] - bags[0]) : size, Element{1});
      } else if (places[f]->is_run_) {
        each_run(places[f]->first_ + static_cast<int64_t>(begin), size,
                 [&](auto... run) { cut.copy_run(run...); });
      } else {
        with_list(*places[f], [&](const auto* list) {
          !bags && columns.size() == 1 ? cut.copy_list_of_one_part(list + begin) : cut.copy_list(list + begin, row_bits_);
        });
      }
    }
  }
}

void JaggedBlock::cut_values(const PlacesOfFeatures& places, size_t n, size_t batch, const int64_t* offsets,
                              const int64_t* starts, int64_t* out) const {
  cut_elements(&JaggedColumn::values, places, n, batch, offsets, starts, out);
}

void JaggedBlock::cut_weights(const PlacesOfFeatures& places, size_t n, size_t batch, const int64_t* offsets,
                               const int64_t* starts, float* out) const {
  cut_elements(&JaggedColumn::weights, places, n, batch, offsets, starts, out);
}

namespace {

constexpr size_t kRowsAhead = 16;

// Copies of one size: by words of 16 bytes, the last of which may overlap, or bytewise if it is smaller.
inline void copy_row(const char* from, size_t bytes, char* to) {
  if (bytes < 16) {
    for (size_t k = 0; k < bytes; k += 4) std::memcpy(to + k, from + k, 4);
    return;
  }
  for (size_t k = 0; k + 16 < bytes; k += 16) std::memcpy(to + k, from + k, 16);
  std::memcpy(to + bytes - 16, from + bytes - 16, 16);
}

}  // namespace

void JaggedBlock::take(const Places& places, const std::vector<const char*>& parts, size_t row_bytes,
                        char* out) const {
  if (places.is_run_) {
    each_run(places.first_, places.n_, [&](size_t part, int64_t row, int64_t rows, int64_t done) {
      std::memcpy(out + static_cast<size_t>(done) * row_bytes, parts[part] + static_cast<size_t>(row) * row_bytes,
                  static_cast<size_t>(rows) * row_bytes);
    });
    return;
  }
  with_list(places, [&](const auto* list) {
    const uint64_t mask = (uint64_t{1} << row_bits_) - 1;
    const auto source = [&](size_t i) {
      const uint64_t place = list[i];
      return parts[place >> row_bits_] + (place & mask) * row_bytes;
    };
    for (size_t i = 0; i < places.n_; ++i) {
      if (i + kRowsAhead < places.n_) {
        const char* const ahead = source(i + kRowsAhead);
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + row_bytes - 1);
      }
      copy_row(source(i), row_bytes, out + i * row_bytes);
    }
  });
}

}  // namespace penstock
