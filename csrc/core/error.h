// One way to fail: MOE_CHECK(condition, message pieces...) throws moe::Error with file:line:condition.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace moe {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const char* where, const char* condition, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  text << " [" << where << ": " << condition << "]";
  throw Error(text.str());
}

}  // namespace moe

#define MOE_STRING_(x) #x
#define MOE_STRING(x) MOE_STRING_(x)
#define MOE_CHECK(condition, ...)                                                              \
  do {                                                                                         \
    if (!(condition)) ::moe::fail(__FILE__ ":" MOE_STRING(__LINE__), #condition, __VA_ARGS__); \
  } while (0)
