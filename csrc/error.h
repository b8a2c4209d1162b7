// Errors that a caller can mend: they reach Python as ValueError with a one-line message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace bicc {

class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Throws InputError with its arguments written one after another.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InputError(message.str());
}

}  // namespace bicc
