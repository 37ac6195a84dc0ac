// Optimizer rules, one struct each: step() updates one row by the sum of its gradients. Part of row_kernels.cc, in the
// namespace of its build. Their float64 twins are the classes of penstock/embedding/rules/optimizer.py; docs/optimizers.md says
// how to add one.
#pragma once

#include "rows/lanes.h"
#include "rows/row_kernels.h"

namespace penstock {
namespace PENSTOCK_ISA {
namespace {

template <typename S>
inline float sum_of_squares(const S& shape, const Lanes* x) {
  Lanes squares = {};
  for (int c = 0; c < num_chunks(shape); ++c) squares += x[c] * x[c];
  return horizontal_sum(squares);
}

constexpr float kLargest = 3.4028234e38f;

// `next`, but NaN where `squares`, the state that divides the step, has left the range of fp32: else the step would be 0 from
// then on, and the row frozen without a sign. A look-up of NaN is seen.
[[gnu::always_inline]] inline Lanes or_nan(Lanes next, Lanes squares) {
  const Lanes nan = Lanes{} + __builtin_nanf("");
  return squares <= Lanes{} + kLargest ? next : nan;
}
[[gnu::always_inline]] inline float or_nan(float next, float squares) {
  return squares <= kLargest ? next : __builtin_nanf("");
}

// Scales a gradient down to an L2 norm of at most `most`; to NaN if the norm is beyond fp32.
template <typename S>
inline void clip(const S& shape, Lanes* grad, float most) {
  const float norm = __builtin_sqrtf(sum_of_squares(shape, grad));
  if (norm <= most) return;
  const float factor = or_nan(most / norm, norm);
  for (int c = 0; c < num_chunks(shape); ++c) grad[c] *= factor;
}

// beta * old + (1 - beta) * next, by way of 1 - beta: 0.999 itself is off by 1.3e-8 in fp32, which a thousand steps compound.
template <typename T>
inline T towards(T old, T next, float one_minus_beta) {
  return old + one_minus_beta * (next - old);
}

// Keeps a row within [-most, most]; NaN stays.
template <typename S>
inline void bound_row(const S& shape, float* value, float most) {
  const Lanes high = Lanes{} + most;
  for (int c = 0; c < num_chunks(shape); ++c) {
    const Lanes w = load(shape, value, c);
    const Lanes below = w > high ? high : w;
    store(shape, value, c, below < -high ? -high : below);
  }
}

struct Sgd {
  template <typename S>
  static void step(const S& shape, float* value, float*, const Lanes* grad, const Hyper& h) {
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      store(shape, value, c, w - h.learning_rate * (grad[c] + h.weight_decay * w));
    }
  }
};

struct MomentumSgd {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes m = h.momentum * load(shape, state, c) + (grad[c] + h.weight_decay * w);
      store(shape, state, c, m);
      store(shape, value, c, w - h.learning_rate * m);
    }
  }
};

struct Adagrad {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes g = grad[c] + h.weight_decay * w;
      const Lanes s = load(shape, state, c) + g * g;
      store(shape, state, c, s);
      store(shape, value, c, or_nan(w - h.learning_rate * g / (square_root(s) + h.eps), s));
    }
  }
};

struct RowWiseAdagrad {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    Lanes squares = {};
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes g = grad[c] + h.weight_decay * load(shape, value, c);
      squares += g * g;
    }
    *state += horizontal_sum(squares) / static_cast<float>(shape.dim());
    const float factor = or_nan(h.learning_rate / (__builtin_sqrtf(*state) + h.eps), *state);
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      store(shape, value, c, w - factor * (grad[c] + h.weight_decay * w));
    }
  }
};

struct Adam {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float* const mean = state;
    float* const variance = mean + shape.dim();
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes g = grad[c] + h.weight_decay * w;
      const Lanes m = towards(load(shape, mean, c), g, h.one_minus_beta1);
      const Lanes v = towards(load(shape, variance, c), g * g, h.one_minus_beta2);
      store(shape, mean, c, m);
      store(shape, variance, c, v);
      store(shape, value, c, or_nan(w - h.learning_rate * m / (square_root(v) + h.eps), v));
    }
  }
};

