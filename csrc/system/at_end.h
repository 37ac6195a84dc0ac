// Something that is done at the end of a scope.
#pragma once

#include <utility>

namespace penstock {

// Calls something at the end of a scope, however it is left.
template <typename Call>
class AtEnd {
 public:
  explicit AtEnd(Call call) : call_(std::move(call)) {}
  ~AtEnd() { call_(); }
  AtEnd(const AtEnd&) = delete;
  AtEnd& operator=(const AtEnd&) = delete;

 private:
  Call call_;
};

}  // namespace penstock
