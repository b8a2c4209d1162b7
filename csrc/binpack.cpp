#include "binpack.h"

#include <algorithm>
#include <numeric>

namespace bicc {
namespace {

// Candidates for the larger piece of a pair: more gain little and cost time (docs/packing.md).
constexpr int kPairCandidates = 32;

// Pieces by decreasing rows; path-compressed links skip those already packed.
class Shelf {
 public:
  explicit Shelf(const std::vector<int64_t>& rows) : order_(rows.size()), next_(rows.size() + 1) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return rows[a] > rows[b]; });
    for (const int64_t piece : order_) rows_.push_back(rows[piece]);
    std::iota(next_.begin(), next_.end(), 0);
  }

  int64_t end() const { return static_cast<int64_t>(order_.size()); }
  int64_t rows(int64_t place) const { return rows_[place]; }

  // First piece left at or after `place`.
  int64_t at_or_after(int64_t place) {
    while (next_[place] != place) {
      next_[place] = next_[next_[place]];
      place = next_[place];
    }
    return place;
  }

  // First piece left at or after `place` of at most `gap` rows.
  int64_t fitting(int64_t place, int64_t gap) {
    const auto first = std::partition_point(rows_.begin(), rows_.end(), [&](int64_t rows) { return rows > gap; });
    return at_or_after(std::max<int64_t>(place, first - rows_.begin()));
  }

  int64_t take(int64_t place) {
    next_[place] = place + 1;
    return order_[place];
  }

 private:
  std::vector<int64_t> order_, rows_, next_;
};

struct Choice {
  int64_t first, second;  // places on the shelf; second == end: a single piece
  int64_t rows;
};

// The piece or pair that fills `gap` best. The larger piece comes first, so its partner is found by bisection.
Choice best_choice(Shelf& shelf, int64_t gap) {
  const int64_t end = shelf.end();
  int64_t first = shelf.fitting(0, gap);
  if (first == end) return {end, end, 0};
  Choice best{first, end, shelf.rows(first)};
  for (int tried = 0; first != end && tried < kPairCandidates && best.rows < gap; ++tried) {
    const int64_t second = shelf.fitting(first + 1, gap - shelf.rows(first));
    if (second != end && shelf.rows(first) + shelf.rows(second) > best.rows) {
      best = {first, second, shelf.rows(first) + shelf.rows(second)};
    }
    first = shelf.at_or_after(first + 1);
  }
  return best;
}

}  // namespace

std::vector<Bin> fill_bins(const std::vector<int64_t>& rows, int64_t limit) {
  Shelf shelf(rows);
  std::vector<Bin> bins;
  for (int64_t largest = shelf.at_or_after(0); largest != shelf.end(); largest = shelf.at_or_after(largest)) {
    int64_t gap = limit - shelf.rows(largest);
    Bin bin{shelf.take(largest)};
    for (Choice choice = best_choice(shelf, gap); choice.rows > 0; choice = best_choice(shelf, gap)) {
      bin.push_back(shelf.take(choice.first));
      if (choice.second != shelf.end()) bin.push_back(shelf.take(choice.second));
      gap -= choice.rows;
    }
    std::sort(bin.begin(), bin.end());
    bins.push_back(std::move(bin));
  }
  return bins;
}

int64_t even_limit(const std::vector<int64_t>& rows, int64_t capacity, int64_t bins) {
  if (rows.empty()) return capacity;
  const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  int64_t low = std::max(*std::max_element(rows.begin(), rows.end()), (total + bins - 1) / bins);
  int64_t high = capacity;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(fill_bins(rows, middle).size()) <= bins) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return high;
}

}  // namespace bicc
