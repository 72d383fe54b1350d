// Images: fat binaries as nvcc's host code registers them, their kernels and variables by host address, and launches.
#include <algorithm>
#include <charconv>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

#include "core.h"
#include "device.h"
#include "zstandard.h"

namespace gpuless {
namespace {

// The layout of fatbinary_section.h and of what fatbinary(1) writes.
struct Wrapper {
  uint32_t magic, version;  // version 2: linked device code
  const uint8_t* data;
  const void* names;
};
constexpr uint32_t kWrapperMagic = 0x466243b1, kMagic = 0xba55ed50;
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, reserved;
  uint16_t minor, major;
  uint32_t arch;
  uint64_t name, flags;
};
constexpr uint16_t kPtx = 1;
constexpr uint64_t kSpecific = 0x100000, kLz4 = 0x2000, kZstandard = 0x8000;  // sm_90a; how it is compressed

struct Ptx {
  int arch;
  bool specific, lz4, zstandard;
  std::string_view text;  // as it stands in the image, without the padding
  std::string name() const { return std::to_string(arch) + (specific ? "a" : ""); }
};

struct Image {
  std::vector<Ptx> ptx;
  std::string holds;  // for messages: "sm_80, sm_90a, compute_80 (compressed by LZ4)"
  bool linked = false;
  std::map<std::string, std::unique_ptr<Module>> modules;  // by the device's architecture, loaded at the first use
  std::string loaded;                                      // what was loaded at run time, if it was
  std::set<std::string> names;  // of kernels and variables that were asked for: their addresses stand for host's
};

struct Kernel {
  Image* image;
  std::string name;
  int64_t max_dynamic_shared = 0;  // 0: what is left of the 48 KB that need no permission
  bool nonportable_clusters = false;
};
struct Variable {
  Image* image;
  std::string name;
};

struct Registry {
  std::mutex mutex;
  std::vector<std::unique_ptr<Image>> images;
  std::unordered_map<const void*, Kernel> kernels;
  std::unordered_map<const void*, Variable> variables;
};
Registry& registry() {
  static auto* r = new Registry;  // never destroyed: images unregister themselves at exit
  return *r;
}

template <class T>
T value_at(const void* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

void read_fat_binary(Image& image, const uint8_t* data) {
  const auto header = value_at<Header>(data);
  if (header.magic != kMagic) return;
  const uint8_t *cursor = data + header.header_bytes, *end = cursor + header.bytes;
  while (cursor < end) {
    const auto e = value_at<Entry>(cursor);
    const Ptx p{static_cast<int>(e.arch),
                (e.flags & kSpecific) != 0,
                (e.flags & kLz4) != 0,
                (e.flags & kZstandard) != 0,
                {reinterpret_cast<const char*>(cursor + e.header_bytes),
                 e.compressed_bytes ? e.compressed_bytes : static_cast<size_t>(e.bytes)}};
    if (e.kind == kPtx) image.ptx.push_back(p);
    image.holds += (image.holds.empty() ? "" : ", ") + std::string(e.kind == kPtx ? "compute_" : "sm_") + p.name() +
                   (e.kind == kPtx && p.lz4 ? " (compressed by LZ4)" : "");
    cursor += e.header_bytes + e.bytes;
  }
}

void read(Image& image, const Wrapper& wrapper) {
  image.linked = wrapper.version != 1;
  if (wrapper.magic == kWrapperMagic) read_fat_binary(image, wrapper.data);
}

[[noreturn]] void refuse(const std::string& message) {
  Finding f;
  f.kind = Kind::unsupported;
  f.message = message;
  f.arch = current_device() ? current_device()->arch : "";
  throw f;
}

void read_ptx(Image& image, const char* text) {
  image.loaded = text;
  const size_t target = image.loaded.find(".target sm_");
  if (target == std::string::npos) refuse("what was loaded is no PTX: there is no .target sm_ in it");
  int arch = 0;
  const char* const digits = image.loaded.data() + target + std::strlen(".target sm_");
  const auto end = std::from_chars(digits, image.loaded.data() + image.loaded.size(), arch).ptr;
  image.ptx.push_back({arch, *end == 'a', false, false, image.loaded});
  image.holds = "compute_" + image.ptx.back().name();
}

// Whatever cuModuleLoadData takes.
void read_any(Image& image, const void* code) {
  constexpr uint32_t kElf = 0x464c457f;
  const auto magic = value_at<uint32_t>(code);  // of the shortest text, too: ".ver"
  if (magic == kElf)
    refuse("what was loaded is a cubin, and the interpreter runs PTX: load the PTX that it was made of");
  if (magic == kWrapperMagic) return read(image, *static_cast<const Wrapper*>(code));
  if (magic == kMagic) return read_fat_binary(image, static_cast<const uint8_t*>(code));
  read_ptx(image, static_cast<const char*>(code));
}

// The PTX that the driver would compile for the device if there were no cubin: one for it alone (sm_90a, sm_120a), else
// the highest portable one.
const Ptx* choose(const Image& image, const Device& device) {
  const int arch = device.major * 10 + device.minor;
  const Ptx* best = nullptr;
  for (const Ptx& p : image.ptx) {
    if (p.specific && p.arch == arch) return &p;
    if (!p.specific && p.arch <= arch && (!best || p.arch > best->arch)) best = &p;
  }
  return best;
}

[[noreturn]] void refuse(const Image& image, const Device& device) {
  const std::string arch = device.arch + 3;
  refuse("the program holds no PTX that the interpreter can run on " + std::string(device.arch) + ", only " +
         (image.holds.empty() ? "nothing" : image.holds) + "; compile it with -gencode=arch=compute_" + arch +
         ",code=compute_" + arch + " --compress-mode=none" + (image.linked ? " and without -rdc=true" : ""));
}

std::string text_of(const Ptx& ptx) {
  if (!ptx.zstandard) return std::string(ptx.text);
  std::string problem;
  if (auto text = decompress_zstandard(ptx.text, &problem)) return *std::move(text);
  refuse("the program's PTX is compressed, and " + problem + ", or compile with --compress-mode=none");
}

// Called with the registry locked. Throws a Finding.
Module& module_for(Image& image, const Device& device) {
  const auto loaded = image.modules.find(device.arch);
  if (loaded != image.modules.end()) return *loaded->second;
  const Ptx* ptx = choose(image, device);
  if (!ptx || ptx->lz4) refuse(image, device);
  auto module = load(text_of(*ptx));
  for (const auto& [name, g] : module->globals) storage().add(g.address, g.bytes, name, g.constant);
  return *image.modules.emplace(device.arch, std::move(module)).first->second;
}

void drop(Image& image) {
  for (const auto& [arch, module] : image.modules)
    for (const auto& [name, g] : module->globals) storage().remove(g.address);
  image.modules.clear();
}

struct DeviceKernel {
  Kernel* kernel;
  Module* module;
  Code* code;
  const Device* device;
};

// What is known of a kernel on the device; 0, or the error and an unfinished result. Called with the registry locked.
int find(const void* host, DeviceKernel& result) {
  const auto k = registry().kernels.find(host);
  if (k == registry().kernels.end()) return cuda::kInvalidDeviceFunction;
  result.kernel = &k->second;
  result.device = current_device();
  if (!result.device) return cuda::kNoDevice;
  try {
    result.module = &module_for(*result.kernel->image, *result.device);
  } catch (const Finding& f) {
    return report(f, cuda::kNoKernelImageForDevice);
  }
  const auto code = result.module->functions.find(result.kernel->name);
  if (code == result.module->functions.end()) return cuda::kInvalidDeviceFunction;
  result.code = &code->second;
  return cuda::kSuccess;
}

int64_t max_dynamic_shared(const DeviceKernel& f) {
  return f.kernel->max_dynamic_shared ? f.kernel->max_dynamic_shared
                                      : f.device->shared_per_block - f.code->shared_bytes;
}

int blocks_of(const DeviceKernel& f, int threads, int64_t dynamic_shared) {
  if (threads > static_cast<int>(max_threads(*f.code->source)) || dynamic_shared > max_dynamic_shared(f)) return 0;
  return resident_blocks(*f.device, *f.code, threads, f.code->shared_bytes + dynamic_shared);
}

// A name's address in the image, for a kernel or variable that has it; null: there is none. Called with the registry
// locked.
const void* host_address(Image& image, const char* name, bool kernel) {
  const Device* device = current_device();
  if (!device) return nullptr;
  const Module& module = module_for(image, *device);
  const auto code = module.functions.find(name);
  const bool is_kernel = code != module.functions.end() && code->second.source->entry;
  if (kernel ? !is_kernel : !module.globals.count(name)) return nullptr;
  return &*image.names.insert(name).first;
}

int threads_of(const gpuless_launch_config& c) { return static_cast<int>(c.block[0] * c.block[1] * c.block[2]); }

}  // namespace
}  // namespace gpuless

