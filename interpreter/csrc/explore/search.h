#pragma once
// The orders of a launch's synchronisation, one after the other: stateless search with dynamic partial-order reduction
// (Flanagan and Godefroid, POPL 2005; Abdulla et al., POPL 2014). Each order is run from the beginning. Wherever two of
// its events could come the other way round, the orders that begin so are tried; beginnings and orders that differ in
// nothing but what nobody can tell are one. So all orders are found, if the bound allows it.
#include <string>

#include "machine.h"

namespace gpuless {

// Before the launch itself runs: tries Options::explore orders, or repeats that of Options::schedule. Fills in
// Launch::explored, and throws the finding of an order, with a schedule that repeats it. Global memory is as before.
void explore(Launch&);

// What has been explored of a launch, for those who ask.
struct ExploredLaunch : Explored {
  std::string kernel;
  uint64_t launch = 0;  // its number since the seed was set
  std::string text() const;
  std::string json() const;
};

// What is wrong with the text of a schedule; null: nothing.
const char* wrong_schedule(const std::string&);

}  // namespace gpuless
