// Pages of flat Parquet columns, to plain arrays and bits of validity. Nothing is believed of a file: no length, count
// or index of a damaged one leads outside its bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

// FORMAT: numbers of parquet.thrift; never change.
enum class PageKind : int32_t { kData = 0, kIndex = 1, kDictionary = 2, kDataV2 = 3 };
enum class PageEncoding : int32_t { kPlain = 0, kPlainDictionary = 2, kRle = 3, kRleDictionary = 8 };

struct PageHeader {
  int32_t kind = -1, encoding = -1, num_values = -1;
  int32_t bytes = -1, plain_bytes = -1;  // of the page in the file, and when it is not compressed any more
  int32_t checksum = 0;
  bool has_checksum = false;
  int32_t level_encoding = static_cast<int32_t>(PageEncoding::kRle);
  // Second version alone: levels stand before the values, never compressed.
  int32_t level_bytes = 0, repetition_bytes = 0;
  bool is_compressed = true;
  size_t header_bytes = 0;
};

// Reads the header at the front of `bytes`, in Thrift's compact protocol. False: it is damaged.
bool parse_page_header(const uint8_t* bytes, size_t size, PageHeader* header);

// Runs of one value and runs of packed bits, mixed: levels and indices into a dictionary.
class HybridRuns {
 public:
  HybridRuns() = default;
  HybridRuns(const uint8_t* begin, const uint8_t* end, int bit_width);  // bit_width <= 32

  // The next n values. False: there are fewer.
  bool read(size_t n, uint32_t* out);
  // The next n values of one bit each, as bits from the lowest of `out[0]` on, which is zeroed, with 8 bytes to spare.
  bool read_bits(size_t n, uint8_t* out);

 private:
  bool begin_run();

  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int bit_width_ = 0;
  size_t left_ = 0;  // of the run
  bool is_packed_ = false;
  uint32_t value_ = 0;
  const uint8_t *packed_ = nullptr, *packed_end_ = nullptr;
  size_t packed_at_ = 0;  // of the run, in values
};

// Values of the pages of one column chunk, in order, as words of 4 or 8 bytes. Copies no page.
class PageDecoder {
 public:
  // `optional`: rows may be null, so that pages have definition levels of one bit.
  PageDecoder(size_t word_bytes, bool optional) : word_bytes_(word_bytes), optional_(optional) {}

  // Takes `num_values` plain values as the dictionary of what follows. False: the page is damaged.
  bool set_dictionary(const uint8_t* bytes, size_t size, size_t num_values);

  // Goes to the next data page, of either version; its bytes are not compressed any more. Of the second, `levels` are the
  // definition levels that stand before the values. False: it is damaged.
  bool set_page(const PageHeader& header, const uint8_t* levels, size_t level_bytes, const uint8_t* bytes, size_t size);

  // Values of the page that have not been read.
  size_t left() const { return left_; }

  // The next n values, n <= left(), 0 where they are null. False: the page is damaged.
  bool read(size_t n, void* out,     // [n]
            uint8_t* valid,          // if optional: bits, from `first_bit` on, that are 0 and become 1 where no null is
            size_t first_bit,
            size_t* num_nulls);      // to which is added

 private:
  template <typename Word>
  bool read_words(size_t n, Word* out, uint8_t* valid, size_t first_bit, size_t* num_nulls);
  template <typename Word>
  bool read_dense(size_t n, Word* out);

  size_t word_bytes_;
  bool optional_;
  const uint8_t* dictionary_ = nullptr;
  size_t dictionary_size_ = 0;
  size_t left_ = 0;
  bool by_index_ = false;
  HybridRuns levels_, indices_;
  const uint8_t *plain_ = nullptr, *plain_end_ = nullptr;
};

}  // namespace penstock
