// megatron_bicc._C: checks the arguments from Python and runs the two phases without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <thread>
#include <utility>

#include "error.h"
#include "fill.h"

namespace py = pybind11;

namespace bicc {
namespace {

// Returns an array of exactly this dtype and of plain C layout: a silent conversion would hide a mistake.
template <class T>
py::array checked(const py::object& object, const std::string& name, int dimensions) {
  if (!py::isinstance<py::array>(object)) fail(name, " must be a NumPy array");
  py::array array = py::reinterpret_borrow<py::array>(object);
  if (!py::dtype::of<T>().equal(array.dtype())) {
    fail(name, " must be of dtype ", std::string(py::str(py::dtype::of<T>())), ", not ",
         std::string(py::str(array.dtype())));
  }
  if (array.ndim() != dimensions) fail(name, " must have ", dimensions, " dimension(s), not ", array.ndim());
  constexpr int kNeeded = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kNeeded) != kNeeded) fail(name, " must be C-contiguous and aligned");
  return array;
}

template <class T>
Span<T> view(const py::array& array) {
  return {static_cast<const T*>(array.data()), static_cast<int64_t>(array.size())};
}

template <class T>
std::vector<T> copy_of(const py::object& batch, const char* field) {
  const Span<T> span = view<T>(checked<T>(batch.attr(field), std::string("RolloutBatch.") + field, 1));
  return std::vector<T>(span.data, span.data + span.size);
}

template <class T>
T read(const py::object& value, const std::string& name) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    fail(name, " is ", std::string(py::repr(value)), ", which is of the wrong type or too large");
  }
}

// Integers only: pybind11's own cast would truncate a NumPy or torch float.
template <>
int64_t read<int64_t>(const py::object& value, const std::string& name) {
  if (!PyBool_Check(value.ptr())) {
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    const int64_t number = index ? PyLong_AsLongLong(index.ptr()) : -1;
    if (!PyErr_Occurred()) return number;
    PyErr_Clear();
  }
  fail(name, " is ", std::string(py::repr(value)), ", which is of the wrong type or too large");
}

// A tuple or list: reading would exhaust a generator, and a set has no order.
template <>
std::vector<int64_t> read<std::vector<int64_t>>(const py::object& value, const std::string& name) {
  if (!py::isinstance<py::tuple>(value) && !py::isinstance<py::list>(value)) {
    fail(name, " is ", std::string(py::repr(value)), ", which is of the wrong type or too large");
  }
  std::vector<int64_t> numbers;
  for (const py::handle item : value) {
    numbers.push_back(read<int64_t>(py::reinterpret_borrow<py::object>(item), name + "[" + std::to_string(numbers.size()) + "]"));
  }
  return numbers;
}

class SettingsReader {
 public:
  explicit SettingsReader(const py::object& settings) : settings_(settings) {}

  template <class T>
  T get(const char* field) const {
    return read<T>(settings_.attr(field), std::string("PackingSettings.") + field);
  }

  template <class E>
  E choice(const char* field, std::initializer_list<std::pair<const char*, E>> values) const {
    const std::string given = get<std::string>(field);
    std::string known;
    for (const auto& [name, value] : values) {
      if (given == name) return value;
      known += std::string(known.empty() ? "" : ", ") + name;
    }
    fail("PackingSettings.", field, " is '", given, "'; it must be one of ", known);
  }

 private:
  const py::object& settings_;
};

