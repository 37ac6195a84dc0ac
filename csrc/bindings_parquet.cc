// Reading Parquet columns in Python. The interpreter lock is released while values are decoded.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "parquet_pages.h"

namespace penstock {

using namespace nb::literals;

namespace {

void check(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

// The values of a column, chunk after chunk. Keeps the pages alive that it reads, but neither function: they may hold
// the reader itself.
class PyColumnReader {
 public:
  using Values = std::tuple<NewArray<uint8_t>, std::optional<NewArray<uint8_t>>, size_t>;

  PyColumnReader(size_t word_bytes, bool optional)
      : word_bytes_(word_bytes), optional_(optional), decoder_(word_bytes, optional) {
    check(word_bytes == 4 || word_bytes == 8, "word_bytes: must be 4 or 8");
  }

  Values read(size_t n, const nb::callable& next_chunk, const nb::callable& open_page) {
    uint8_t *out, *valid = nullptr;
    NewArray<uint8_t> out_values = make_array(n * word_bytes_, &out);
    std::optional<NewArray<uint8_t>> out_valid;
    if (optional_) {
      out_valid = make_array((n + 7) / 8, &valid);
      std::memset(valid, 0, (n + 7) / 8);
    }
    size_t num_nulls = 0;
    for (size_t done = 0; done < n;) {
      while (decoder_.left() == 0) {
        while (values_ahead_ == 0) set_chunk(next_chunk());
        next_page(open_page);
      }
      const size_t some = std::min(n - done, decoder_.left());
      bool good;
      {
        nb::gil_scoped_release unlocked;
        good = decoder_.read(some, out + done * word_bytes_, valid, done, &num_nulls);
      }
      check(good, "a page is damaged");
      done += some;
    }
    return {std::move(out_values), std::move(out_valid), num_nulls};
  }

 private:
  struct Page {
    nb::object owner;  // null: the chunk
    const uint8_t* data = nullptr;
    size_t size = 0;
  };

  void set_chunk(const nb::object& given) {
    const auto [bytes, num_values, is_plain] = nb::cast<std::tuple<nb::object, size_t, bool>>(given);
    const auto view = nb::cast<In<uint8_t>>(bytes);
    // The dictionary of one chunk says nothing of the next.
    decoder_ = PageDecoder(word_bytes_, optional_);
    chunk_ = {bytes, view.data(), view.size()};
    at_ = 0;
    values_ahead_ = num_values;
    is_plain_ = is_plain;
  }

  // Goes on to the next page of data, which may be empty.
  void next_page(const nb::callable& open_page) {
    PageHeader header;
    PageKind kind;
    do {
      const uint8_t* const begin = chunk_.data + at_;
      const size_t rest = chunk_.size - at_;
      check(rest > 0, "a column has fewer values than its row group");
      check(parse_page_header(begin, rest, &header), "the header of a page is damaged");
      const auto size = static_cast<size_t>(header.bytes);
      check(size <= rest - header.header_bytes, "a page goes beyond its column");
      at_ += header.header_bytes + size;
      kind = static_cast<PageKind>(header.kind);
      const uint8_t* const page = begin + header.header_bytes;
      if (kind == PageKind::kDictionary) {
        set_dictionary(header, page, open_page);
      } else if (kind == PageKind::kData || kind == PageKind::kDataV2) {
        set_page(header, page, open_page);
      }
    } while (kind != PageKind::kData && kind != PageKind::kDataV2);
  }

  void set_dictionary(const PageHeader& header, const uint8_t* page, const nb::callable& open_page) {
    dictionary_ = open(header, page, 0, open_page);
    const auto num_values = static_cast<size_t>(header.num_values);
    check(decoder_.set_dictionary(dictionary_.data, dictionary_.size, num_values), "a dictionary is damaged");
  }

  void set_page(const PageHeader& header, const uint8_t* page, const nb::callable& open_page) {
    const auto num_values = static_cast<size_t>(header.num_values);
    check(num_values <= values_ahead_, "a page has more values than its column");
    values_ahead_ -= num_values;
    const bool is_v2 = static_cast<PageKind>(header.kind) == PageKind::kDataV2;
    const size_t level_bytes = is_v2 ? static_cast<size_t>(header.level_bytes) : 0;
    check(header.level_bytes <= std::min(header.bytes, header.plain_bytes), "the levels of a page go beyond it");
    values_ = open(header, page, level_bytes, open_page);
    check(decoder_.set_page(header, page, level_bytes, values_.data, values_.size), "a page is damaged");
  }

  // The page without its first `skip` bytes, not compressed any more.
  Page open(const PageHeader& header, const uint8_t* page, size_t skip, const nb::callable& open_page) const {
    const auto size = static_cast<size_t>(header.bytes);
    if (is_plain_ && !header.has_checksum) return {nb::object(), page + skip, size - skip};
    std::optional<uint32_t> checksum;
    if (header.has_checksum) checksum = static_cast<uint32_t>(header.checksum);
    std::optional<int64_t> plain_bytes;
    if (!is_plain_ && header.is_compressed) plain_bytes = header.plain_bytes - static_cast<int64_t>(skip);
    const nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> given(page, {size}, chunk_.owner);
    nb::object opened = open_page(given, skip, plain_bytes, checksum);
    const auto view = nb::cast<In<uint8_t>>(opened);
    return {std::move(opened), view.data(), view.size()};
  }

  const size_t word_bytes_;
  const bool optional_;
  PageDecoder decoder_;
  Page chunk_, dictionary_, values_;
  size_t at_ = 0;            // of the next page in the chunk
  size_t values_ahead_ = 0;  // of the chunk, in pages after this one
  bool is_plain_ = true;     // the chunk is not compressed
};

}  // namespace

void bind_parquet(nb::module_& m) {
  nb::class_<PyColumnReader>(m, "ColumnReader")
      .def(nb::init<size_t, bool>(), "word_bytes"_a, "optional"_a)
      .def("read", &PyColumnReader::read, "n"_a, "next_chunk"_a, "open_page"_a);
}

}  // namespace penstock
