// The driver's linker. The interpreter runs PTX, so what it makes of one PTX text is this text, for cuModuleLoadData.
#include <fstream>
#include <sstream>
#include <string>

#include "driver.h"

using namespace gpuless::standin;

struct CUlinkState_st {
  std::string ptx;
  bool has_input = false;
};

namespace {

CUresult add(CUlinkState state, CUjitInputType type, std::string text) {
  if (type != CU_JIT_INPUT_PTX)
    return driver([] { return unsupported("cuLink of anything but PTX, as the interpreter runs PTX alone,"); });
  if (state->has_input) return driver([] { return unsupported("cuLink of several PTX texts"); });
  state->ptx = std::move(text);
  state->has_input = true;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuLinkCreate(unsigned, CUjit_option*, void**, CUlinkState* state) {
  *state = new CUlinkState_st;
  return CUDA_SUCCESS;
}
CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void* data, size_t bytes, const char*, unsigned,
                       CUjit_option*, void**) {
  const std::string text(static_cast<const char*>(data), bytes);
  return add(state, type, text.c_str());  // up to its NUL, which `bytes` may count
}
CUresult cuLinkAddFile(CUlinkState state, CUjitInputType type, const char* path, unsigned, CUjit_option*, void**) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::ostringstream text;
  text << file.rdbuf();
  return add(state, type, text.str());
}
CUresult cuLinkComplete(CUlinkState state, void** code, size_t* bytes) {
  if (!state->has_input) return CUDA_ERROR_INVALID_VALUE;
  *code = state->ptx.data();
  if (bytes) *bytes = state->ptx.size() + 1;  // callers copy so many, and load the copy: it needs its NUL
  return CUDA_SUCCESS;
}
CUresult cuLinkDestroy(CUlinkState state) {
  delete state;
  return CUDA_SUCCESS;
}

}  // extern "C"