Settings read_settings(const py::object& object) {
  const SettingsReader from(object);
  Settings s;
  s.layout = from.choice<Layout>("layout", {{"plain", Layout::kPlain}, {"bilateral", Layout::kBilateral}});
  s.max_sequence_tokens = from.get<int64_t>("max_sequence_tokens");
  s.max_tokens_per_microbatch = from.get<int64_t>("max_tokens_per_microbatch");
  s.vocab_size = from.get<int64_t>("vocab_size");
  s.reward_threshold = static_cast<float>(from.get<double>("reward_threshold"));
  s.context_ratio = from.get<double>("context_ratio");
  s.context_source =
      from.choice<Source>("context_source", {{"partition", Source::kPartition}, {"pair", Source::kPair}});
  s.truncation =
      from.choice<Truncation>("truncation", {{"equal", Truncation::kEqual}, {"in_order", Truncation::kInOrder}});
  s.keep = from.choice<Keep>("keep", {{"head", Keep::kHead}, {"tail", Keep::kTail}, {"both_ends", Keep::kBothEnds}});
  s.wrong_header = from.get<std::vector<int64_t>>("wrong_header");
  s.right_header = from.get<std::vector<int64_t>>("right_header");
  s.answer_header = from.get<std::vector<int64_t>>("answer_header");
  s.end_token_ids = from.get<std::vector<int64_t>>("end_token_ids");
  s.overlong = from.choice<Overlong>("overlong", {{"error", Overlong::kError}, {"drop", Overlong::kDrop}});
  s.alignment = from.get<int64_t>("alignment");
  s.token_cost = from.get<int64_t>("token_cost");
  s.context_ranks = from.get<int64_t>("context_ranks");
  return s;
}

// A plan, with the arrays that its batch borrows.
class PlanHandle {
 public:
  PlanHandle(const py::object& batch, const py::object& settings, const py::object& dp_size)
      : prompt_tokens_(checked<int32_t>(batch.attr("prompt_tokens"), "RolloutBatch.prompt_tokens", 1)),
        tokens_(checked<int32_t>(batch.attr("tokens"), "RolloutBatch.tokens", 1)) {
    Settings s = read_settings(settings);
    const int64_t ranks = read<int64_t>(dp_size, "dp_size");
    Batch b;
    b.prompt_tokens = view<int32_t>(prompt_tokens_);
    b.tokens = view<int32_t>(tokens_);
    b.prompt_offsets = copy_of<int64_t>(batch, "prompt_offsets_B");
    b.offsets = copy_of<int64_t>(batch, "offsets_R");
    b.group_offsets = copy_of<int64_t>(batch, "group_offsets_B");
    b.rewards = copy_of<float>(batch, "rewards_R");
    py::gil_scoped_release release;
    plan_ = make_plan(std::move(b), std::move(s), ranks);
  }

  // int64 [micro-batches, 5]: rows, prefix rows, response rows, sides, segments.
  py::array_t<int64_t> sizes() const {
    py::array_t<int64_t> out({static_cast<py::ssize_t>(plan_.sizes.size()), py::ssize_t{5}});
    int64_t* to = out.mutable_data();
    for (const MicroBatchSize& size : plan_.sizes) {
      for (const int64_t value : {size.rows, size.prefix_rows, size.response_rows, size.sides, size.segments}) {
        *to++ = value;
      }
    }
    return out;
  }

  // int64 [micro-batches * context ranks, 2]: rows, chunks.
  py::array_t<int64_t> shares() const {
    py::array_t<int64_t> out({static_cast<py::ssize_t>(plan_.shares.size()), py::ssize_t{2}});
    int64_t* to = out.mutable_data();
    for (const ContextShare& share : plan_.shares) {
      *to++ = share.rows;
      *to++ = static_cast<int64_t>(share.chunks.size());
    }
    return out;
  }

  // int64 [micro-batches of one rank, 2]: rows, response rows of one of its context ranks.
  py::array_t<int64_t> rows(const py::object& rank, const py::object& context_rank) const {
    const RankRange range = range_of(rank, context_rank);
    py::array_t<int64_t> out({static_cast<py::ssize_t>(range.last - range.first), py::ssize_t{2}});
    int64_t* to = out.mutable_data();
    for (int64_t i = range.first; i < range.last; ++i) {
      const ContextShare& share = plan_.share(i, range.context_rank);
      *to++ = share.rows;
      *to++ = share.response_rows;
    }
    return out;
  }

