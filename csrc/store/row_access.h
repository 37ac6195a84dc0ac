// The verbs that name rows one by one: find, insert, erase, export.
#pragma once

#include <cstdint>
#include <vector>

#include "retention/key_lists.h"
#include "store/insertion.h"
#include "tables/key_finder.h"

namespace penstock {

// Rows of keys that are found, [n, ...].
struct FoundRows {
  float* values;
  float* state;
  bool* found;  // the row was there before the call
};

// Rows that are given, [n, ...].
struct GivenRows {
  ValueType type;  // of the values: the store's, or fp32
  const void* values;
  const float* state;
  const int64_t* usage;  // null: used now, never before
};

// Part of an export: from where on, and where to.
struct ExportedRows {
  uint64_t cursor;  // 0 at first; moved on
  int64_t most;
  int64_t* keys;  // [most], like all below
  void* values;   // in the store's type
  float* state;
  int64_t* usage;
  int64_t number = 0;  // of rows that were copied
};
struct ExportedCounts {
  uint64_t cursor;
  int64_t most;
  int64_t* keys;
  int64_t* counts;
  int64_t number = 0;
};
constexpr uint64_t kExported = ~uint64_t{0};  // a cursor behind the last row

class RowAccess {
 public:
  RowAccess(KeyedRows& rows, KeyFinder& finder, Insertion& insertion, KeyLists& lists, Clock& clock)
      : rows_(rows), finder_(finder), insertion_(insertion), lists_(lists), clock_(clock) {}

  // See HostStore.
  Status find(uint32_t table, const int64_t* keys, int64_t count, bool insert, const FoundRows& out);
  Status assign(uint32_t table, const int64_t* keys, int64_t count, const GivenRows& given, int64_t* inserted);
  Status erase(uint32_t table, const int64_t* keys, int64_t count, int64_t* erased);
  void export_rows(uint32_t table, ExportedRows* out);
  void export_counts(uint32_t table, ExportedCounts* out);

 private:
  enum class Insert { kNever, kAdmitted, kAll };
  Status locate(uint32_t table, const int64_t* keys, int64_t count, Insert insert, std::vector<uint32_t>* slots);

  KeyedRows& rows_;
  KeyFinder& finder_;
  Insertion& insertion_;
  KeyLists& lists_;
  Clock& clock_;
};

}  // namespace penstock
