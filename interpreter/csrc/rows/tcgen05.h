#pragma once
// What a warp has under way of tcgen05, PTX ISA 9.7.16.
//
// Products, copies and commits go to the tensor cores in order: to the race check they are a series, which knows what
// their issuers knew and what was issued before. A commit's mbarrier gives all of that away.
// tcgen05.ld and tcgen05.st take place at once here, as series of their own that are known to the warp from the wait
// on, or from where it reads a register of the load: the ISA wants the wait even then, but ptxas has instructions wait
// for the registers that they read, as for any load's, and CUTLASS's epilogues rely on it.
#include <memory>
#include <vector>

#include "machine.h"

namespace gpuless {

class Bind;

// The loads of a warp that it does not know to be over, and their registers.
class Loads {
 public:
  bool empty() const { return !unknown_; }
  // The next one, in a series that none under way has: they become known in any order.
  Actor begin(const Warp&, const Offset* registers, int count);
  void over(Warp&);                          // all of them
  void before(Warp&, const Instruction& i);  // which reads some register, or makes another value of it
  const Frame* frame() const { return frame_; }

 private:
  struct Load {  // the last of a series
    int series;
    Clock now;
    bool known;
  };
  void learn(Warp&, Load&);
  std::vector<Load> loads_;
  std::vector<uint16_t> by_register_;  // by offset / 64: 1 + the load
  int unknown_ = 0;
  const Frame* frame_ = nullptr;
};

struct Tcgen05 {  // of one warp
  Loads loads;
  int stores = -1;    // their series
  Clock stored = 0;   // the time of the last one; 0: the warp knows of all
  int series = -1;    // of what was issued to the tensor cores
  Knowledge history;  // of all that was issued to them
  uint64_t issued = 0, completed = 0;
};

Tcgen05& tcgen05_of(Warp&);

// One instruction of the tensor cores' queue.
struct TensorOperation : Pending {
  std::shared_ptr<Tcgen05> queue;
  uint64_t number = 0;
  Clock now = 0;
  Knowledge knowledge;

  bool ready(Cta&) const override { return queue->completed + 1 == number; }
  void complete(Cta& cta) override {
    cta.cluster->complement(knowledge);
    perform(cta);
    ++queue->completed;
  }
  virtual void perform(Cta&) = 0;
  Actor actor(Proxy) const;
};
void issue(Warp&, const Instruction&, std::shared_ptr<TensorOperation>);

// The CTAs that an instruction is for: the issuer's, or the pair of even and odd rank, the even one first.
struct CtaGroup {
  Cta* ctas[2] = {};
  int count = 1;
};
CtaGroup group_of(const Warp&, bool pair);

// A finding where a descriptor of shared memory is illegal.
void require_descriptor(const Warp&, uint64_t bits, const char* what, int lane);

}  // namespace gpuless