  // The fields of megatron_bicc.packing.types.SideTable.
  py::dict side_table() const {
    py::array_t<int64_t> group(plan_.sides.sides.size()), parts_at(plan_.sides.sides.size() + 1),
        responses_at(plan_.sides.sides.size() + 1), parts({static_cast<py::ssize_t>(plan_.sides.parts.size()), py::ssize_t{3}});
    parts_at.mutable_at(0) = responses_at.mutable_at(0) = 0;
    int64_t i = 0;
    for (const Side& side : plan_.sides.sides) {
      group.mutable_at(i++) = side.group;
      parts_at.mutable_at(i) = side.last_part;
      responses_at.mutable_at(i) = side.last_response;
    }
    int64_t* to = parts.mutable_data();
    for (const Part& part : plan_.sides.parts) {
      for (const int64_t value : {part.rollout, part.head, part.tail}) *to++ = value;
    }
    const auto& responses = plan_.sides.responses;
    return py::dict(py::arg("group_D") = group, py::arg("part_offsets_D") = parts_at, py::arg("parts") = parts,
                    py::arg("response_offsets_D") = responses_at,
                    py::arg("responses") = py::array_t<int64_t>(responses.size(), responses.data()));
  }

  py::dict counts() const {
    int64_t rows = 0, prefix_rows = 0, one_row_a_rollout = 0, context = 0;
    for (const MicroBatchSize& size : plan_.sizes) {
      rows += size.prefix_rows + size.response_rows;
      prefix_rows += size.prefix_rows;
    }
    for (const Side& side : plan_.sides.sides) {
      context += side.context_tokens;
      for (int64_t i = side.first_response; i < side.last_response; ++i) {
        one_row_a_rollout += side.prefix_tokens + plan_.batch.length(plan_.sides.responses[i]);
      }
    }
    return py::dict(py::arg("tokens_packed") = rows, py::arg("tokens_prefix") = prefix_rows,
                    py::arg("tokens_rows") = one_row_a_rollout, py::arg("tokens_context") = context,
                    py::arg("overlong_dropped") = plan_.sides.dropped,
                    py::arg("groups_skipped") = plan_.sides.skipped_groups,
                    py::arg("microbatches") = plan_.filled_bins, py::arg("rank_costs") = plan_.rank_costs);
  }

  // int64 [copies, 13]: the fields of Copy (csrc/copy.h) of one rank's rows, for the fill on a GPU.
  py::array_t<int64_t> copies(const py::object& rank, const py::object& context_rank) const {
    std::vector<Copy> copies;
    const RankRange range = range_of(rank, context_rank);
    const std::vector<RowExtent> starts = starts_of(plan_, range);
    for (int64_t i = range.first; i < range.last; ++i) {
      append_copies(plan_, i, range.context_rank, starts[i - range.first], copies);
    }
    constexpr py::ssize_t kFields = sizeof(Copy) / sizeof(int64_t);
    const py::ssize_t count = static_cast<py::ssize_t>(copies.size());
    return py::array_t<int64_t>({count, kFields}, reinterpret_cast<const int64_t*>(copies.data()));
  }

  // int32: the buffer that copies of kFromHeaders index.
  py::array_t<int32_t> headers() const {
    return py::array_t<int32_t>(static_cast<py::ssize_t>(plan_.headers.size()), plan_.headers.data());
  }

  // Boundaries and segments of every rank's micro-batches.
  void fill_segments(const py::dict& given) const {
    const SegmentExtent n = extent_of_segments(plan_);
    SegmentBuffers out;
    out.cu_seqlens = buffer<int32_t>(given, "cu_seqlens", n.seqlens);
    out.cu_prefix = buffer<int32_t>(given, "cu_prefix", n.sides + n.micro_batches);
    out.cu_response_side = buffer<int32_t>(given, "cu_response_side", n.sides + n.micro_batches);
    out.cu_response = buffer<int32_t>(given, "cu_response", n.segments + n.micro_batches);
    out.rollout = buffer<int32_t>(given, "rollout_S", n.segments);
    out.group = buffer<int32_t>(given, "group_S", n.segments);
    out.scale = buffer<float>(given, "scale_S", n.segments);
    out.chunk_segment = buffer<int32_t>(given, "segment_W", n.chunks);
    out.chunk_start = buffer<int32_t>(given, "start_W", n.chunks);
    out.chunk_length = buffer<int32_t>(given, "length_W", n.chunks);
    bicc::fill_segments(plan_, out);
  }

