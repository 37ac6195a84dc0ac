// Pooling of rows that are in no store, for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "index/grouped_keys.h"
#include "bags/bag_parts.h"
#include "bags/bag_sums.h"
#include "store/shared_plan.h"

namespace penstock {
namespace {

using Plan = std::shared_ptr<const SharedPlan>;

// A batch whose keys have rows by number: copies, checked once, so that nobody can change them afterwards.
struct NumberedBags {
  Plan plan;
  std::vector<int64_t> offsets;
  std::vector<float> weights;
  std::vector<uint32_t> numbers;
  int64_t batch_size;
  bool is_weighted;
  size_t rows;
  uint32_t dim;

  PackedKeys keys() const {
    const int64_t bags = static_cast<int64_t>(offsets.size()) - 1;
    static const float kNoWeight = 1;  // an empty array may have no address, which would read as no weights
    const float* const given = weights.empty() ? &kNoWeight : weights.data();
    return {nullptr, offsets.data(), batch_size, batch_size == 0 ? 0 : bags / batch_size, static_cast<int64_t>(numbers.size()),
            is_weighted ? given : nullptr};
  }

  // Offsets rise from 0 to the number of keys, sequences hold their bags, and all numbers that are read are below `rows`.
  void check_all() const {
    check(plan != nullptr && !plan->is_by_key(), "plan: none, or by key");
    check(!offsets.empty() && batch_size >= 0, "offsets: expected features * batch_size + 1");
    const int64_t bags = static_cast<int64_t>(offsets.size()) - 1;
    check(batch_size == 0 ? bags == 0 : bags % batch_size == 0, "offsets: expected features * batch_size + 1");
    check(!is_weighted || weights.size() == numbers.size(), "weights: expected one a key");
    check(offsets.front() == 0 && offsets.back() == static_cast<int64_t>(numbers.size()) &&
              std::is_sorted(offsets.begin(), offsets.end()),
          "offsets: must rise from 0 to the number of keys");
    const PackedKeys batch = keys();
    const int64_t most = batch_size == 0 ? std::numeric_limits<int64_t>::max() : batch.num_features;
    check(plan->fits(most, std::numeric_limits<uint32_t>::max(), dim), "plan: not of this batch");
    const PoolingPlan view = plan->view();
    for (int64_t f = 0; batch_size != 0 && f < view.num_features; ++f) {
      const int64_t first_bag = batch.first_bag(view, f);
      for (int64_t bag = first_bag; view.pooling[f] == Pooling::kSequence && bag < first_bag + batch_size; ++bag) {
        check(offsets[bag + 1] - offsets[bag] <= view.max_keys[f], "offsets: a bag is longer than its sequence");
      }
      const uint32_t* const first = numbers.data() + offsets[first_bag];
      check(std::all_of(first, first + batch.count(view, f), [this](uint32_t number) { return number < rows; }),
            "numbers: beyond the rows");
    }
  }
};

// A vector as an array of numpy's, without a copy.
nb::object as_array(std::vector<int64_t> values) {
  auto* const held = new std::vector<int64_t>(std::move(values));
  nb::capsule owner(held, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  const size_t shape[1] = {held->size()};
  return nb::cast(nb::ndarray<nb::numpy, int64_t>(held->data(), 1, shape, owner));
}

// Offsets that nobody can change afterwards: they rise from 0 to the number of keys, and hold all features of the plan.
std::vector<int64_t> checked_offsets(const SharedPlan& plan, const In<int64_t>& given, size_t keys, int64_t batch_size, uint32_t dim) {
  std::vector<int64_t> offsets(given.data(), given.data() + given.size());
  check(batch_size >= 1 && !offsets.empty(), "offsets: expected features * batch_size + 1");
  const int64_t bags = static_cast<int64_t>(offsets.size()) - 1;
  check(bags % batch_size == 0, "offsets: expected features * batch_size + 1");
  check(offsets.front() == 0 && offsets.back() == static_cast<int64_t>(keys) && std::is_sorted(offsets.begin(), offsets.end()),
        "offsets: must rise from 0 to the number of keys");
  check(!plan.is_by_key() && plan.fits(bags / batch_size, std::numeric_limits<uint32_t>::max(), dim), "plan: not of this batch");
  return offsets;
}

int length_bytes_of(const PoolingPlan& plan, const PackedKeys& batch) {
  int64_t longest = 0;
  for (int64_t f = 0; f < plan.num_features; ++f) {
    const int64_t first = batch.first_bag(plan, f);
    for (int64_t b = 0; b < batch.batch_size; ++b) longest = std::max(longest, batch.begin(first + b + 1) - batch.begin(first + b));
  }
  return longest < 1 << 8 ? 1 : longest < 1 << 16 ? 2 : 4;
}

// How many features each rank serves: their places rise, and none is left out that it may have rows of.
std::vector<int64_t> served_counts(const In<int64_t>& places, int64_t num_ranks, int64_t features, const In<int64_t>& of_table,
                                   const PoolingPlan& plan) {
  check(places.size() == static_cast<size_t>(num_ranks * features), "places: expected one a rank and feature");
  std::vector<int64_t> counts(num_ranks);
  for (int64_t r = 0; r < num_ranks; ++r) {
    for (int64_t f = 0; f < features; ++f) {
      const int64_t place = places.data()[r * features + f], whole = of_table.data()[plan.table[f]];
      check(place == -1 || place == counts[r], "places: not in order");
      check(place >= 0 || (whole >= 0 && whole != r), "places: a rank's rows are left out");
      if (place >= 0) ++counts[r];
    }
  }
  return counts;
}

// What goes to each rank lies side by side: keys, weights, lengths, and up to 7 bytes that nobody reads.
nb::tuple py_split_bags(BagSums& self, const Plan& plan, In<int64_t> keys, In<int64_t> given, std::optional<In<float>> weights,
                        int64_t batch_size, In<int64_t> words, In<int64_t> of_bucket, In<int64_t> of_table, In<int64_t> places,
                        int64_t num_ranks, int64_t rank) {
  check(plan != nullptr, "plan: none");
  const std::vector<int64_t> offsets = checked_offsets(*plan, given, keys.size(), batch_size, self.dim());
  const bool is_weighted = weights.has_value();
  check(!is_weighted || weights->size() == keys.size(), "weights: expected one a key");
  check(num_ranks >= 1 && num_ranks <= kMostRanks && rank >= 0 && rank < num_ranks, "rank: not one of the ranks");
  check(of_bucket.size() == Owners::kBuckets && std::all_of(of_bucket.data(), of_bucket.data() + of_bucket.size(),
                                                            [&](int64_t owner) { return owner >= 0 && owner < num_ranks; }),
        "of_bucket: expected a rank of each bucket");
  const PoolingPlan view = plan->view();
  check(std::all_of(view.table, view.table + view.num_features, [&](uint32_t table) { return table < words.size(); }),
        "words: expected one a table");
  check(of_table.size() == words.size() && std::all_of(of_table.data(), of_table.data() + of_table.size(),
                                                       [&](int64_t whole) { return whole >= -1 && whole < num_ranks; }),
        "of_table: expected a rank of each table, or -1");
  static const float kNoWeight = 1;
  const float* const factors = !is_weighted ? nullptr : weights->size() == 0 ? &kNoWeight : weights->data();
  const int64_t features = view.num_features, bags = features * batch_size;
  const PackedKeys batch{keys.data(), offsets.data(), batch_size, (static_cast<int64_t>(offsets.size()) - 1) / batch_size,
                         static_cast<int64_t>(keys.size()), factors};
  const std::vector<int64_t> served = served_counts(places, num_ranks, features, of_table, view);
  const Owners owners{words.data(), of_bucket.data(), of_table.data(), num_ranks};
  OwnedKeys owned;
  {
    const nb::gil_scoped_release release;
    owned = owned_keys(self.threads(), view, batch, owners);
  }
  const int length_bytes = length_bytes_of(view, batch);
  std::vector<size_t> sizes(num_ranks), begins(num_ranks);
  size_t total = 0;
  for (int64_t r = 0; r < num_ranks; ++r) {
    for (int64_t f = 0; f < features; ++f) sizes[r] += owned.counts[r * features + f];
    begins[r] = total;
    const size_t bytes = sizes[r] * (is_weighted ? 12 : 8) + static_cast<size_t>(length_bytes * served[r] * batch_size);
    if (r != rank) total += (bytes + 7) / 8 * 8;
  }
  unsigned char* message;
  int64_t *own_keys, *own_offsets, *counts;
  float *own_weights, *scales;
  auto message_array = make_array<unsigned char>(total, &message);
  auto key_array = make_array<int64_t>(sizes[rank], &own_keys);
  auto offset_array = make_array<int64_t>(served[rank] * batch_size + 1, &own_offsets);
  auto weight_array = make_array<float>(is_weighted ? sizes[rank] : 0, &own_weights);
  auto count_array = make_array<int64_t>(owned.counts.size(), &counts);
  std::copy(owned.counts.begin(), owned.counts.end(), counts);
  const bool is_scaled = std::any_of(view.pooling, view.pooling + features, [](Pooling each) { return each != Pooling::kSum; });
  auto scale_array = make_array<float>(is_scaled ? bags : 0, &scales);
  std::vector<int64_t*> key_parts(num_ranks, own_keys);
  std::vector<float*> weight_parts(num_ranks, own_weights);
  std::vector<unsigned char*> length_parts(num_ranks, nullptr);
  for (int64_t r = 0; r < num_ranks; ++r) {
    if (r == rank) continue;
    unsigned char* const part = message + begins[r];
    key_parts[r] = reinterpret_cast<int64_t*>(part);
    weight_parts[r] = reinterpret_cast<float*>(part + 8 * sizes[r]);
    length_parts[r] = part + sizes[r] * (is_weighted ? 12 : 8);
  }
  {
    const nb::gil_scoped_release release;
    split_bags(self.threads(), view, batch, owned,
               {key_parts.data(), weight_parts.data(), length_parts.data(), length_bytes, places.data(), rank,
                own_offsets});
    if (is_scaled) bag_scales(self.threads(), view, batch, scales);
  }
  return nb::make_tuple(key_array, offset_array, weight_array, message_array, count_array, length_bytes, owned.distinct, scale_array);
}

template <typename T>
std::vector<T> copied(const In<T>& array) {
  return {array.data(), array.data() + array.size()};
}

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
          [](BagSums& self, const NumberedBags& bags, InRows rows, OutRows out) {
            check(bags.dim == self.dim(), "bags: of other rows");
            check_rows(rows, bags.rows, self.dim(), "rows: expected [rows, dim]");
            check_rows(out, static_cast<size_t>(bags.batch_size), static_cast<size_t>(bags.plan->view().stride),
                       "out: expected [B, stride]");
            const nb::gil_scoped_release release;
            if (bags.batch_size != 0) self.pool(bags.plan->view(), bags.keys(), bags.numbers.data(), rows.data(), out.data());
          },
          "bags"_a, "rows"_a.noconvert(), "out"_a.noconvert())
      .def(
          "sum",
          [](BagSums& self, const NumberedBags& bags, InRows grad, OutRows sums) {
            check(bags.dim == self.dim(), "bags: of other rows");
            check_rows(sums, bags.rows, self.dim(), "sums: expected [rows, dim]");
            check_rows(grad, static_cast<size_t>(bags.batch_size), static_cast<size_t>(bags.plan->view().stride),
                       "grad: expected [B, stride]");
            const nb::gil_scoped_release release;
            const int64_t count = static_cast<int64_t>(bags.rows);
            if (count != 0) self.sum(bags.plan->view(), bags.keys(), bags.numbers.data(), grad.data(), count, sums.data());
          },
          "bags"_a, "grad"_a.noconvert(), "sums"_a.noconvert())
      .def("split_bags", &py_split_bags, "plan"_a, "keys"_a.noconvert(), "offsets"_a.noconvert(), "weights"_a.noconvert().none(),
           "batch_size"_a, "words"_a.noconvert(), "of_bucket"_a.noconvert(), "of_table"_a.noconvert(),
           "places"_a.noconvert(), "num_ranks"_a, "rank"_a);

