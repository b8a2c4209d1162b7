// megatron_bicc._C_cuda: kernels on device pointers and streams, both given as integers. Nothing here synchronises.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "fill.h"
#include "log_probs.h"
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

AttentionPart part(uintptr_t out, Strides out_strides, uintptr_t lse, Strides lse_strides) {
  return {out, out_strides, pointer<float>(lse), lse_strides};
}

void merge(const std::string& dtype, int64_t rows, int64_t heads, int64_t dim, const AttentionPart& own,
           const AttentionPart& other, uintptr_t stream) {
  launch_merge(dtype_of(dtype), {rows, heads, dim}, own, other, stream_of(stream));
}

RowSum row_sum(uintptr_t to, int64_t to_stride, uintptr_t from, int64_t from_stride, int64_t rows, int64_t width) {
  return {to, to_stride, from, from_stride, rows, width};
}

void add_gradients(const std::string& dtype, const RowSum& q, const RowSum& k, const RowSum& v, uintptr_t stream) {
  launch_add_gradients(dtype_of(dtype), q, k, v, stream_of(stream));
}

LogitRows logit_rows(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocabulary, int64_t first, uintptr_t labels,
                     float scale) {
  return {pointer<float>(logits), stride, rows, vocabulary, first, pointer<const int64_t>(labels), scale};
}

void logit_statistics(const LogitRows& logits, uintptr_t statistics, uintptr_t stream) {
  launch_logit_statistics(logits, pointer<float>(statistics), stream_of(stream));
}

void logit_gradient(const std::string& dtype, const LogitRows& logits, uintptr_t lse, uintptr_t entropy,
                    uintptr_t grad_log_prob, uintptr_t grad_entropy, uintptr_t stream) {
  launch_logit_gradient(dtype_of(dtype), logits,
                        {pointer<const float>(lse), pointer<const float>(entropy), pointer<const float>(grad_log_prob),
                         pointer<const float>(grad_entropy)},
                        stream_of(stream));
}

template <class T>
void policy_loss(const std::string& objective, double low, double high, double dual, double kl_coefficient,
                 const std::string& kl_estimator, double entropy_coefficient, int64_t rows, uintptr_t logp,
                 uintptr_t old_logp, uintptr_t advantage, uintptr_t weight, uintptr_t regularisation,
                 uintptr_t ref_logp, uintptr_t entropy, uintptr_t mean, uintptr_t response, uintptr_t share,
                 uintptr_t gradient, uintptr_t mean_gradient, uintptr_t masks, uintptr_t partials, uintptr_t stream) {
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
      static_cast<T>(kl_coefficient),
      choice<KlEstimator>(kl_estimator, "kl_estimator",
                          {{"k1", KlEstimator::kK1}, {"k2", KlEstimator::kK2}, {"k3", KlEstimator::kK3}}),
      static_cast<T>(entropy_coefficient)};
  const LossArrays<T> arrays{pointer<const T>(logp),
                             pointer<const T>(old_logp),
                             pointer<const T>(advantage),
                             pointer<const T>(weight),
                             pointer<const T>(regularisation),
                             pointer<const T>(ref_logp),
                             pointer<const T>(entropy),
                             pointer<const T>(mean),
                             pointer<const int64_t>(response),
                             pointer<T>(share),
                             pointer<T>(gradient),
                             pointer<T>(mean_gradient),
                             pointer<bool>(masks),
                             pointer<double>(partials)};
  launch_policy_loss(settings, arrays, rows, stream_of(stream));
}

template <class T>
void define_policy_loss(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  m.def(name, &policy_loss<T>, py::kw_only(), "objective"_a, "low"_a, "high"_a, "dual"_a,
        "kl_coefficient"_a, "kl_estimator"_a, "entropy_coefficient"_a, "rows"_a, "logp"_a, "old_logp"_a, "advantage"_a,
        "weight"_a, "regularisation"_a, "ref_logp"_a, "entropy"_a, "mean"_a, "response"_a, "share"_a, "gradient"_a,
        "mean_gradient"_a, "masks"_a, "partials"_a, "stream"_a);
}

}  // namespace
}  // namespace bicc

PYBIND11_MODULE(_C_cuda, m) {
  using namespace pybind11::literals;
  m.doc() = "CUDA kernels on device pointers and streams given as integers; arguments are those of csrc/cuda/*.h.";
  m.attr("LOSS_BLOCKS") = bicc::kLossBlocks;
  m.def("fill", &bicc::fill, py::kw_only(), "copies"_a, "count"_a, "prompt_tokens"_a, "response_tokens"_a, "headers"_a,
        "tokens"_a, "positions"_a, "labels"_a, "gather"_a, "segments"_a, "rollouts"_a, "scales"_a, "stream"_a);
  py::class_<bicc::AttentionPart>(m, "AttentionPart")
      .def(py::init(&bicc::part), py::kw_only(), "out"_a, "out_strides"_a, "lse"_a, "lse_strides"_a);
  m.def("merge", &bicc::merge, "dtype"_a, py::kw_only(), "rows"_a, "heads"_a, "dim"_a, "part"_a, "other"_a, "stream"_a);
  py::class_<bicc::RowSum>(m, "RowSum")
      .def(py::init(&bicc::row_sum), py::kw_only(), "to"_a, "to_stride"_a, "from_"_a, "from_stride"_a, "rows"_a,
           "width"_a);
  m.def("add_gradients", &bicc::add_gradients, "dtype"_a, py::kw_only(), "q"_a, "k"_a, "v"_a, "stream"_a);
  py::class_<bicc::LogitRows>(m, "LogitRows")
      .def(py::init(&bicc::logit_rows), py::kw_only(), "logits"_a, "stride"_a, "rows"_a, "vocabulary"_a, "first"_a,
           "labels"_a, "scale"_a);
  m.def("logit_statistics", &bicc::logit_statistics, "logits"_a, py::kw_only(), "statistics"_a, "stream"_a);
  m.def("logit_gradient", &bicc::logit_gradient, "dtype"_a, "logits"_a, py::kw_only(), "lse"_a, "entropy"_a,
        "grad_log_prob"_a, "grad_entropy"_a, "stream"_a);
  bicc::define_policy_loss<float>(m, "policy_loss_float32");
  bicc::define_policy_loss<double>(m, "policy_loss_float64");
}
