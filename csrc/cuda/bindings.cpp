// megatron_bicc._C_cuda: kernels on device pointers and streams, both given as integers. Nothing here synchronises.
#include <pybind11/pybind11.h>

#include <string>

#include "fill.h"
#include "merge.h"
#include "policy_loss.h"

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
          uintptr_t tokens, uintptr_t positions, uintptr_t labels, uintptr_t gather, uintptr_t segments,
          uintptr_t rollouts, uintptr_t scales, uintptr_t stream) {
  const FillArrays arrays{
      pointer<const int32_t>(prompt_tokens),
      pointer<const int32_t>(response_tokens),
      pointer<const int32_t>(headers),
      pointer<int64_t>(tokens),
      pointer<int64_t>(positions),
      pointer<int64_t>(labels),
      pointer<int64_t>(gather),
      pointer<int64_t>(segments),
      pointer<int64_t>(rollouts),
      pointer<float>(scales)};
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

template <class T>
void policy_loss(const std::string& objective, double low, double high, double dual, double tis_cap,
                 double kl_coefficient, const std::string& kl_estimator, double entropy_coefficient, int64_t rows,
                 uintptr_t logp, uintptr_t old_logp, uintptr_t advantage, uintptr_t weight, uintptr_t engine_log_ratio,
                 uintptr_t regularisation, uintptr_t ref_logp, uintptr_t entropy, uintptr_t response, uintptr_t share,
                 uintptr_t gradient, uintptr_t masks, uintptr_t partials, uintptr_t stream) {
  const LossSettings<T> settings{
      choice<Objective>(objective, "objective",
                        {{"token", Objective::kToken},
                         {"sequence", Objective::kSequence},
                         {"geometric", Objective::kGeometric},
                         {"aspo", Objective::kAspo},
                         {"cispo", Objective::kCispo}}),
      static_cast<T>(low),
      static_cast<T>(high),
      static_cast<T>(dual),
      static_cast<T>(tis_cap),
      static_cast<T>(kl_coefficient),
      choice<KlEstimator>(kl_estimator, "kl_estimator",
                          {{"k1", KlEstimator::kK1}, {"k2", KlEstimator::kK2}, {"k3", KlEstimator::kK3}}),
      static_cast<T>(entropy_coefficient)};
  const LossArrays<T> arrays{pointer<const T>(logp),
                             pointer<const T>(old_logp),
                             pointer<const T>(advantage),
                             pointer<const T>(weight),
                             pointer<const T>(engine_log_ratio),
                             pointer<const T>(regularisation),
                             pointer<const T>(ref_logp),
                             pointer<const T>(entropy),
                             pointer<const int64_t>(response),
                             pointer<T>(share),
                             pointer<T>(gradient),
                             pointer<bool>(masks),
                             pointer<double>(partials)};
  launch_policy_loss(settings, arrays, rows, stream_of(stream));
}

template <class T>
void define_policy_loss(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  m.def(name, &policy_loss<T>, py::kw_only(), "objective"_a, "low"_a, "high"_a, "dual"_a, "tis_cap"_a,
        "kl_coefficient"_a, "kl_estimator"_a, "entropy_coefficient"_a, "rows"_a, "logp"_a, "old_logp"_a, "advantage"_a,
        "weight"_a, "engine_log_ratio"_a, "regularisation"_a, "ref_logp"_a, "entropy"_a, "response"_a, "share"_a,
        "gradient"_a, "masks"_a, "partials"_a, "stream"_a);
}

}  // namespace
}  // namespace bicc

PYBIND11_MODULE(_C_cuda, m) {
  using namespace pybind11::literals;
  m.doc() = "CUDA kernels on device pointers and streams given as integers; arguments are those of csrc/cuda/*.h.";
  m.attr("LOSS_BLOCKS") = bicc::kLossBlocks;
  m.def("fill", &bicc::fill, py::kw_only(), "copies"_a, "count"_a, "prompt_tokens"_a, "response_tokens"_a, "headers"_a,
        "tokens"_a, "positions"_a, "labels"_a, "gather"_a, "segments"_a, "rollouts"_a, "scales"_a, "stream"_a);
  m.def("merge", &bicc::merge, "dtype"_a, py::kw_only(), "rows"_a, "heads"_a, "dim"_a, "out"_a, "lse"_a,
        "lse_stride"_a, "other"_a, "lse_other"_a, "lse_other_stride"_a, "stream"_a);
  m.def("pre_backward", &bicc::pre_backward, "dtype"_a, py::kw_only(), "rows"_a, "heads"_a, "dim"_a, "out"_a, "grad"_a,
        "delta"_a, "stream"_a);
  bicc::define_policy_loss<float>(m, "policy_loss_float32");
  bicc::define_policy_loss<double>(m, "policy_loss_float64");
}
