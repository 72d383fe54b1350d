"""A script of the driver's API by ctypes, as libraries that open libcuda.so.1 use it.

usage: driver_script.py load|link|nvrtc [past] [libnvrtc]
"""

import ctypes
import sys

N = 1000
SOURCE = b"""extern "C" __global__ void twice(float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = 2 * x[i];
}
"""
#: What NVRTC makes of it, shortened.
PTX = b"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 x, .param .u32 n)
{
  .reg .pred %p; .reg .b32 %i, %n, %b, %d, %t; .reg .b64 %x; .reg .f32 %f;
  ld.param.u64 %x, [x];
  ld.param.u32 %n, [n];
  mov.u32 %b, %ctaid.x;
  mov.u32 %d, %ntid.x;
  mov.u32 %t, %tid.x;
  mad.lo.s32 %i, %b, %d, %t;
  setp.ge.s32 %p, %i, %n;
  @%p bra end;
  mad.wide.s32 %x, %i, 4, %x;
  ld.global.f32 %f, [%x];
  add.f32 %f, %f, %f;
  st.global.f32 [%x], %f;
end:
  ret;
}
"""
driver = ctypes.CDLL("libcuda.so.1")


def call(name, *arguments):
    code = getattr(driver, name)(*arguments)
    assert code == 0, f"{name} returned {code}"


def pointer():
    return ctypes.c_void_p()


def linked(ptx):
    state, code, size = pointer(), pointer(), ctypes.c_size_t()
    call("cuLinkCreate_v2", 0, None, None, ctypes.byref(state))
    call("cuLinkAddData_v2", state, 1, ptx, ctypes.c_size_t(len(ptx)), b"", 0, None, None)
    assert driver.cuLinkAddData_v2(state, 1, ptx, ctypes.c_size_t(len(ptx)), b"", 0, None, None) == 801  # a second text
    call("cuLinkComplete", state, ctypes.byref(code), ctypes.byref(size))
    copy = ctypes.string_at(code, size.value)
    call("cuLinkDestroy", state)
    assert copy == ptx + b"\0"
    return copy


def compiled(library):
    nvrtc, program, size = ctypes.CDLL(library), pointer(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"twice.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"--gpu-architecture=compute_80", b"-lineinfo")
    assert nvrtc.nvrtcCompileProgram(program, 2, options) == 0
    assert nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetPTX(program, text) == 0
    return text.value


def main(how, *rest):
    table = ctypes.c_void_p(1)
    assert driver.cuGetExportTable(ctypes.byref(table), bytes(16)) == 500 and not table.value
    call("cuInit", 0)
    context, module, function, memory = pointer(), pointer(), pointer(), ctypes.c_uint64()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    code = {"load": lambda: PTX, "link": lambda: linked(PTX), "nvrtc": lambda: compiled(rest[-1])}[how]()
    call("cuModuleLoadData", ctypes.byref(module), code)
    call("cuModuleGetFunction", ctypes.byref(function), module, b"twice")
    x = (ctypes.c_float * N)(*range(N))
    call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(4 * N))
    call("cuMemcpyHtoD_v2", memory, x, ctypes.c_size_t(4 * N))
    arguments = [memory, ctypes.c_int(N + 1 if "past" in rest else N)]
    places = (ctypes.c_void_p * 2)(*(ctypes.addressof(a) for a in arguments))
    call("cuLaunchKernel", function, 8, 1, 1, 128, 1, 1, 0, None, places, None)
    call("cuCtxSynchronize")
    call("cuMemcpyDtoH_v2", x, memory, ctypes.c_size_t(4 * N))
    assert list(x) == [2 * i for i in range(N)]
    print("PASS")


if __name__ == "__main__":
    main(*sys.argv[1:])
