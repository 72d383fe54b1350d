#pragma once
// What a warp has under way of tcgen05, PTX ISA 9.7.16.
//
// Products, copies and commits go to the tensor cores in order: to the race check those between two commits are one
// agent, which knows what their issuer knew and what was issued before. A commit's mbarrier gives all of that away.
// tcgen05.ld and tcgen05.st take place at once here; the agent whose accesses they are is known to the warp from the
// wait on, or from where it reads a register of the load: the ISA wants the wait even then, but ptxas has instructions
// wait for the registers that they read, as for any load's, and CUTLASS's epilogues rely on it.
#include <memory>
#include <vector>

#include "interpreter/machine.h"

namespace forwardpass::interpreter {

class Bind;

// The loads of a warp that it does not know to be over, and their registers.
class Loads {
 public:
  bool empty() const { return !unknown_; }
  void begin(const Warp&, const Offset* registers, int count, int agent, Clock now);
  void over(Warp&);                          // all of them
  void before(Warp&, const Instruction& i);  // which reads some register, or makes another value of it
  const Frame* frame() const { return frame_; }

 private:
  struct Load {
    int agent;
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
  int store_agent = -1;  // of the stores since the last wait; -1: none
  Clock stored = 0;
  int agent = -1;     // of what was issued to the tensor cores since the last commit; -1: nothing
  Knowledge history;  // of all that was issued to them
  uint64_t issued = 0, completed = 0;
};

Tcgen05& tcgen05_of(Warp&);

// One instruction of the tensor cores' queue.
struct TensorOperation : Pending {
  std::shared_ptr<Tcgen05> queue;
  uint64_t number = 0;
  int agent = 0;
  Clock now = 0;
  Knowledge knowledge;

  bool ready(Cta&) const override { return queue->completed + 1 == number; }
  void complete(Cta& cta) override {
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

}  // namespace forwardpass::interpreter
