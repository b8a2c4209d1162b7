#include "plan.h"

#include <algorithm>
#include <numeric>
#include <queue>

#include "error.h"
#include "validate.h"

namespace bicc {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The cost of a bin or rank is part of this sum: if the sum does not overflow, they do not.
void check_total_cost(const Pieces& pieces) {
  int64_t total = 0;
  for (const Piece& piece : pieces.pieces) {
    if (__builtin_add_overflow(total, piece.cost, &total)) {
      fail("the step's cost (PackingSettings.token_cost * rows + attention pairs) exceeds 2^63; "
           "give fewer or shorter responses");
    }
  }
}

int64_t cost_of(const Pieces& pieces, const Bin& bin) {
  int64_t cost = 0;
  for (const int64_t piece : bin) cost += pieces.pieces[piece].cost;
  return cost;
}

// For several ranks: rounds the number of bins up to a multiple of dp_size and spreads the pieces evenly over them.
std::vector<Bin> make_bins(const Pieces& pieces, int64_t capacity, int64_t dp_size) {
  std::vector<int64_t> rows;
  for (const Piece& piece : pieces.pieces) rows.push_back(piece.rows);
  std::vector<Bin> bins = fill_bins(rows, capacity);
  if (dp_size == 1) return bins;
  const int64_t wanted = round_up(bins.size(), dp_size);
  bins = fill_bins(rows, even_limit(rows, capacity, wanted));
  bins.resize(wanted);
  return bins;
}

// Assigns the costliest bin first, to the rank of least cost with a free slot (ties: lowest rank). So a rank's
// micro-batches come in order of decreasing cost, and a step that runs out of memory does so at its start.
void assign_to_ranks(Plan& plan, std::vector<Bin> bins, int64_t dp_size) {
  check_total_cost(plan.pieces);
  std::vector<int64_t> costs(bins.size()), order(bins.size());
  for (size_t b = 0; b < bins.size(); ++b) costs[b] = cost_of(plan.pieces, bins[b]);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  const int64_t slots = static_cast<int64_t>(bins.size()) / dp_size;
  using CostAndRank = std::pair<int64_t, int64_t>;
  std::priority_queue<CostAndRank, std::vector<CostAndRank>, std::greater<>> open;
  for (int64_t rank = 0; slots > 0 && rank < dp_size; ++rank) open.push({0, rank});
  std::vector<int64_t> used(dp_size, 0), rank_costs(dp_size, 0);
  plan.micro_batches.resize(bins.size());
  for (const int64_t bin : order) {
    const int64_t rank = open.top().second;
    open.pop();
    rank_costs[rank] += costs[bin];
    plan.micro_batches[rank * slots + used[rank]++] = std::move(bins[bin]);
    if (used[rank] < slots) open.push({rank_costs[rank], rank});
  }
}

// The prefixes of all sides, then the responses.
std::vector<Segment> segments_of(const Plan& plan, const Bin& bin) {
  std::vector<Segment> segments;
  size_t count = bin.size();
  for (const int64_t p : bin) count += plan.pieces.pieces[p].last_response - plan.pieces.pieces[p].first_response;
  segments.reserve(count);
  const auto prefix_rows = [&](const Piece& piece) { return plan.sides.sides[piece.side].prefix_tokens - 1; };
  for (const int64_t p : bin) segments.push_back({prefix_rows(plan.pieces.pieces[p]), 0});
  for (const int64_t p : bin) {
    const Piece& piece = plan.pieces.pieces[p];
    for (int64_t r = piece.first_response; r < piece.last_response; ++r) {
      segments.push_back({plan.batch.length(plan.pieces.responses[r]), prefix_rows(piece)});
    }
  }
  return segments;
}

ContextShare context_share(Share share, int64_t sides, int64_t alignment) {
  ContextShare out;
  for (const Chunk& chunk : share.chunks) (chunk.segment < sides ? out.prefix_rows : out.response_rows) += chunk.length;
  out.rows = round_up(std::max<int64_t>(share.rows, 1), alignment);
  out.chunks = std::move(share.chunks);
  return out;
}

// Divides every micro-batch over the context ranks; sets sizes, shares and rank_costs.
void divide_micro_batches(Plan& plan, int64_t dp_size) {
  const Settings& settings = plan.settings;
  const int64_t ranks = settings.context_ranks, slots = static_cast<int64_t>(plan.micro_batches.size()) / dp_size;
  plan.rank_costs.assign(dp_size * ranks, 0);
  for (size_t m = 0; m < plan.micro_batches.size(); ++m) {
    const std::vector<Segment> segments = segments_of(plan, plan.micro_batches[m]);
    MicroBatchSize size;
    size.sides = static_cast<int64_t>(plan.micro_batches[m].size());
    size.segments = static_cast<int64_t>(segments.size()) - size.sides;
    std::vector<Share> shares = divide(segments, ranks, settings.rank_capacity(), settings.token_cost);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      plan.rank_costs[static_cast<int64_t>(m) / slots * ranks + rank] += shares[rank].cost;
      plan.shares.push_back(context_share(std::move(shares[rank]), size.sides, settings.alignment));
      size.rows += plan.shares.back().rows;
      size.prefix_rows += plan.shares.back().prefix_rows;
      size.response_rows += plan.shares.back().response_rows;
    }
    plan.sizes.push_back(size);
  }
}

}  // namespace

Plan make_plan(Batch batch, Settings settings, int64_t dp_size) {
  validate(settings, dp_size);
  validate(batch, settings);
  Plan plan;
  plan.batch = std::move(batch);
  plan.settings = std::move(settings);
  for (const auto* header : {&plan.settings.wrong_header, &plan.settings.right_header, &plan.settings.answer_header}) {
    plan.headers.insert(plan.headers.end(), header->begin(), header->end());
  }
  plan.sides = make_sides(plan.batch, plan.settings);
  plan.pieces = split_sides(plan.batch, plan.settings, plan.sides);
  assign_to_ranks(plan, make_bins(plan.pieces, plan.settings.capacity(), dp_size), dp_size);
  plan.segments_of.assign(plan.batch.rollouts(), 0);
  for (const int64_t rollout : plan.pieces.responses) ++plan.segments_of[rollout];
  for (const Bin& bin : plan.micro_batches) plan.filled_bins += !bin.empty();
  divide_micro_batches(plan, dp_size);
  return plan;
}

}  // namespace bicc
