// A loop over independent items on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace bicc {

// Calls body(i) once for every i in [0, n), in any order, on the calling thread and others, each of which makes its
// own body by make_body(). If the system cannot start a thread, the running ones do its work. Rethrows an exception of a
// body when all threads are done.
template <class MakeBody>
void parallel_for(int64_t n, int64_t threads, const MakeBody& make_body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&] {
    try {
      auto body = make_body();
      for (int64_t i = next++; i < n; i = next++) body(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(std::min(threads, n)));
  try {
    for (int64_t t = 1; t < threads && t < n; ++t) helpers.emplace_back(work);
  } catch (const std::exception&) {
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace bicc
