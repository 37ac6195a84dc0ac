#include "snappy.h"

#include <cstring>

namespace penstock {
namespace {

// In pieces of 16 bytes, which may go beyond the end; source and target are at least as far apart.
void copy_pieces(const uint8_t* from, size_t size, uint8_t* to) {
  for (size_t done = 0; done < size; done += 16) std::memcpy(to + done, from + done, 16);
}

// `size` bytes that begin `distance` before `to`, and may reach into what they write.
void repeat(uint8_t* to, size_t distance, size_t size, const uint8_t* end) {
  const uint8_t* const from = to - distance;
  if (distance >= 16 && static_cast<size_t>(end - to) >= size + 16) return copy_pieces(from, size, to);
  for (size_t i = 0; i < size; ++i) to[i] = from[i];
}

// A number of `bytes` bytes, the lowest first. False: there are fewer.
bool read_number(const uint8_t** at, const uint8_t* end, size_t bytes, size_t* number) {
  if (static_cast<size_t>(end - *at) < bytes) return false;
  *number = 0;
  for (size_t b = 0; b < bytes; ++b) *number |= static_cast<size_t>((*at)[b]) << (8 * b);
  *at += bytes;
  return true;
}

bool read_size(const uint8_t** at, const uint8_t* end, size_t* size) {
  *size = 0;
  for (int shift = 0; shift <= 28; shift += 7) {
    if (*at == end) return false;
    const uint8_t part = *(*at)++;
    *size |= static_cast<size_t>(part & 0x7f) << shift;
    if (!(part & 0x80)) return true;
  }
  return false;
}

}  // namespace

bool uncompress_snappy(const uint8_t* block, size_t block_size, uint8_t* out, size_t out_size) {
  const uint8_t *at = block, *const end = block + block_size;
  uint8_t *to = out, *const out_end = out + out_size;
  size_t stated;
  if (!read_size(&at, end, &stated) || stated != out_size) return false;
  while (at < end) {
    const uint8_t tag = *at++;
    size_t size = tag >> 2;
    if ((tag & 3) == 0) {
      // Sizes from 61 on stand behind the tag.
      if (size >= 60 && !read_number(&at, end, size - 59, &size)) return false;
      ++size;
      if (size > static_cast<size_t>(end - at) || size > static_cast<size_t>(out_end - to)) return false;
      const bool roomy = size <= 64 && end - at >= 80 && out_end - to >= 80;
      roomy ? copy_pieces(at, size, to) : static_cast<void>(std::memcpy(to, at, size));
      at += size;
    } else {
      size_t distance;
      if ((tag & 3) == 1) {
        if (!read_number(&at, end, 1, &distance)) return false;
        distance |= static_cast<size_t>(tag >> 5) << 8;
        size = 4 + (size & 7);
      } else {
        if (!read_number(&at, end, (tag & 3) == 2 ? 2 : 4, &distance)) return false;
        ++size;
      }
      if (distance == 0 || distance > static_cast<size_t>(to - out) || size > static_cast<size_t>(out_end - to)) return false;
      repeat(to, distance, size, out_end);
    }
    to += size;
  }
  return to == out_end;
}

}  // namespace penstock
