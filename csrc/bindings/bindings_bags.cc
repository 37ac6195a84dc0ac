// Pooling of rows that are in no store, for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "bindings/bindings.h"
#include "store/bag_sums.h"
#include "store/shared_plan.h"

namespace penstock {
namespace {

using Plan = std::shared_ptr<const SharedPlan>;

// A batch whose keys have rows by number.
struct Bags {
  In<int64_t> offsets;
  std::optional<In<float>> weights;
  int64_t batch_size;
  In<uint32_t> numbers;

  // Checked: offsets rise from 0 to the number of keys, sequences hold their bags, and all numbers that are read are below
  // `rows`.
  PackedKeys of(const Plan& plan, uint32_t dim, size_t rows) const {
    check(plan != nullptr && !plan->is_by_key(), "plan: none, or by key");
    check(offsets.size() > 0 && batch_size >= 0, "offsets: expected features * batch_size + 1");
    const int64_t bags = static_cast<int64_t>(offsets.size()) - 1, keys = static_cast<int64_t>(numbers.size());
    check(batch_size == 0 ? bags == 0 : bags % batch_size == 0, "offsets: expected features * batch_size + 1");
    check(!weights || weights->size() == numbers.size(), "weights: expected one a key");
    const int64_t* const ends = offsets.data();
    check(ends[0] == 0 && ends[bags] == keys && std::is_sorted(ends, ends + bags + 1),
          "offsets: must rise from 0 to the number of keys");
    static const float kNoWeight = 1;  // an empty array may have no address, which would read as no weights
    const int64_t features = batch_size == 0 ? 0 : bags / batch_size;
    const PackedKeys batch{nullptr, ends, batch_size, features, keys,
                           !weights ? nullptr : weights->size() ? weights->data() : &kNoWeight};
    const int64_t most = batch_size == 0 ? std::numeric_limits<int64_t>::max() : features;
    check(plan->fits(most, std::numeric_limits<uint32_t>::max(), dim), "plan: not of this batch");
    const PoolingPlan view = plan->view();
    for (int64_t f = 0; batch_size != 0 && f < view.num_features; ++f) {
      const int64_t first_bag = batch.first_bag(view, f);
      for (int64_t bag = first_bag; bag < first_bag + batch_size; ++bag) {
        check(view.pooling[f] != Pooling::kSequence || ends[bag + 1] - ends[bag] <= view.max_keys[f],
              "offsets: a bag is longer than its sequence");
      }
      const uint32_t* const first = numbers.data() + ends[first_bag];
      check(std::all_of(first, first + batch.count(view, f), [rows](uint32_t number) { return number < rows; }),
            "numbers: beyond the rows");
    }
    return batch;
  }
};

}  // namespace

void bind_bag_sums(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<BagSums>(m, "BagSums")
      .def(
          "__init__",
          [](BagSums* self, uint32_t dim, int num_threads) {
            check(dim >= 1 && dim <= kMostDim, "dim: out of range");
            check(num_threads >= 1, "num_threads: at least 1");
            new (self) BagSums(dim, num_threads);
          },
          "dim"_a, "num_threads"_a)
      .def(
          "pool",
          [](BagSums& self, const Plan& plan, In<int64_t> offsets, std::optional<In<float>> weights, int64_t batch_size,
             In<uint32_t> numbers, InRows rows, OutRows out) {
            check_rows(rows, rows.shape(0), self.dim(), "rows: expected [n, dim]");
            const PackedKeys batch = Bags{offsets, weights, batch_size, numbers}.of(plan, self.dim(), rows.shape(0));
            check_rows(out, static_cast<size_t>(batch_size), static_cast<size_t>(plan->view().stride),
                       "out: expected [B, stride]");
            const nb::gil_scoped_release release;
            if (batch_size != 0) self.pool(plan->view(), batch, numbers.data(), rows.data(), out.data());
          },
          "plan"_a, "offsets"_a.noconvert(), "weights"_a.noconvert().none(), "batch_size"_a, "numbers"_a.noconvert(),
          "rows"_a.noconvert(), "out"_a.noconvert())
      .def(
          "sum",
          [](BagSums& self, const Plan& plan, In<int64_t> offsets, std::optional<In<float>> weights, int64_t batch_size,
             In<uint32_t> numbers, InRows grad, OutRows sums) {
            check_rows(sums, sums.shape(0), self.dim(), "sums: expected [n, dim]");
            const PackedKeys batch = Bags{offsets, weights, batch_size, numbers}.of(plan, self.dim(), sums.shape(0));
            check_rows(grad, static_cast<size_t>(batch_size), static_cast<size_t>(plan->view().stride),
                       "grad: expected [B, stride]");
            const nb::gil_scoped_release release;
            const int64_t count = static_cast<int64_t>(sums.shape(0));
            if (count != 0) self.sum(plan->view(), batch, numbers.data(), grad.data(), count, sums.data());
          },
          "plan"_a, "offsets"_a.noconvert(), "weights"_a.noconvert().none(), "batch_size"_a, "numbers"_a.noconvert(),
          "grad"_a.noconvert(), "sums"_a.noconvert());
}

}  // namespace penstock
