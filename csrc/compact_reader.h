// Thrift's compact protocol, as far as Parquet's headers and footers need it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace penstock {

// Structs, lists and numbers of the protocol; of a damaged one, what lies within its bytes.
class CompactReader {
 public:
  CompactReader(const uint8_t* at, const uint8_t* end) : at_(at), end_(end) {}

  bool ok() const { return ok_; }
  const uint8_t* at() const { return at_; }

  enum Type : uint8_t { kStop, kTrue, kFalse, kByte, kI16, kI32, kI64, kDouble, kBinary, kList, kSet, kMap, kStruct, kUuid };

  // Calls visit(id, type) for every field of a struct; what it does not read (false) is skipped.
  template <typename Visit>
  void read_struct(Visit visit, int depth = 0) {
    int64_t id = 0;
    while (ok_) {
      const uint8_t head = byte();
      const auto type = static_cast<Type>(head & 15);
      if (!ok_ || type == kStop) return;
      id = head >> 4 ? id + (head >> 4) : static_cast<int16_t>(integer());
      if (!visit(id, type)) skip(type, depth);
    }
  }

  // Calls visit(index, type) for every element of a list, which must read it or skip it; skips what is no list.
  template <typename Visit>
  void read_list(Type type, Visit visit) {
    if (type != kList) return skip(type);
    const auto [of, size] = list_head();
    // Parquet has no lists of truth values.
    ok_ = ok_ && of != kTrue && of != kFalse;
    for (uint64_t i = 0; ok_ && i < size; ++i) visit(i, of);
  }

  // Reads an integer; false: it is none.
  bool read(Type type, int64_t* value) {
    if (type != kI16 && type != kI32 && type != kI64) return false;
    *value = integer();
    return true;
  }

  bool read(Type type, int32_t* value) {
    if (type != kI32 && type != kI16) return false;
    *value = static_cast<int32_t>(integer());
    return true;
  }

  static bool read(Type type, bool* value) {
    if (type != kTrue && type != kFalse) return false;
    *value = type == kTrue;
    return true;
  }

  void skip(Type type, int depth = 0) {
    switch (type) {
      case kTrue: case kFalse: return;
      case kByte: return advance(1);
      case kI16: case kI32: case kI64: integer(); return;
      case kDouble: return advance(8);
      case kUuid: return advance(16);
      case kBinary: return advance(varint());
      case kStruct:
        if (depth < kDeepest) return read_struct([](int64_t, Type) { return false; }, depth + 1);
        break;
      case kList: case kSet:
        if (depth < kDeepest) return skip_list(depth + 1);
        break;
      default: break;  // Parquet has no maps
    }
    ok_ = false;
  }

 private:
  static constexpr int kDeepest = 16;  // of structs and lists

  uint8_t byte() {
    if (at_ == end_) ok_ = false;
    return ok_ ? *at_++ : 0;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const uint8_t part = byte();
      value |= static_cast<uint64_t>(part & 0x7f) << shift;
      if (!(part & 0x80)) return value;
    }
    ok_ = false;
    return 0;
  }

  int64_t integer() {
    const uint64_t zigzag = varint();
    return static_cast<int64_t>(zigzag >> 1 ^ (0 - (zigzag & 1)));
  }

  void advance(uint64_t bytes) {
    ok_ = ok_ && bytes <= static_cast<uint64_t>(end_ - at_);
    if (ok_) at_ += bytes;
  }

  std::pair<Type, uint64_t> list_head() {
    const uint8_t head = byte();
    return {static_cast<Type>(head & 15), head >> 4 == 15 ? varint() : head >> 4};
  }

  void skip_list(int depth) {
    const auto [of, size] = list_head();
    // Within a list a truth value has a byte, so that each element has one at least.
    const bool is_byte = of == kTrue || of == kFalse;
    for (uint64_t i = 0; ok_ && i < size; ++i) is_byte ? advance(1) : skip(of, depth);
  }

  const uint8_t *at_, *end_;
  bool ok_ = true;
};

}  // namespace penstock
