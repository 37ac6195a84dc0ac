// Column functions of the data plane: plain arrays in, plain arrays out, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

// XXH64 of `size` bytes. FORMAT: never change; keys of saved tables depend on it.
uint64_t xxh64(const void* data, size_t size, uint64_t seed);

}  // namespace penstock
