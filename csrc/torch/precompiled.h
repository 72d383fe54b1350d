// What nearly every file of the C++ compiler's includes, compiled once (setup.py): without it a file takes .6 s longer.
// Each includes what it needs all the same.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <vector>