  // Rows of one rank's micro-batches.
  void fill_rows(const py::object& rank, const py::object& context_rank, const py::dict& given,
                 const py::object& thread_count) const {
    const RankRange range = range_of(rank, context_rank);
    const RowExtent n = starts_of(plan_, range).back();
    int64_t threads = read<int64_t>(thread_count, "threads");
    if (threads < 0 || threads > 1024) fail("threads is ", threads, "; it must be in [0, 1024], 0 to choose");
    if (threads == 0) threads = default_threads(n.rows);
    RowBuffers out;
    out.tokens = buffer<int32_t>(given, "tokens_N", n.rows);
    out.positions = buffer<int32_t>(given, "positions_N", n.rows);
    out.labels = buffer<int32_t>(given, "labels_N", n.rows);
    out.gather = buffer<int64_t>(given, "gather_A", n.response_rows);
    py::gil_scoped_release release;
    bicc::fill_rows(plan_, range, threads, out);
  }

 private:
  RankRange range_of(const py::object& rank_number, const py::object& context_rank_number) const {
    const int64_t rank = read_rank(rank_number, "rank", plan_.ranks());
    const int64_t context_rank = read_rank(context_rank_number, "context_rank", plan_.settings.context_ranks);
    const int64_t slots = static_cast<int64_t>(plan_.sizes.size()) / plan_.ranks();
    return {rank * slots, (rank + 1) * slots, context_rank};
  }

  static int64_t read_rank(const py::object& number, const char* name, int64_t ranks) {
    const int64_t rank = read<int64_t>(number, name);
    if (rank < 0 || rank >= ranks) fail(name, " is ", rank, "; it must be in [0, ", ranks - 1, "]");
    return rank;
  }

  // One thread per million rows, at most one per core: for fewer rows, starting a thread costs more than it saves.
  static int64_t default_threads(int64_t rows) {
    const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    return std::clamp<int64_t>(rows >> 20, 1, cores);
  }

  template <class T>
  static T* buffer(const py::dict& buffers, const char* name, int64_t size) {
    if (!buffers.contains(name)) fail("buffer ", name, " is missing");
    py::array array = checked<T>(buffers[name], std::string("buffer ") + name, 1);
    if (!array.writeable()) fail("buffer ", name, " is read-only");
    if (array.size() != size) fail("buffer ", name, " holds ", array.size(), " items; the plan needs ", size);
    return static_cast<T*>(array.mutable_data());
  }

  py::array prompt_tokens_;
  py::array tokens_;
  Plan plan_;
};

}  // namespace
}  // namespace bicc

PYBIND11_MODULE(_C, m) {
  m.doc() = "The bilateral packer; use megatron_bicc.packing.";
  py::class_<bicc::PlanHandle>(m, "Plan")
      .def(py::init<const py::object&, const py::object&, const py::object&>(), py::arg("batch"), py::arg("settings"),
           py::arg("dp_size"))
      .def_property_readonly("sizes", &bicc::PlanHandle::sizes)
      .def_property_readonly("shares", &bicc::PlanHandle::shares)
      .def("rows", &bicc::PlanHandle::rows, py::arg("rank"), py::arg("context_rank"))
      .def_property_readonly("side_table", &bicc::PlanHandle::side_table)
      .def_property_readonly("counts", &bicc::PlanHandle::counts)
      .def("copies", &bicc::PlanHandle::copies, py::arg("rank"), py::arg("context_rank"))
      .def_property_readonly("headers", &bicc::PlanHandle::headers)
      .def("fill_segments", &bicc::PlanHandle::fill_segments, py::arg("buffers"))
      .def("fill_rows", &bicc::PlanHandle::fill_rows, py::arg("rank"), py::arg("context_rank"), py::arg("buffers"),
           py::arg("threads"));
}