  m.def(
      "grouped_keys",
      [](In<int64_t> keys, In<int64_t> groups, int64_t num_groups, bool once) {
        check(keys.size() == groups.size() && keys.size() < std::numeric_limits<uint32_t>::max(), "groups: expected one a key");
        check(num_groups >= 0 && std::all_of(groups.data(), groups.data() + groups.size(),
                                             [&](int64_t group) { return group >= 0 && group < num_groups; }),
              "groups: beyond their number");
        GroupedKeys made;
        {
          const nb::gil_scoped_release release;
          made = grouped_keys(keys.data(), groups.data(), static_cast<int64_t>(keys.size()), num_groups, once);
        }
        return nb::make_tuple(as_array(std::move(made.keys)), as_array(std::move(made.counts)), as_array(std::move(made.numbers)));
      },
      "keys"_a.noconvert(), "groups"_a.noconvert(), "num_groups"_a, "once"_a);

  nb::class_<NumberedBags>(m, "NumberedBags")
      .def(
          "__init__",
          [](NumberedBags* self, Plan plan, In<int64_t> offsets, std::optional<In<float>> weights, int64_t batch_size,
             In<uint32_t> numbers, size_t rows, uint32_t dim) {
            NumberedBags made{std::move(plan), copied(offsets), weights ? copied(*weights) : std::vector<float>(),
                              copied(numbers), batch_size, weights.has_value(), rows, dim};
            made.check_all();
            new (self) NumberedBags(std::move(made));
          },
          "plan"_a, "offsets"_a.noconvert(), "weights"_a.noconvert().none(), "batch_size"_a, "numbers"_a.noconvert(), "rows"_a,
          "dim"_a);
}

}  // namespace penstock
