// Reading Parquet columns in Python. The interpreter lock is released while values are decoded.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "buffer_pool.h"
#include "parquet_footer.h"
#include "parquet_pages.h"
#include "snappy.h"

namespace penstock {

using namespace nb::literals;

namespace {

void check(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

// FORMAT: as `next_chunk` gives it.
enum class Codec : int { kNone = 0, kSnappy = 1, kOther = 2 };

// Snappy makes at most 64 bytes of 3.
constexpr size_t kMostExpansion = 64;

// The values of a column, chunk after chunk. Keeps the pages alive that it reads, but neither function: they may hold
// the reader itself. The interpreter is needed for them alone.
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
    {
      nb::gil_scoped_release unlocked;
      for (size_t done = 0; done < n;) {
        while (decoder_.left() == 0) {
          while (values_ahead_ == 0) set_chunk(next_chunk);
          next_page(open_page);
        }
        const size_t some = std::min(n - done, decoder_.left());
        check(decoder_.read(some, out + done * word_bytes_, valid, done, &num_nulls), "a page is damaged");
        done += some;
      }
    }
    return {std::move(out_values), std::move(out_valid), num_nulls};
  }

 private:
  struct Bytes {
    const uint8_t* data = nullptr;
    size_t size = 0;
  };

  // What a page is when it is open. Only the one in use has a meaning.
  struct OpenPage {
    nb::object of_python;
    std::unique_ptr<BufferPool::Loan> of_core;
  };

  void set_chunk(const nb::callable& next_chunk) {
    const nb::gil_scoped_acquire locked;
    const auto [bytes, num_values, codec] = nb::cast<std::tuple<nb::object, size_t, int>>(next_chunk());
    const auto view = nb::cast<In<uint8_t>>(bytes);
    // The dictionary of one chunk says nothing of the next.
    decoder_ = PageDecoder(word_bytes_, optional_);
    chunk_owner_ = bytes;
    chunk_ = {view.data(), view.size()};
    at_ = 0;
    values_ahead_ = num_values;
    codec_ = static_cast<Codec>(codec);
  }

  // Goes on to the next page of data, which may be empty.
  void next_page(const nb::callable& open_page) {
    PageHeader header;
    PageKind kind;
    do {
      const uint8_t* const begin = chunk_.data + at_;
      const size_t rest = chunk_.size - at_;
      header = PageHeader();
      check(rest > 0, "a column has fewer values than its row group");
      check(parse_page_header(begin, rest, &header), "the header of a page is damaged");
      const auto size = static_cast<size_t>(header.bytes);
      check(size <= rest - header.header_bytes, "a page goes beyond its column");
      at_ += header.header_bytes + size;
      kind = static_cast<PageKind>(header.kind);
      const uint8_t* const page = begin + header.header_bytes;
      if (kind == PageKind::kDictionary) {
        const Bytes values = open(header, page, 0, open_page, &dictionary_);
        const auto num_values = static_cast<size_t>(header.num_values);
        check(decoder_.set_dictionary(values.data, values.size, num_values), "a dictionary is damaged");
      } else if (kind == PageKind::kData || kind == PageKind::kDataV2) {
        set_page(header, page, open_page);
      }
    } while (kind != PageKind::kData && kind != PageKind::kDataV2);
  }

  void set_page(const PageHeader& header, const uint8_t* page, const nb::callable& open_page) {
    const auto num_values = static_cast<size_t>(header.num_values);
    check(num_values <= values_ahead_, "a page has more values than its column");
    values_ahead_ -= num_values;
    const bool is_v2 = static_cast<PageKind>(header.kind) == PageKind::kDataV2;
    const size_t level_bytes = is_v2 ? static_cast<size_t>(header.level_bytes) : 0;
    check(header.level_bytes <= std::min(header.bytes, header.plain_bytes), "the levels of a page go beyond it");
    const Bytes values = open(header, page, level_bytes, open_page, &values_);
    check(decoder_.set_page(header, page, level_bytes, values.data, values.size), "a page is damaged");
  }

  // The page without its first `skip` bytes, not compressed any more.
  Bytes open(const PageHeader& header, const uint8_t* page, size_t skip, const nb::callable& open_page,
             OpenPage* opened) const {
    const size_t size = static_cast<size_t>(header.bytes) - skip;
    const size_t plain_size = static_cast<size_t>(header.plain_bytes) - skip;
    const bool is_compressed = codec_ != Codec::kNone && header.is_compressed;
    if (header.has_checksum || (is_compressed && codec_ == Codec::kOther)) {
      const nb::gil_scoped_acquire locked;
      std::optional<uint32_t> checksum;
      if (header.has_checksum) checksum = static_cast<uint32_t>(header.checksum);
      std::optional<size_t> to_uncompress;
      if (is_compressed) to_uncompress = plain_size;
      const nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> given(page, {size + skip}, chunk_owner_);
      opened->of_python = open_page(given, skip, to_uncompress, checksum);
      const auto view = nb::cast<In<uint8_t>>(opened->of_python);
      return {view.data(), view.size()};
    }
    if (!is_compressed) return {page + skip, size};
    check(plain_size / kMostExpansion <= size, "a page is damaged");
    if (!opened->of_core || opened->of_core->region.committed() < plain_size) {
      opened->of_core.reset();
      opened->of_core = array_pool().take(plain_size);
      if (!opened->of_core) throw std::bad_alloc();
    }
    auto* const out = reinterpret_cast<uint8_t*>(opened->of_core->region.data());
    check(uncompress_snappy(page + skip, size, out, plain_size), "a compressed page is damaged");
    return {out, plain_size};
  }

  const size_t word_bytes_;
  const bool optional_;
  PageDecoder decoder_;
  nb::object chunk_owner_;
  Bytes chunk_;
  OpenPage dictionary_, values_;
  size_t at_ = 0;            // of the next page in the chunk
  size_t values_ahead_ = 0;  // of the chunk, in pages after this one
  Codec codec_ = Codec::kNone;
};

// [row groups, wanted, 6], see _core.pyi.
nb::ndarray<nb::numpy, int64_t, nb::ndim<3>> py_column_chunks(In<uint8_t> footer, const std::vector<int64_t>& wanted) {
  std::vector<ColumnChunk> chunks;
  check(!wanted.empty() && parse_column_chunks(footer.data(), footer.size(), wanted, &chunks), "the footer is damaged");
  auto [data, owner] = make_memory<int64_t>(chunks.size() * 6);
  int64_t* field = data;
  for (const ColumnChunk& chunk : chunks) {
    for (const int64_t value : {chunk.num_values, chunk.data_page, chunk.dictionary_page, chunk.bytes, chunk.codec, chunk.encodings}) {
      *field++ = value;
    }
  }
  return {data, {chunks.size() / wanted.size(), wanted.size(), 6}, owner};
}

}  // namespace

void bind_parquet(nb::module_& m) {
  m.def("column_chunks", &py_column_chunks, "footer"_a, "wanted"_a);
  m.def(
      "uncompress_snappy",
      [](In<uint8_t> block, size_t size) {
        uint8_t* out;
        auto plain = make_array(size, &out);
        check(uncompress_snappy(block.data(), block.size(), out, size), "a compressed block is damaged");
        return plain;
      },
      "block"_a, "size"_a);
  nb::class_<PyColumnReader>(m, "ColumnReader")
      .def(nb::init<size_t, bool>(), "word_bytes"_a, "optional"_a)
      .def("read", &PyColumnReader::read, "n"_a, "next_chunk"_a, "open_page"_a);
}

}  // namespace penstock