using namespace gpuless;

extern "C" {

void* gpuless_image_register(const void* wrapper) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* {
    auto image = std::make_unique<Image>();
    read(*image, *static_cast<const Wrapper*>(wrapper));
    const std::lock_guard lock(registry().mutex);
    registry().images.push_back(std::move(image));
    return registry().images.back().get();
  });
}

void gpuless_image_unregister(void* handle) {
  guarded([&] {
    Registry& r = registry();
    const std::lock_guard lock(r.mutex);
    const auto erase = [&](auto& map) {
      for (auto i = map.begin(); i != map.end();) i = i->second.image == handle ? map.erase(i) : std::next(i);
    };
    erase(r.kernels);
    erase(r.variables);
    const auto image = std::find_if(r.images.begin(), r.images.end(), [&](const auto& i) { return i.get() == handle; });
    if (image == r.images.end()) return;
    drop(**image);
    r.images.erase(image);
  });
}

void gpuless_kernel_register(void* image, const void* host, const char* name) {
  guarded([&] {
    const std::lock_guard lock(registry().mutex);
    registry().kernels[host] = {static_cast<Image*>(image), name};
  });
}

void gpuless_variable_register(void* image, const void* host, const char* name) {
  guarded([&] {
    const std::lock_guard lock(registry().mutex);
    registry().variables[host] = {static_cast<Image*>(image), name};
  });
}

