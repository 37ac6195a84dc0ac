// What is asked of gradients and rows between a look-up and its update.
#include <algorithm>
#include <vector>

#include "store/host_store.h"

namespace penstock {

Status HostStore::gradient_norm(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total) {
  *total = 0;
  if (gradients.empty()) return Status::kOk;
  return call([&] { return measure(gradients, order, is_order_free, total); });
}

Status HostStore::measure(std::vector<LookupGradient>& gradients, double order, bool is_order_free, double* total) {
  const PoolingPlan plan = gradients.front().lookup->plan->view();
  uint64_t keys = 0;
  for (LookupGradient& gradient : gradients) {
    const Status status = refresh(gradient);
    if (status != Status::kOk) return status;
    keys += static_cast<uint64_t>(gradient.batch.num_keys);
  }
  const std::vector<Unit> units = update_units(plan, gradients);
  const int sum_bits = is_order_free ? sum_bits_of(keys) : 0;
  std::vector<GradientNorm> norms(scratch_.size());
  for (GradientNorm& norm : norms) norm.order = order;
  pool_.run(static_cast<int64_t>(units.size()), [&](int64_t unit, int thread) {
    ThreadScratch& scratch = scratch_[thread];
    const int64_t count = collect_occurrences(gradients, units[unit], &scratch.occurrences);
    if (count == 0) return;
    const UpdateScratch working = update_scratch(static_cast<size_t>(count), scratch);
    kernels_.measure(dim_, scratch.occurrences.data(), count, sum_bits, working, &norms[thread]);
  });
  for (size_t thread = 1; thread < norms.size(); ++thread) norms[0].add(norms[thread]);
  *total = norms[0].total();
  return Status::kOk;
}

Status HostStore::read_looked_up(const Lookup& lookup, float* vectors) {
  return call([&] {
    const PoolingPlan plan = lookup.plan->view();
    const PackedKeys batch = lookup.batch();
    struct Run {
      int64_t feature;
      int64_t first;
      int64_t count;
    };
    constexpr int64_t kMostKeys = 2048;
    std::vector<Run> runs;
    for (int64_t f = 0; f < plan.num_features; ++f) {
      const int64_t bag = plan.packed_feature[f] * batch.batch_size, last = batch.begin(bag + batch.batch_size);
      for (int64_t first = batch.begin(bag); first < last; first += kMostKeys) {
        runs.push_back({f, first, std::min(kMostKeys, last - first)});
      }
    }
    pool_.run(static_cast<int64_t>(runs.size()), [&](int64_t number, int) {
      // Each key as a bag of its own.
      const Run& run = runs[number];
      const int64_t zero = 0;
      const Pooling pooling = Pooling::kSum;
      const PoolingPlan each{1, &zero, plan.table + run.feature, &pooling, &zero, &zero, int64_t{dim_}, &zero};
      const PackedKeys keys{lookup.keys + run.first, nullptr, run.count, 1, run.count, nullptr, true};
      kernels_.pool(rows(), each, keys, lookup.slots + run.first, initializers_.data(), {0, 1, 0, run.count}, false,
                    vectors + run.first * int64_t{dim_});
    });
    return Status::kOk;
  });
}

}  // namespace penstock
