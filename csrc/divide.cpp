#include "divide.h"

#include <algorithm>
#include <numeric>

namespace bicc {
namespace {

// A segment of more than 1 / kWhole of a rank's mean cost is cut. Whole segments of up to that cost fill the ranks
// evenly; cutting shorter ones gains nothing and makes the others read their keys (docs/packing.md).
constexpr int64_t kWhole = 8;

int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

int64_t cost_of(const Segment& segment, int64_t start, int64_t length, int64_t token_cost) {
  return (token_cost + segment.prefix_rows) * length + triangle(start + length) - triangle(start);
}

class Divider {
 public:
  Divider(const std::vector<Segment>& segments, int64_t ranks, int64_t capacity, int64_t token_cost)
      : segments_(segments), capacity_(capacity), token_cost_(token_cost), shares_(ranks) {}

  std::vector<Share> divide() {
    if (ranks() == 1) {
      shares_[0].chunks.reserve(segments_.size());
      for (int64_t segment = 0; segment < static_cast<int64_t>(segments_.size()); ++segment) add_whole(0, segment);
      return std::move(shares_);
    }
    std::vector<int64_t> costs, order(segments_.size());
    for (const Segment& segment : segments_) costs.push_back(cost_of(segment, 0, segment.rows, token_cost_));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
    const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
    const int64_t largest_whole = total / (ranks() * kWhole);
    for (const int64_t segment : order) {
      const int64_t rank = costs[segment] > largest_whole ? ranks() : cheapest_with_room(segments_[segment].rows);
      if (rank < ranks()) {
        add_whole(rank, segment);
      } else {
        cut(segment);
      }
    }
    for (Share& share : shares_) {
      std::sort(share.chunks.begin(), share.chunks.end(), [](const Chunk& a, const Chunk& b) {
        return a.segment != b.segment ? a.segment < b.segment : a.start < b.start;
      });
    }
    return std::move(shares_);
  }

 private:
  int64_t ranks() const { return static_cast<int64_t>(shares_.size()); }

  // Returns ranks() if no rank has room.
  int64_t cheapest_with_room(int64_t rows) const {
    int64_t best = ranks();
    for (int64_t rank = 0; rank < ranks(); ++rank) {
      if (rows > capacity_ - shares_[rank].rows) continue;
      if (best == ranks() || shares_[rank].cost < shares_[best].cost) best = rank;
    }
    return best;
  }

  void cut(int64_t segment) {
    const std::vector<int64_t> rows = even_rows(segments_[segment].rows);
    int64_t start = 0;
    for (int64_t rank = 0; rank < ranks(); ++rank) start = add(rank, {segment, start, (rows[rank] + 1) / 2});
    for (int64_t rank = ranks() - 1; rank >= 0; --rank) start = add(rank, {segment, start, rows[rank] / 2});
  }

  // Splits `length` rows over the ranks as evenly as their room allows.
  std::vector<int64_t> even_rows(int64_t length) const {
    std::vector<int64_t> rows(ranks()), order(ranks());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return shares_[a].rows > shares_[b].rows; });
    // From the least room to the most: what one rank cannot take is left to the others.
    for (int64_t i = 0; i < ranks(); ++i) {
      rows[order[i]] = std::min(capacity_ - shares_[order[i]].rows, length / (ranks() - i));
      length -= rows[order[i]];
    }
    return rows;
  }

  void add_whole(int64_t rank, int64_t segment) { add(rank, {segment, 0, segments_[segment].rows}); }

  // Returns the end of the chunk. One that continues the rank's last is joined to it: the two in the middle of a
  // segment, for one.
  int64_t add(int64_t rank, const Chunk& chunk) {
    const int64_t end = chunk.start + chunk.length;
    if (chunk.length == 0) return end;
    Share& share = shares_[rank];
    if (!share.chunks.empty() && continues(share.chunks.back(), chunk)) {
      share.chunks.back().length += chunk.length;
    } else {
      share.chunks.push_back(chunk);
    }
    share.rows += chunk.length;
    share.cost += cost_of(segments_[chunk.segment], chunk.start, chunk.length, token_cost_);
    return end;
  }

  static bool continues(const Chunk& last, const Chunk& next) {
    return last.segment == next.segment && last.start + last.length == next.start;
  }

  const std::vector<Segment>& segments_;
  const int64_t capacity_, token_cost_;
  std::vector<Share> shares_;
};

}  // namespace

std::vector<Share> divide(const std::vector<Segment>& segments, int64_t ranks, int64_t capacity, int64_t token_cost) {
  return Divider(segments, ranks, capacity, token_cost).divide();
}

}  // namespace bicc
