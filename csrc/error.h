// Errors in the caller's input: Python gets a ValueError with a one-line message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace bicc {

class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Throws InputError; the message is the concatenated arguments.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InputError(message.str());
}

}  // namespace bicc
