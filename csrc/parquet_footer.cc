#include "parquet_footer.h"

#include <algorithm>

#include "compact_reader.h"

namespace penstock {
namespace {

using Type = CompactReader::Type;

// FORMAT: here and below, numbers of the fields in parquet.thrift; never change.
void read_metadata(CompactReader* from, ColumnChunk* chunk) {
  from->read_struct([&](int64_t id, Type type) {
    switch (id) {
      case 2:
        from->read_list(type, [&](uint64_t, Type of) {
          int64_t encoding;
          if (!from->read(of, &encoding)) return from->skip(of);
          chunk->encodings |= int64_t{1} << (encoding >= 0 ? std::min<int64_t>(encoding, 62) : 62);
        });
        return true;
      case 4: return from->read(type, &chunk->codec);
      case 5: return from->read(type, &chunk->num_values);
      case 7: return from->read(type, &chunk->bytes);
      case 9: return from->read(type, &chunk->data_page);
      case 11: return from->read(type, &chunk->dictionary_page);
      default: return false;
    }
  });
}

ColumnChunk read_chunk(CompactReader* from, Type type) {
  ColumnChunk chunk;
  bool elsewhere = false;
  if (type != CompactReader::kStruct) {
    from->skip(type);
    return chunk;
  }
  from->read_struct([&](int64_t id, Type of) {
    // A path of another file; how the chunk is encrypted.
    elsewhere = elsewhere || id == 1 || id == 8 || id == 9;
    if (id != 3 || of != CompactReader::kStruct) return false;
    read_metadata(from, &chunk);
    return true;
  });
  return elsewhere ? ColumnChunk() : chunk;
}

}  // namespace

bool parse_column_chunks(const uint8_t* footer, size_t size, const std::vector<int64_t>& wanted,
                         std::vector<ColumnChunk>* chunks) {
  CompactReader from(footer, footer + size);
  bool complete = true;
  const auto read_group = [&](uint64_t, Type type) {
    if (type != CompactReader::kStruct) return from.skip(type);
    size_t found = 0;
    from.read_struct([&](int64_t id, Type of) {
      if (id != 1) return false;
      from.read_list(of, [&](uint64_t column, Type kind) {
        if (found == wanted.size() || static_cast<uint64_t>(wanted[found]) != column) return from.skip(kind);
        chunks->push_back(read_chunk(&from, kind));
        ++found;
      });
      return true;
    });
    complete = complete && found == wanted.size();
  };
  from.read_struct([&](int64_t id, Type type) {
    if (id != 4) return false;
    from.read_list(type, read_group);
    return true;
  });
  return from.ok() && complete;
}

}  // namespace penstock
