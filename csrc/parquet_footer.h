// Where the column chunks of a Parquet file lie, of its footer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace penstock {

struct ColumnChunk {
  // -1: not said, as of chunks that are encrypted or lie in another file.
  int64_t num_values = -1, data_page = -1, dictionary_page = -1, bytes = -1, codec = -1;
  int64_t encodings = 0;  // a bit for the number of each, the highest for those from 62 on
};

// Chunks of some columns in all row groups: [row groups, wanted]. `wanted`: their numbers among the columns that have
// values, ascending. False: the footer is damaged, or a row group lacks one of them.
bool parse_column_chunks(const uint8_t* footer, size_t size, const std::vector<int64_t>& wanted,
                         std::vector<ColumnChunk>* chunks);

}  // namespace penstock
