// What a program has and a library in Python has not (_standin.a alone): FORWARDPASS_INTERPRET says which GPU there is,
// a finding is printed when it is made and the program then exits non-zero, whatever it makes of the error itself.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iomanip>
#include <sstream>

#include "standin.h"

namespace {

constexpr int kFoundSomething = 3;
bool has_finding = false;

void print(const char* text, int error) {
  std::fflush(stdout);
  std::fprintf(stderr, "%s\n", text);
  has_finding |= error != cudaErrorAssert;  // a failed assertion is the program's own finding
}

void leave(int status, void*) {
  if (!has_finding || status) return;
  std::fflush(nullptr);
  _exit(kFoundSomething);
}

// Before the constructors of the program, so that `leave` comes after its destructors.
__attribute__((constructor(101))) void begin() {
  const char* arch = std::getenv("FORWARDPASS_INTERPRET");
  if (!arch || fpi_set_device(arch)) {
    std::fprintf(stderr,
                 "This program runs on the forwardpass interpreter: FORWARDPASS_INTERPRET has to be sm_80 (A100), "
                 "sm_89 (L40S), sm_90a (H100) or sm_120 (RTX PRO 6000), and is %s\n",
                 arch ? arch : "not set");
    _exit(2);
  }
  fpi_options options;
  fpi_get_options(&options);
  if (const char* seed = std::getenv("FORWARDPASS_INTERPRET_SEED"))  // not strtoull: it binds programs to glibc 2.38
    std::istringstream(seed) >> std::setbase(0) >> options.seed;
  fpi_set_options(&options);
  fpi_on_finding(print);
  forwardpass::standin::errors_stick = true;
  on_exit(leave, nullptr);
}

}  // namespace