// weight_decay holds the share of the value that a step takes off.
struct AdamW {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float* const mean = state;
    float* const variance = mean + shape.dim();
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes m = towards(load(shape, mean, c), grad[c], h.one_minus_beta1);
      const Lanes v = towards(load(shape, variance, c), grad[c] * grad[c], h.one_minus_beta2);
      store(shape, mean, c, m);
      store(shape, variance, c, v);
      const Lanes kept = w - h.weight_decay * w;
      store(shape, value, c, or_nan(kept - h.learning_rate * m / (square_root(v) + h.eps), v));
    }
  }
};

// State: mean [dim], then one variance of the row.
struct RowWiseAdam {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float& variance = state[shape.dim()];
    Lanes squares = {};
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes g = grad[c] + h.weight_decay * load(shape, value, c);
      squares += g * g;
    }
    variance = towards(variance, horizontal_sum(squares) / static_cast<float>(shape.dim()), h.one_minus_beta2);
    const float factor = or_nan(h.learning_rate / (__builtin_sqrtf(variance) + h.eps), variance);
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes m = towards(load(shape, state, c), grad[c] + h.weight_decay * w, h.one_minus_beta1);
      store(shape, state, c, m);
      store(shape, value, c, w - factor * m);
    }
  }
};

// State: z [dim], n [dim]; eps holds the rule's beta.
struct Ftrl {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float* const n_state = state + shape.dim();
    const Lanes zero = {};
    const Lanes l1 = zero + h.l1;
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes n = load(shape, n_state, c);
      const Lanes n_next = n + grad[c] * grad[c];
      const Lanes root = square_root(n_next);
      const Lanes z = load(shape, state, c) + grad[c] - (root - square_root(n)) / h.learning_rate * w;
      const Lanes shrunk = z > zero ? z - l1 : z + l1;
      const Lanes next = -shrunk / ((h.eps + root) / h.learning_rate + h.weight_decay);
      store(shape, state, c, z);
      store(shape, n_state, c, n_next);
      // So that a z of NaN is seen.
      store(shape, value, c, (z <= l1) & (z >= -l1) ? zero : or_nan(next, n_next));
    }
  }
};

// Adam's step, scaled to the norm of the row (arXiv:1904.00962); weight decay is part of the step.
struct Lamb {
  template <typename S>
  static void step(const S& shape, float* value, float* state, const Lanes* grad, const Hyper& h) {
    float* const variance = state + shape.dim();
    const auto direction = [&](Lanes w, Lanes m, Lanes v) {
      return h.inverse_bias1 * m / (square_root(h.inverse_bias2 * v) + h.eps) + h.weight_decay * w;
    };
    Lanes value_squares = {}, step_squares = {};
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes m = towards(load(shape, state, c), grad[c], h.one_minus_beta1);
      const Lanes v = towards(load(shape, variance, c), grad[c] * grad[c], h.one_minus_beta2);
      store(shape, state, c, m);
      store(shape, variance, c, v);
      const Lanes r = direction(w, m, v);
      value_squares += w * w;
      // Columns beyond the dim hold 0 / eps.
      step_squares += r * r;
    }
    const float value_norm = __builtin_sqrtf(horizontal_sum(value_squares));
    const float step_norm = __builtin_sqrtf(horizontal_sum(step_squares));
    const float trust = value_norm > 0.0f && step_norm > 0.0f ? value_norm / step_norm : 1.0f;
    for (int c = 0; c < num_chunks(shape); ++c) {
      const Lanes w = load(shape, value, c);
      const Lanes v = load(shape, variance, c);
      const Lanes r = direction(w, load(shape, state, c), v);
      store(shape, value, c, or_nan(w - h.learning_rate * trust * r, v));
    }
  }
};

}  // namespace
}  // namespace PENSTOCK_ISA
}  // namespace penstock
