// What the shadow says of an access that is at fault.
#include <algorithm>

#include "machine.h"
#include "mbarrier.h"
#include "shadow.h"
#include "tensor_memory.h"

namespace gpuless {
namespace {

constexpr char kUnordered[] = ": nothing orders the two, such as a barrier, or a release and an acquire";

const char* verb(Use use) { return use == Use::atomic ? "atomic" : is_write(use) ? "write" : "read"; }

}  // namespace

SourceLine source_line(const Module& module, uint32_t ptx_line) {
  for (const auto& f : module.source.functions) {
    for (const Statement& s : f.body) {
      const ptx::Location& l = module.source.outermost(s.location);
      if (s.line == static_cast<int>(ptx_line) && l.file) return {module.source.files[l.file], l.line};
    }
  }
  return {};
}

std::string source_place(const Module& module, uint32_t ptx_line) {
  const SourceLine source = source_line(module, ptx_line);
  return source.line ? shown(source.file) + ":" + std::to_string(source.line) : "PTX line " + std::to_string(ptx_line);
}

std::string Shadow::name_of(int agent) const {
  if (cta_->cluster->is_series(agent)) return "an asynchronous operation";
  const int warp = (agent - kFirstWarp) % warps_, rank = (agent - kFirstWarp) / warps_;
  const bool alone = cta_->launch->cluster_size() == 1;
  return "warp " + std::to_string(warp) + (alone ? "" : " of the CTA of rank " + std::to_string(rank));
}

std::string Shadow::access_by(const char* verb, int agent, uint32_t line) const {
  const std::string where = line ? source_place(*cta_->launch->module, line) : "";
  const char* before = !line ? "" : cta_->cluster->is_series(agent) ? " issued at " : " at ";
  return std::string(verb) + " by " + name_of(agent) + before + where;
}

void Shadow::report(Kind kind, uint32_t address, std::string message, uint32_t other_line, Breaks breaks) const {
  Finding f = finding_at(kind, std::move(message), address);
  f.breaks = breaks;
  cta_->place_other(f, other_line);
  cta_->cluster->report(std::move(f));
}

bool Shadow::idle_mbarrier(uint32_t address) const {
  const auto object = cta_->mbarriers.find(address / 8 * 8);
  return object != cta_->mbarriers.end() && object->second->untouched();
}

std::string Shadow::range(uint32_t begin, uint32_t bytes) const {
  if (space_ == Space::shared) return "shared " + hexadecimal(begin) + ".." + hexadecimal(begin + bytes);
  const uint32_t column = begin / kGranule % TensorMemory::kColumns;
  const uint32_t lane = begin / kGranule / TensorMemory::kColumns * kGranule + begin % kGranule;
  return "tensor memory, column " + std::to_string(column) + ", lanes " + std::to_string(lane) + ".." +
         std::to_string(lane + bytes);
}

void Shadow::check_state(const Actor& actor, const Granule& g, uint32_t number, uint16_t mask, Use use) const {
  const uint32_t start = number * kGranule;
  const uint16_t barriers = (g.mbarriers & 1 ? 0x00ff : 0) | (g.mbarriers & 2 ? 0xff00 : 0);
  if (const uint16_t bad = mask & barriers; bad && !cta_->cluster->again(Kind::mbarrier, 0)) {
    const uint32_t half = start + (bad & 0xff ? 0 : 8);
    const bool idle = is_write(use) && idle_mbarrier(half);
    report(Kind::mbarrier, half,
           access_by(verb(use), actor.agent, actor.line) + " of the mbarrier object at " + hexadecimal(half) +
               ", which mbarrier.inval has not ended" + (idle ? kNobodyCame : ""),
           0, idle ? Breaks::isa : Breaks::hardware);
  }
  if (const uint16_t bad = mask & g.flying) {
    const uint32_t byte = __builtin_ctz(bad);
    const Cell& cell = cells_[g.shift == 4 ? number : g.split + (byte >> g.shift)];
    if (!cta_->cluster->again(Kind::in_flight, cell.write_line)) {
      report(Kind::in_flight, start + byte,
             access_by("write", cell.writer, cell.write_line) + ", then " +
                 access_by(verb(use), actor.agent, actor.line) + " of " + range(start + byte, __builtin_popcount(bad)) +
                 ", which the first is still writing",
             cell.write_line);
    }
  }
  const uint16_t bad = is_read(use) && use != Use::load ? mask & ~g.written : 0;
  if (bad && !cta_->cluster->again(Kind::uninitialised, 0)) {
    cta_->cluster->report(unwritten_bytes(actor, number, bad, use));
  }
}

Finding Shadow::unwritten_bytes(const Actor& actor, uint32_t number, uint16_t bad, Use use) const {
  const uint32_t address = number * kGranule + __builtin_ctz(bad);
  return finding_at(Kind::uninitialised,
                    access_by(verb(use), actor.agent, actor.line) + " of " + range(address, __builtin_popcount(bad)) +
                        ", which nothing has written",
                    address);
}

std::string Shadow::writer_of(uint32_t begin) const {
  const uint32_t number = begin / kGranule, byte = begin % kGranule;
  if (number >= granules_.size() || !(granules_[number].written >> byte & 1)) return "";
  const Granule& g = granules_[number];
  const Cell& cell = cells_[g.shift == 4 ? number : g.split + (byte >> g.shift)];
  return access_by("write", cell.writer, cell.write_line);
}

void Shadow::check_write(const Actor& actor, uint32_t index, uint32_t number, uint16_t mask, Use use, bool write_seen) {
  const Cell& cell = cells_[index];
  const Kind kind = !write_seen && cta_->cluster->is_series(cell.writer) ? Kind::in_flight : Kind::race;
  if (use != Use::store && cta_->cluster->again(kind, cell.write_line)) return;
  const uint32_t address = number * kGranule + __builtin_ctz(mask), bytes = __builtin_popcount(mask);
  const std::string both = access_by("write", cell.writer, cell.write_line) + ", then " +
                           access_by(verb(use), actor.agent, actor.line) + " of " + range(address, bytes);
  if (write_seen) {
    const bool idle = is_write(use) && idle_mbarrier(address);
    const char* const after =
        cell.copied() ? "wait for that copy; CUTLASS has none, and GPUs seem not to mind" : "write";
    return report(kind, address,
                  both + " through the async proxy: between them a fence.proxy.async is missing, after the " + after,
                  cell.write_line, cell.copied() || idle ? Breaks::isa : Breaks::hardware);
  }
  if (kind == Kind::in_flight)
    return report(kind, address, both + ": nothing has waited for the first", cell.write_line);
  if (use != Use::store) return report(kind, address, both + kUnordered, cell.write_line);
  Finding f = finding_at(kind, both + kUnordered, address);
  cta_->place_other(f, cell.write_line);
  doubt(number, mask, std::move(f));
}

void Shadow::doubt(uint32_t number, uint16_t mask, Finding finding) {
  cta_->cluster->place(finding);  // while the lanes are known
  Doubt doubt{number, mask, {}, std::move(finding)};
  const auto& shared = cta_->shared;
  const size_t begin = number * kGranule;
  std::copy_n(shared.data() + begin, std::min<size_t>(kGranule, shared.size() - begin), doubt.before.begin());
  doubts_.push_back(std::move(doubt));
}

void Shadow::check_lanes(const Actor& actor, uint32_t index, uint32_t number, Use use, LaneSet now, bool write) {
  const Cell& cell = cells_[index];
  const uint32_t line = write ? cell.write_line : cell.read_line;
  // Lanes that one instruction has write to one place are no race: one of the values stays, as with any one writer.
  if (write && is_write(use) && cell.clock == actor.now && line == actor.line) return;
  const LaneOrder::Clash clash =
      actor.lanes.order->clash(write ? cell.writers() : cell.readers(), write ? cell.clock : cell.read_since, now,
                               granules_[number].shift, write);
  if (clash.lane < 0) return;
  if (use != Use::store && cta_->cluster->again(Kind::race, line, true)) return;
  const uint32_t offset = address_of(index, number) - number * kGranule;
  const auto mask = static_cast<uint16_t>(clash.bytes << offset);
  const uint32_t address = number * kGranule + __builtin_ctz(mask);
  const Module& module = *cta_->launch->module;
  const auto by_lane = [&](const std::string& verb, int lane, uint32_t l) {
    return verb + " by lane " + std::to_string(lane) + " at " + source_place(module, l);
  };
  const std::string access = verb(use) + std::string(cta_->cluster->is_series(actor.agent) ? " issued" : "");
  Finding f = finding_at(
      Kind::race,
      by_lane(write ? "write" : "read", clash.other, line) + ", then " + by_lane(access, clash.lane, actor.line) +
          " of " + range(address, __builtin_popcount(mask)) +
          ": no __syncwarp (bar.warp.sync) or barrier orders these lanes of one warp, " + name_of(actor.lanes.agent),
      address);
  f.lane = clash.lane;
  f.within_warp = true;
  cta_->place_other(f, line);
  if (use != Use::store || !write) return cta_->cluster->report(std::move(f));
  doubt(number, mask, std::move(f));
}

void Shadow::settle_doubts() {
  for (const Doubt& doubt : std::exchange(doubts_, {})) {
    const uint8_t* now = cta_->shared.data() + doubt.number * kGranule;
    for (uint32_t byte = 0; byte < kGranule; ++byte)
      if ((doubt.mask >> byte & 1) && now[byte] != doubt.before[byte]) {
        cta_->cluster->report(doubt.finding);
        break;
      }
  }
}

Clock Shadow::last_read(uint32_t index, int agent) const {
  if (is_local(agent)) return cells_.reads(index)[agent - first_];
  const Cell& cell = cells_[index];
  if (cell.others == Cell::Readers::one) return agent == cell.reader ? cell.read_since : 0;
  const int k = find(agent);
  return cell.others == Cell::Readers::rows && k < others_used_ ? others_[k].row(index)[agent % 8] : 0;
}

void Shadow::check_reads(const Actor& actor, uint32_t index, uint32_t number, uint16_t mask, Use use) const {
  int agent = 0;
  while (last_read(index, agent) <= actor.knowledge->seen.clocks[agent]) ++agent;
  const Cell& cell = cells_[index];
  const uint32_t line = agent == cell.reader ? cell.read_line : 0;  // only the last reader's is known
  const Kind kind = cta_->cluster->is_series(agent) ? Kind::in_flight : Kind::race;
  if (cta_->cluster->again(kind, line)) return;
  const uint32_t address = number * kGranule + __builtin_ctz(mask), bytes = __builtin_popcount(mask);
  report(kind, address,
         access_by("read", agent, line) + ", then " + access_by(verb(use), actor.agent, actor.line) + " of " +
             range(address, bytes) + (kind == Kind::in_flight ? ": nothing has waited for the first" : kUnordered),
         line);
}

}  // namespace gpuless