int gpuless_image_load(const void* code, void** handle) {
  return guarded([&]() -> int {
    *handle = nullptr;
    const Device* device = current_device();
    if (!device) return cuda::kNoDevice;
    auto image = std::make_unique<Image>();
    try {
      read_any(*image, code);
    } catch (const Finding& f) {
      return report(f, cuda::kInvalidKernelImage);
    }
    const std::lock_guard lock(registry().mutex);
    try {
      module_for(*image, *device);
    } catch (const Finding& f) {
      return report(f, choose(*image, *device) ? cuda::kInvalidPtx : cuda::kNoKernelImageForDevice);
    }
    *handle = image.get();
    registry().images.push_back(std::move(image));
    return cuda::kSuccess;
  });
}

int gpuless_image_kernel(void* image, const char* name, const void** host) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    *host = host_address(*static_cast<Image*>(image), name, true);
    if (!*host) return cuda::kSymbolNotFound;
    registry().kernels.try_emplace(*host, Kernel{static_cast<Image*>(image), name});
    return cuda::kSuccess;
  });
}

int gpuless_image_variable(void* image, const char* name, const void** host) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    *host = host_address(*static_cast<Image*>(image), name, false);
    if (!*host) return cuda::kSymbolNotFound;
    registry().variables.try_emplace(*host, Variable{static_cast<Image*>(image), name});
    return cuda::kSuccess;
  });
}

int gpuless_variable(const void* host, void** address, int64_t* bytes) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    const auto v = registry().variables.find(host);
    if (v == registry().variables.end()) return cuda::kInvalidSymbol;
    const Device* device = current_device();
    if (!device) return cuda::kNoDevice;
    try {
      const Module& module = module_for(*v->second.image, *device);
      const auto global = module.globals.find(v->second.name);
      if (global == module.globals.end()) return cuda::kInvalidSymbol;
      *address = global->second.address;
      *bytes = global->second.bytes;
    } catch (const Finding& f) {
      return report(f, cuda::kNoKernelImageForDevice);
    }
    return cuda::kSuccess;
  });
}

int gpuless_kernel(const void* host, gpuless_kernel_properties* p) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    DeviceKernel f{};
    if (const int error = find(host, f)) return error;
    const ptx::Function& source = *f.code->source;
    *p = {};
    p->name = f.kernel->name.c_str();
    p->static_shared = f.code->shared_bytes;
    for (const auto& v : source.variables) p->local += v.space == ptx::Space::local ? v.bytes : 0;
    for (const auto& [name, g] : f.module->globals) p->constant += g.constant ? g.bytes : 0;
    p->max_dynamic_shared = max_dynamic_shared(f);
    p->max_threads = static_cast<int>(max_threads(source));
    p->registers = assumed_registers(*f.device, source);
    p->parameters = static_cast<int>(source.parameters.size());
    std::copy(source.cluster, source.cluster + 3, p->cluster);
    p->nonportable_clusters = f.kernel->nonportable_clusters;
    return cuda::kSuccess;
  });
}

