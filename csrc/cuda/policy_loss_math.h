// The policy loss of one response row, as megatron_bicc/algorithms/policy_loss.py defines it, and its gradient.
//
// x = log pi - log pi_old of the row, A its advantage. A clipped value passes no gradient beyond an edge, and the
// full one at the edge, as torch.clamp has it. T is float or double.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace bicc {

enum class Objective { kToken, kSequence, kGeometric, kAspo, kCispo };
enum class KlEstimator { kK1, kK2, kK3 };

template <class T>
struct LossSettings {
  Objective objective;
  T low;  // edges of the log ratio (ClipBounds), -inf and inf for none
  T high;
  T dual;
  T kl_coefficient;  // 0: no KL in the loss
  KlEstimator kl_estimator;
  T entropy_coefficient;  // 0: no entropy bonus
};

template <class T>
struct LossRow {
  T logp;
  T old_logp;
  T advantage;
  T weight;
  T regularisation;  // weight of KL and entropy
  T ref_logp;        // read where kl_coefficient is not 0
  T entropy;         // read where entropy_coefficient is not 0
};

template <class T>
struct RowLoss {
  T loss;             // weighted
  T gradient;         // of it by the row's own log-prob
  T shared_gradient;  // of it by the mean over the response
  bool low, high, dual;
};

template <class T>
BICC_HOST_DEVICE bool uses_mean(const LossSettings<T>& s) {
  return s.objective == Objective::kSequence || s.objective == Objective::kGeometric;
}

// Not fmax and fmin: those turn NaN into a number, and a broken log-prob must reach the loss.
template <class T>
BICC_HOST_DEVICE T at_least(T x, T low) { return x < low ? low : x; }
template <class T>
BICC_HOST_DEVICE T at_most(T x, T high) { return x > high ? high : x; }

// Bounded from above where A >= 0, from below where A < 0.
template <class T>
BICC_HOST_DEVICE T clip(const LossSettings<T>& s, T x, T advantage) {
  return advantage < 0 ? at_least(x, s.low) : at_most(x, s.high);
}
template <class T>
BICC_HOST_DEVICE bool inside_clip(const LossSettings<T>& s, T x, T advantage) {
  return advantage < 0 ? x >= s.low : x <= s.high;
}

// What a response's mean is taken of.
template <class T>
BICC_HOST_DEVICE T mean_term(const LossSettings<T>& s, const LossRow<T>& row) {
  const T x = row.logp - row.old_logp;
  return s.objective == Objective::kGeometric ? clip(s, x, row.advantage) : x;
}

// d mean_term / d logp.
template <class T>
BICC_HOST_DEVICE T mean_term_slope(const LossSettings<T>& s, const LossRow<T>& row) {
  return s.objective == Objective::kSequence || inside_clip(s, row.logp - row.old_logp, row.advantage) ? 1 : 0;
}

// -A exp(x) with |value| <= exp(dual) |A| where A < 0; `slope`: d value / d x.
template <class T>
BICC_HOST_DEVICE T dual_clipped(const LossSettings<T>& s, T x, T advantage, T& slope) {
  const bool beyond = advantage < 0 && x > s.dual;
  const T value = -advantage * std::exp(beyond ? s.dual : x);
  slope = beyond ? 0 : value;
  return value;
}

template <class T>
BICC_HOST_DEVICE T aspo(const LossSettings<T>& s, const LossRow<T>& row, T x, RowLoss<T>& out) {
  if (row.advantage < 0) {
    if (x < s.low) return 0;
    return dual_clipped(s, x, row.advantage, out.gradient);
  }
  if (x > s.high) return 0;
  // The flipped ratio: its dual clip bounds the value and keeps the gradient. The difference is 0, or NaN for a
  // log-prob that is not finite, which the bound would hide.
  return out.gradient = -row.advantage * std::exp(at_most(-x, s.dual) + (row.logp - row.logp));
}

template <class T>
BICC_HOST_DEVICE T cispo(const LossSettings<T>& s, const LossRow<T>& row, T x, RowLoss<T>& out) {
  T weight = at_most(at_least(x, s.low), s.high);
  if (row.advantage < 0) weight = at_most(weight, s.dual);
  out.gradient = -row.advantage * std::exp(weight);
  return out.gradient * row.logp;
}

// Value before weights; sets the gradients.
template <class T>
BICC_HOST_DEVICE T objective_value(const LossSettings<T>& s, const LossRow<T>& row, T mean, RowLoss<T>& out) {
  const T x = row.logp - row.old_logp;
  if (s.objective == Objective::kAspo) return aspo(s, row, x, out);
  if (s.objective == Objective::kCispo) return cispo(s, row, x, out);
  if (s.objective == Objective::kGeometric) return dual_clipped(s, mean, row.advantage, out.shared_gradient);
  const bool token = s.objective == Objective::kToken;
  const T ratio = token ? x : mean;
  T slope = 0;
  const T value = dual_clipped(s, clip(s, ratio, row.advantage), row.advantage, slope);
  if (inside_clip(s, ratio, row.advantage)) (token ? out.gradient : out.shared_gradient) = slope;
  return value;
}

template <class T>
BICC_HOST_DEVICE T kl_value(const LossSettings<T>& s, const LossRow<T>& row, T& slope) {
  const T d = row.ref_logp - row.logp;
  if (s.kl_estimator == KlEstimator::kK1) {
    slope = 1;
    return -d;
  }
  if (s.kl_estimator == KlEstimator::kK2) {
    slope = -d;
    return T{0.5} * d * d;
  }
  slope = -std::expm1(d);
  return std::expm1(d) - d;
}

// The masks of TokenLoss (policy_loss.py).
template <class T>
BICC_HOST_DEVICE void set_masks(const LossSettings<T>& s, const LossRow<T>& row, T mean, RowLoss<T>& out) {
  const T x = s.objective == Objective::kSequence ? mean : row.logp - row.old_logp;
  const bool either_sign = s.objective == Objective::kCispo;
  out.low = x < s.low && (either_sign || row.advantage < 0);
  out.high = x > s.high && (either_sign || row.advantage > 0);
  T weight = x;
  if (s.objective == Objective::kGeometric) weight = mean;
  if (s.objective == Objective::kCispo) weight = at_most(at_least(x, s.low), s.high);
  out.dual = row.advantage < 0 && weight > s.dual;
  if (s.objective == Objective::kAspo && row.advantage > 0) out.dual = -x > s.dual;
}

// `mean`: of mean_term over the row's response, where uses_mean.
template <class T>
BICC_HOST_DEVICE RowLoss<T> row_loss(const LossSettings<T>& s, const LossRow<T>& row, T mean) {
  RowLoss<T> out{0, 0, 0, false, false, false};
  T value = objective_value(s, row, mean, out);
  set_masks(s, row, mean, out);
  out.loss = row.weight * value;
  out.gradient *= row.weight;
  out.shared_gradient *= row.weight;
  if (s.kl_coefficient != 0) {
    T slope = 0;
    const T kl = kl_value(s, row, slope);
    out.loss += s.kl_coefficient * row.regularisation * kl;
    out.gradient += s.kl_coefficient * row.regularisation * slope;
  }
  if (s.entropy_coefficient != 0) out.loss -= s.entropy_coefficient * row.regularisation * row.entropy;
  return out;
}

}  // namespace bicc
