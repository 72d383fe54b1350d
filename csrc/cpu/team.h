#pragma once
// Threads of one parallel_for that meet between the steps of a call: a step of a decoder has some two hundred, and to
// fork and join threads for each takes as long as the small ones of them.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/few_rows.h"

namespace forwardpass::cpu {

struct Range {
  int64_t first, last;
};

// What is to be done has so many shares, of which each thread has some, perhaps one thread all. A thread that throws
// leaves the others waiting: arguments are checked, and shared memory is allocated, before a team begins.
class Team {
 public:
  explicit Team(int64_t shares) : shares_(shares) {}

  int64_t shares() const { return shares_; }

  // member(begin, end) by each thread, with its shares. Whoever has all is no part of a parallel_for: what it calls may
  // take all threads.
  template <class F>
  void run(F member) {
    if (shares_ == 1) return member(0, 1);
    torch::stable::parallel_for(0, shares_, 1, member);
  }

  // Returns once this was called for all shares; `shares` of them are the caller's.
  void wait(int64_t shares) {
    const uint32_t before = meetings_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(shares, std::memory_order_acq_rel) + shares == shares_) {
      arrived_.store(0, std::memory_order_relaxed);
      meetings_.fetch_add(1, std::memory_order_release);
      return meetings_.notify_all();
    }
    for (int i = 0; i < kSpins; ++i) {
      if (meetings_.load(std::memory_order_acquire) != before) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    while (meetings_.load(std::memory_order_acquire) == before) meetings_.wait(before, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 10000;  // some 100 us; where cores are shared with others, threads sleep then

  const int64_t shares_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> meetings_{0};
};

// A thread of a team, which has the shares from `begin` to `end`.
class TeamMember {
 public:
  TeamMember(Team& team, int64_t begin, int64_t end) : team_(team), begin_(begin), end_(end) {}

  void meet() { team_.wait(end_ - begin_); }

  // Which of n things are this thread's.
  Range range(int64_t n) const { return {n * begin_ / team_.shares(), n * end_ / team_.shares()}; }
  // Which of n columns of a product.
  Range columns(int64_t n) const {
    const auto [first, last] = range((n + kGroupColumns - 1) / kGroupColumns);
    return {std::min(n, first * kGroupColumns), std::min(n, last * kGroupColumns)};
  }

 private:
  Team& team_;
  const int64_t begin_, end_;
};

}  // namespace forwardpass::cpu