int gpuless_kernel_parameter(const void* host, int index, int64_t* offset, int64_t* bytes) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    DeviceKernel f{};
    if (const int error = find(host, f)) return error;
    const auto& parameters = f.code->source->parameters;
    if (index < 0 || index >= static_cast<int>(parameters.size())) return cuda::kInvalidValue;
    for (int k = 0, end = 0; k <= index; ++k) {
      const int alignment = std::max(parameters[k].alignment, 1);
      *offset = (end + alignment - 1) / alignment * alignment;
      *bytes = parameters[k].bytes;
      end = static_cast<int>(*offset + *bytes);
    }
    return cuda::kSuccess;
  });
}

int gpuless_kernel_allow_shared(const void* host, int64_t bytes) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    DeviceKernel f{};
    if (const int error = find(host, f)) return error;
    if (bytes < 0 || bytes + f.code->shared_bytes > f.device->shared_per_block_optin)
      return refuse(cuda::kInvalidValue, shared_words(*f.device, *f.code, bytes));
    f.kernel->max_dynamic_shared = bytes;
    return cuda::kSuccess;
  });
}

int gpuless_kernel_allow_nonportable_clusters(const void* host, int allow) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    DeviceKernel f{};
    if (const int error = find(host, f)) return error;
    f.kernel->nonportable_clusters = allow != 0;
    return cuda::kSuccess;
  });
}

int gpuless_occupancy(const void* host, int threads, int64_t dynamic_shared, int* blocks) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    DeviceKernel f{};
    if (const int error = find(host, f)) return error;
    if (threads < 1 || dynamic_shared < 0)
      return refuse(cuda::kInvalidValue, "blocks of " + std::to_string(threads) + " threads with " +
                                             std::to_string(dynamic_shared) + " bytes of dynamic shared memory");
    *blocks = blocks_of(f, threads, dynamic_shared);
    return cuda::kSuccess;
  });
}

int gpuless_cluster_occupancy(const void* host, const gpuless_launch_config* c, int* largest, int* clusters) {
  return guarded([&]() -> int {
    const std::lock_guard lock(registry().mutex);
    DeviceKernel f{};
    if (const int error = find(host, f)) return error;
    const int blocks = blocks_of(f, threads_of(*c), c->dynamic_shared);
    const int size = static_cast<int>(c->cluster[0] * c->cluster[1] * c->cluster[2]);
    const int limit = f.kernel->nonportable_clusters ? kLargestCluster : kPortableCluster;
    *largest = 0;
    for (int n = 1; n <= limit; n *= 2)
      if (resident_clusters(*f.device, blocks, n)) *largest = n;
    if (size > limit)
      return refuse(cuda::kInvalidClusterSize,
                    "a cluster of " + std::to_string(size) + " blocks: " + std::to_string(limit) + " are allowed");
    *clusters = resident_clusters(*f.device, blocks, size);
    return cuda::kSuccess;
  });
}

int gpuless_launch(const void* host, const gpuless_launch_config* config, void** args) {
  return guarded([&]() -> int {
    if (drops_launch()) return cuda::kSuccess;
    DeviceKernel f{};
    {
      const std::lock_guard lock(registry().mutex);
      if (const int error = find(host, f)) return error;
      if (const int64_t most = std::max<int64_t>(0, max_dynamic_shared(f)); config->dynamic_shared > most)
        return refuse(cuda::kInvalidValue, shared_words(*f.device, *f.code, config->dynamic_shared) + ", of them " +
                                               std::to_string(most) +
                                               " dynamic ones by default, or as "
                                               "cudaFuncAttributeMaxDynamicSharedMemorySize was set");
      if (config->programmatic && !f.device->clusters)
        return refuse(cuda::kNotSupported, std::string("programmatic stream serialisation, which ") + f.device->arch +
                                               " has not: from sm_90 on");
      const uint64_t grid = static_cast<uint64_t>(config->grid[0]) * config->grid[1] * config->grid[2];
      const uint64_t at_once =
          static_cast<uint64_t>(f.device->multiprocessors) * blocks_of(f, threads_of(*config), config->dynamic_shared);
      if (config->cooperative && grid > at_once)
        return refuse(cuda::kCooperativeLaunchTooLarge, "a cooperative launch of " + std::to_string(grid) +
                                                            " blocks, and at most " + std::to_string(at_once) +
                                                            " of this kernel run at once on " + f.device->arch);
    }
    const auto arguments = [args](const Code& code) {
      std::vector<uint8_t> parameters(code.own_param_bytes);
      for (size_t k = 0; k < code.parameters.size(); ++k)
        std::memcpy(&parameters[code.parameters[k].offset], args[k], code.parameters[k].bytes);
      return parameters;
    };
    return launch(*f.module, f.code->name, *config, arguments,
                  f.kernel->nonportable_clusters ? kLargestCluster : kPortableCluster);
  });
}

}  // extern "C"
