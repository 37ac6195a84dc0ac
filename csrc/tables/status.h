// What a call to a store ends with.
#pragma once

namespace penstock {

enum class Status {
  kOk,
  kOutOfMemory,   // the system gave no memory for rows; what was done before stays done
  kNoWorkingMemory,  // nor for what a call needs on its way; rows that it made stay
  kNoThreads,        // the system starts no more of them
  kHalfUpdated,      // no working memory when some rows had taken the step already
  kTooManyRows,   // 2^32 - 1 rows in one store
  kStaleCursor,   // the store changed while it was exported
  kBadOffsets,    // offsets do not rise from 0 to the number of keys
  kBadWeights,    // a weight is not finite
  kBagTooLong,    // a sequence has fewer positions than a bag has keys
  kIndexFull,     // internal: grow the index and go on
  kOverBudget,    // a table holds fewer rows than it was told to take
};

}  // namespace penstock
