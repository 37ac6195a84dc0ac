// The Snappy format (https://github.com/google/snappy/blob/main/format_description.txt), to uncompress blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

// False: the block is damaged, or is not one of `out_size` bytes; what `out` then holds is not said.
bool uncompress_snappy(const uint8_t* block, size_t block_size, uint8_t* out, size_t out_size);

}  // namespace penstock
