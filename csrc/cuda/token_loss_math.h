// The policy loss of one response row, as megatron_bicc/algorithms/policy_loss.py defines it, and its gradient.
//
// x = log pi - log pi_old of the row, A its advantage. A clipped value passes no gradient beyond an edge, and the
// full one at the edge, as torch.clamp has it.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace bicc {

enum class Objective { kToken, kSequence, kGeometric, kAspo, kCispo };
enum class KlEstimator { kK1, kK2, kK3 };

struct LossSettings {
  Objective objective;
  float low;   // edges of the log ratio (algorithms/policy_loss.py), -inf and inf for none
  float high;
  float dual;
  float tis_cap;  // 0: no weight for the engine mismatch
  float kl_coefficient;
  KlEstimator kl_estimator;
};

struct LossRow {
  float logp;
  float old_logp;
  float advantage;
  float weight;
  float ref_logp;      // read where kl_coefficient is not 0
  float rollout_logp;  // read where tis_cap is not 0
};

struct RowLoss {
  float loss;             // weighted
  float gradient;         // of it by the row's own log-prob
  float shared_gradient;  // of it by the mean over the response
  bool clipped_low, clipped_high, clipped_dual;
};

BICC_HOST_DEVICE bool uses_mean(Objective objective) {
  return objective == Objective::kSequence || objective == Objective::kGeometric;
}

// Not fmaxf and fminf: those turn NaN into a number, and a broken log-prob must reach the loss.
BICC_HOST_DEVICE float at_least(float x, float low) { return x < low ? low : x; }
BICC_HOST_DEVICE float at_most(float x, float high) { return x > high ? high : x; }

// Bounded from above where A >= 0, from below where A < 0.
BICC_HOST_DEVICE float clip(const LossSettings& s, float x, float advantage) {
  return advantage < 0 ? at_least(x, s.low) : at_most(x, s.high);
}
BICC_HOST_DEVICE bool inside_clip(const LossSettings& s, float x, float advantage) {
  return advantage < 0 ? x >= s.low : x <= s.high;
}

// What a response's mean is taken of.
BICC_HOST_DEVICE float mean_term(const LossSettings& s, const LossRow& row) {
  const float x = row.logp - row.old_logp;
  return s.objective == Objective::kGeometric ? clip(s, x, row.advantage) : x;
}

// d mean_term / d logp.
BICC_HOST_DEVICE float mean_term_slope(const LossSettings& s, const LossRow& row) {
  return s.objective == Objective::kSequence || inside_clip(s, row.logp - row.old_logp, row.advantage) ? 1.0f : 0.0f;
}

// -A exp(x) with |value| <= dual |A| where A < 0; `slope`: d value / d x.
BICC_HOST_DEVICE float dual_clipped(const LossSettings& s, float x, float advantage, float& slope) {
  const bool beyond = advantage < 0 && x > s.dual;
  const float value = -advantage * expf(beyond ? s.dual : x);
  slope = beyond ? 0.0f : value;
  return value;
}

BICC_HOST_DEVICE float aspo(const LossSettings& s, const LossRow& row, float x, RowLoss& out) {
  if (row.advantage < 0) {
    if (x < s.low) return 0.0f;
    return dual_clipped(s, x, row.advantage, out.gradient);
  }
  if (x > s.high) return 0.0f;
  // The flipped ratio: its dual clip bounds the value and keeps the gradient.
  return out.gradient = -row.advantage * expf(at_most(-x, s.dual));
}

BICC_HOST_DEVICE float cispo(const LossSettings& s, const LossRow& row, float x, RowLoss& out) {
  float weight = at_most(at_least(x, s.low), s.high);
  if (row.advantage < 0) weight = at_most(weight, s.dual);
  out.gradient = -row.advantage * expf(weight);
  return out.gradient * row.logp;
}

// Value before weights; sets the gradients.
BICC_HOST_DEVICE float objective_value(const LossSettings& s, const LossRow& row, float mean, RowLoss& out) {
  const float x = row.logp - row.old_logp;
  if (s.objective == Objective::kAspo) return aspo(s, row, x, out);
  if (s.objective == Objective::kCispo) return cispo(s, row, x, out);
  if (s.objective == Objective::kGeometric) return dual_clipped(s, mean, row.advantage, out.shared_gradient);
  const bool token = s.objective == Objective::kToken;
  const float ratio = token ? x : mean;
  float slope = 0.0f;
  const float value = dual_clipped(s, clip(s, ratio, row.advantage), row.advantage, slope);
  if (inside_clip(s, ratio, row.advantage)) (token ? out.gradient : out.shared_gradient) = slope;
  return value;
}

BICC_HOST_DEVICE float kl_value(const LossSettings& s, const LossRow& row, float& slope) {
  const float d = row.ref_logp - row.logp;
  if (s.kl_estimator == KlEstimator::kK1) {
    slope = 1.0f;
    return -d;
  }
  if (s.kl_estimator == KlEstimator::kK2) {
    slope = -d;
    return 0.5f * d * d;
  }
  slope = -expm1f(d);
  return expm1f(d) - d;
}

// Which edges hold for the row, as algorithms/statistics.py counts them.
BICC_HOST_DEVICE void set_clipped(const LossSettings& s, const LossRow& row, float mean, RowLoss& out) {
  const float x = s.objective == Objective::kSequence ? mean : row.logp - row.old_logp;
  const bool either_sign = s.objective == Objective::kCispo;
  out.clipped_low = x < s.low && (either_sign || row.advantage < 0);
  out.clipped_high = x > s.high && (either_sign || row.advantage > 0);
  float weight = x;
  if (s.objective == Objective::kGeometric) weight = mean;
  if (s.objective == Objective::kCispo) weight = at_most(at_least(x, s.low), s.high);
  out.clipped_dual = row.advantage < 0 && weight > s.dual;
  if (s.objective == Objective::kAspo && row.advantage > 0) out.clipped_dual = -x > s.dual;
}

// `mean`: of mean_term over the row's response, where uses_mean(objective).
BICC_HOST_DEVICE RowLoss row_loss(const LossSettings& s, const LossRow& row, float mean) {
  RowLoss out{0.0f, 0.0f, 0.0f, false, false, false};
  float value = objective_value(s, row, mean, out);
  set_clipped(s, row, mean, out);
  if (s.tis_cap > 0) {
    const float engine = at_most(expf(row.old_logp - row.rollout_logp), s.tis_cap);
    value *= engine;
    out.gradient *= engine;
    out.shared_gradient *= engine;
  }
  if (s.kl_coefficient != 0) {
    float slope = 0.0f;
    value += s.kl_coefficient * kl_value(s, row, slope);
    out.gradient += s.kl_coefficient * slope;
  }
  out.loss = row.weight * value;
  out.gradient *= row.weight;
  out.shared_gradient *= row.weight;
  return out;
}

}  // namespace bicc
