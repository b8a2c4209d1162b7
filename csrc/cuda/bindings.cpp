// megatron_bicc._C_cuda: kernels on device pointers and streams, both given as integers. Nothing here synchronises.
#include <pybind11/pybind11.h>

#include <string>

#include "fill.h"
#include "merge.h"
#include "token_loss.h"

namespace py = pybind11;

namespace bicc {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(uintptr_t stream) { return pointer<CUstream_st>(stream); }

template <class E>
E choice(const std::string& given, const char* what, std::initializer_list<std::pair<const char*, E>> values) {
  std::string known;
  for (const auto& [name, value] : values) {
    if (given == name) return value;
    known += std::string(known.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument(std::string(what) + " is '" + given + "'; it must be one of " + known);
}

Dtype dtype_of(const std::string& name) {
  return choice<Dtype>(name, "dtype",
                       {{"float32", Dtype::kFloat32}, {"float16", Dtype::kFloat16}, {"bfloat16", Dtype::kBfloat16}});
}

void fill(uintptr_t copies, int64_t count, uintptr_t prompt_tokens, uintptr_t response_tokens, uintptr_t headers,
          uintptr_t features, int64_t feature_count, int64_t response_token_count, uintptr_t tokens,
          uintptr_t positions, uintptr_t labels, uintptr_t gather, uintptr_t features_out, uintptr_t stream) {
  const FillArrays arrays{
      {pointer<const int32_t>(prompt_tokens), pointer<const int32_t>(response_tokens), pointer<const int32_t>(headers)},
      pointer<const float>(features),
      feature_count,
      response_token_count,
      pointer<int32_t>(tokens),
      pointer<int32_t>(positions),
      pointer<int32_t>(labels),
      pointer<int64_t>(gather),
      pointer<float>(features_out)};
  launch_fill(pointer<const Copy>(copies), count, arrays, stream_of(stream));
}

void merge(const std::string& dtype, int64_t rows, int64_t heads, int64_t dim, uintptr_t out, uintptr_t lse,
           int64_t lse_stride, uintptr_t other, uintptr_t lse_other, int64_t lse_other_stride, uintptr_t stream) {
  launch_merge(dtype_of(dtype), {rows, heads, dim}, pointer<void>(out), pointer<float>(lse), lse_stride,
               pointer<const void>(other), pointer<const float>(lse_other), lse_other_stride, stream_of(stream));
}

void pre_backward(const std::string& dtype, int64_t rows, int64_t heads, int64_t dim, uintptr_t out, uintptr_t grad,
                  uintptr_t delta, uintptr_t stream) {
  launch_pre_backward(dtype_of(dtype), {rows, heads, dim}, pointer<const void>(out), pointer<const void>(grad),
                      pointer<float>(delta), stream_of(stream));
}

LossSettings loss_settings(const std::string& objective, float low, float high, float dual, float tis_cap,
                           float kl_coefficient, const std::string& kl_estimator) {
  return {choice<Objective>(objective, "objective",
                            {{"token", Objective::kToken},
                             {"sequence", Objective::kSequence},
                             {"geometric", Objective::kGeometric},
                             {"aspo", Objective::kAspo},
                             {"cispo", Objective::kCispo}}),
          low,
          high,
          dual,
          tis_cap,
          kl_coefficient,
          choice<KlEstimator>(kl_estimator, "kl_estimator",
                              {{"k1", KlEstimator::kK1}, {"k2", KlEstimator::kK2}, {"k3", KlEstimator::kK3}})};
}

void token_loss(const LossSettings& settings, int64_t segments, uintptr_t logp, uintptr_t old_logp, uintptr_t advantage,
                uintptr_t weight, uintptr_t ref_logp, uintptr_t rollout_logp, uintptr_t cu_response,
                uintptr_t gradient, uintptr_t partials, uintptr_t statistics, uintptr_t stream) {
  if (settings.kl_coefficient != 0 && ref_logp == 0) throw std::invalid_argument("a KL penalty needs ref_logp");
  if (settings.tis_cap > 0 && rollout_logp == 0) throw std::invalid_argument("tis_cap needs rollout_logp");
  const LossArrays arrays{pointer<const float>(logp),         pointer<const float>(old_logp),
                          pointer<const float>(advantage),    pointer<const float>(weight),
                          pointer<const float>(ref_logp),     pointer<const float>(rollout_logp),
                          pointer<const int32_t>(cu_response), pointer<float>(gradient),
                          pointer<double>(partials),          pointer<double>(statistics)};
  launch_token_loss(settings, arrays, segments, stream_of(stream));
}

}  // namespace
}  // namespace bicc

PYBIND11_MODULE(_C_cuda, m) {
  using namespace pybind11::literals;
  m.doc() = "CUDA kernels on device pointers and streams given as integers; arguments are those of csrc/cuda/*.h.";
  m.attr("LOSS_STATISTICS") = py::make_tuple("loss", "rows", "clipped_low", "clipped_high", "clipped_dual",
                                             "kl_old_new", "kl_new_ref", "ratio_min", "ratio_max");
  m.def("fill", &bicc::fill, py::kw_only(), "copies"_a, "count"_a, "prompt_tokens"_a, "response_tokens"_a, "headers"_a,
        "features"_a, "feature_count"_a, "response_token_count"_a, "tokens"_a, "positions"_a, "labels"_a, "gather"_a,
        "features_out"_a, "stream"_a);
  m.def("merge", &bicc::merge, "dtype"_a, py::kw_only(), "rows"_a, "heads"_a, "dim"_a, "out"_a, "lse"_a,
        "lse_stride"_a, "other"_a, "lse_other"_a, "lse_other_stride"_a, "stream"_a);
  m.def("pre_backward", &bicc::pre_backward, "dtype"_a, py::kw_only(), "rows"_a, "heads"_a, "dim"_a, "out"_a, "grad"_a,
        "delta"_a, "stream"_a);
  py::class_<bicc::LossSettings>(m, "LossSettings")
      .def(py::init(&bicc::loss_settings), py::kw_only(), "objective"_a, "low"_a, "high"_a, "dual"_a, "tis_cap"_a,
           "kl_coefficient"_a, "kl_estimator"_a);
  m.def("token_loss", &bicc::token_loss, "settings"_a, py::kw_only(), "segments"_a, "logp"_a, "old_logp"_a,
        "advantage"_a, "weight"_a, "ref_logp"_a, "rollout_logp"_a, "cu_response"_a, "gradient"_a, "partials"_a,
        "statistics"_a, "stream"_a);
}
