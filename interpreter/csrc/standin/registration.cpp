// What nvcc's host code calls before main and at <<<>>>.
#include <vector>

#include "standin.h"

using namespace gpuless::standin;

namespace {

struct Pending {  // between <<<>>> and the host stub; launches nest when an argument launches too
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
std::vector<Pending>& pending() {
  thread_local std::vector<Pending> stack;
  return stack;
}

struct Managed {  // a __managed__ variable: host code goes through a pointer
  void** image;
  void** pointer;
};
std::vector<Managed>& managed() {
  static std::vector<Managed> all;
  return all;
}

}  // namespace

namespace gpuless::standin {

gpuless_launch_config config_of(dim3 grid, dim3 block, size_t shared) {
  gpuless_launch_config c{};
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  for (int d = 0; d < 3; ++d) c.grid[d] = g[d], c.block[d] = b[d], c.cluster[d] = 1;
  c.dynamic_shared = static_cast<int64_t>(shared);
  return c;
}

cudaError_t launch(const void* host, const gpuless_launch_config& config, void** args, cudaStream_t stream) {
  if (!gpuless_capturing()) return finish(gpuless_launch(host, &config, args));
  gpuless_kernel_properties p;
  if (const int error = gpuless_kernel(host, &p)) return finish(error);
  std::vector<std::vector<char>> values;  // the arguments' values of now
  for (int i = 0; i < p.parameters; ++i) {
    int64_t offset, bytes;
    if (const int error = gpuless_kernel_parameter(host, i, &offset, &bytes)) return finish(error);
    values.emplace_back(static_cast<char*>(args[i]), static_cast<char*>(args[i]) + bytes);
  }
  return keep_or_do(stream, [=]() mutable {
    std::vector<void*> pointers;
    for (auto& k : values) pointers.push_back(k.data());
    return finish(gpuless_launch(host, &config, pointers.data()));
  });
}

cudaError_t read_config(const cudaLaunchConfig_t& from, gpuless_launch_config& to) {
  to = config_of(from.gridDim, from.blockDim, from.dynamicSmemBytes);
  for (unsigned k = 0; k < from.numAttrs; ++k) {
    const auto& value = from.attrs[k].val;
    switch (from.attrs[k].id) {
      case cudaLaunchAttributeClusterDimension:
        to.cluster[0] = value.clusterDim.x;
        to.cluster[1] = value.clusterDim.y;
        to.cluster[2] = value.clusterDim.z;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        to.programmatic = value.programmaticStreamSerializationAllowed != 0;
        break;
      case cudaLaunchAttributeCooperative:
        to.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributeAccessPolicyWindow:  // the following are about speed alone
      case cudaLaunchAttributeSynchronizationPolicy:
      case cudaLaunchAttributeClusterSchedulingPolicyPreference:
      case cudaLaunchAttributePriority:
      case cudaLaunchAttributeMemSyncDomain:
      case cudaLaunchAttributeMemSyncDomainMap:
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
        break;
      default:
        return unsupported("a launch attribute other than cluster, cooperative or programmatic stream serialization");
    }
  }
  return cudaSuccess;
}

}  // namespace gpuless::standin

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(gpuless_image_register(wrapper)); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** image) { gpuless_image_unregister(image); }

void __cudaRegisterFunction(void** image, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  gpuless_kernel_register(image, host, name);
}
void __cudaRegisterVar(void** image, char* host, char*, const char* name, int, size_t, int, int) {
  gpuless_variable_register(image, host, name);
}
void __cudaRegisterManagedVar(void** image, void** pointer, char*, const char* name, int, size_t, int, int) {
  gpuless_variable_register(image, pointer, name);
  managed().push_back({image, pointer});
}
char __cudaInitModule(void** image) {
  int error = 0;
  for (const Managed& m : managed()) {
    int64_t bytes;
    if (m.image == image && !error) error = gpuless_variable(m.pointer, m.pointer, &bytes);
  }
  return finish(error) == cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pending().push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (pending().empty()) return finish(cudaErrorMissingConfiguration);
  const Pending p = pending().back();
  pending().pop_back();
  *grid = p.grid;
  *block = p.block;
  *shared = p.shared;
  *static_cast<cudaStream_t*>(stream) = p.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* host) { return __cudaGetKernel(kernel, host); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, config_of(grid, block, shared), args, stream);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  return launch(host, config_of(grid, block, shared), args, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  gpuless_launch_config config = config_of(grid, block, shared);
  config.cooperative = 1;
  return launch(host, config, args, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* from, const void* host, void** args) {
  gpuless_launch_config config;
  const cudaError_t error = read_config(*from, config);
  return error ? error : launch(host, config, args, from->stream);
}

}  // extern "C"

ALSO(__cudaLaunchKernel_ptsz, __cudaLaunchKernel);
ALSO(cudaLaunchKernel_ptsz, cudaLaunchKernel);
ALSO(cudaLaunchCooperativeKernel_ptsz, cudaLaunchCooperativeKernel);
ALSO(cudaLaunchKernelExC_ptsz, cudaLaunchKernelExC);
