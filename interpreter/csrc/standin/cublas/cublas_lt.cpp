// cuBLASLt's names: descriptions of products, one algorithm for all of them, and the product.
#include <cstdio>
#include <cstring>
#include <string>

#include "gemm.h"

using namespace gpuless::standin;
using namespace gpuless::standin::cublas;

namespace {

struct Layout {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t ld;
  int32_t order = 0, batch = 1;
  int64_t stride = 0;
};

struct Description {
  int32_t compute, scale;
  int32_t pointers = 0, operation_a = kNormal, operation_b = kNormal, epilogue = 1;
  const void* bias = nullptr;
  int32_t bias_type = -1;
  int64_t bias_stride = 0;
  void* aux = nullptr;
  int64_t aux_ld = 0, aux_stride = 0;
  int32_t aux_type = -1;
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

struct Field {
  int attribute;
  void* value;
  size_t bytes;
};
// Sets the field that an attribute is, or refuses one that is none.
template <size_t N>
int set(const char* name, const Field (&fields)[N], int attribute, const void* value, size_t bytes) {
  for (const Field& f : fields) {
    if (f.attribute != attribute) continue;
    if (bytes != f.bytes) return kInvalidValue;
    std::memcpy(f.value, value, bytes);
    return kSuccess;
  }
  return refuse(name, ("attribute " + std::to_string(attribute)).c_str());
}

#define FIELD(attribute, member) {attribute, &member, sizeof(member)}
// How the epilogues are made up (cublasLtEpilogue_t).
enum { kDefault = 1, kRelu = 2, kBias = 4, kGelu = 32, kGeluGradient = 64, kAux = 128 };

int read_epilogue(const char* name, const Description& description, const Layout& d, Product* p) {
  const int e = description.epilogue;
  const bool is_known =
      e == kDefault || !(e & ~(kRelu | kBias)) || !(e & ~(kGelu | kBias | kAux)) || e == (kGeluGradient | kAux);
  if (!is_known) return refuse(name, ("cublasLtEpilogue_t " + std::to_string(e)).c_str());
  if (e & kRelu) p->activation = Product::relu;
  if (e & kGelu) p->activation = Product::gelu;
  if (e & kGeluGradient) p->activation = Product::gelu_gradient;
  const auto type = [&](int32_t given_type) {
    return given_type < 0 ? d.type : static_cast<cudaDataType_t>(given_type);
  };
  if (e & kBias) p->bias = {description.bias, type(description.bias_type), 0, description.bias_stride};
  if (e & kAux) p->aux = {description.aux, type(description.aux_type), description.aux_ld, description.aux_stride};
  if ((e & kBias && !p->bias.data) || (e & kAux && !p->aux.data)) {
    std::fprintf(stderr, "%s: the epilogue needs a pointer that was not set\n", name);
    return kInvalidValue;
  }
  return kSuccess;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) {
  *handle = new int(0);
  return kSuccess;
}
int cublasLtDestroy(void* handle) {
  delete static_cast<int*>(handle);
  return kSuccess;
}
size_t cublasLtGetVersion() { return 130000; }

int cublasLtMatrixLayoutCreate(Layout** layout, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld) {
  *layout = new Layout{type, rows, columns, ld};
  return kSuccess;
}
int cublasLtMatrixLayoutDestroy(const Layout* layout) {
  delete layout;
  return kSuccess;
}
int cublasLtMatrixLayoutSetAttribute(Layout* l, int attribute, const void* value, size_t bytes) {
  const Field fields[] = {FIELD(0, l->type), FIELD(1, l->order), FIELD(2, l->rows),  FIELD(3, l->columns),
                          FIELD(4, l->ld),   FIELD(5, l->batch), FIELD(6, l->stride)};
  return set("cublasLtMatrixLayoutSetAttribute", fields, attribute, value, bytes);
}

int cublasLtMatmulDescCreate(Description** description, int compute, cudaDataType_t scale) {
  *description = new Description{compute, scale};
  return kSuccess;
}
int cublasLtMatmulDescDestroy(const Description* description) {
  delete description;
  return kSuccess;
}
int cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value, size_t bytes) {
  int32_t about_speed;  // how many multiprocessors to use
  const Field fields[] = {FIELD(0, d->compute),     FIELD(1, d->scale),        FIELD(2, d->pointers),
                          FIELD(3, d->operation_a), FIELD(4, d->operation_b),  FIELD(7, d->epilogue),
                          FIELD(8, d->bias),        FIELD(10, d->bias_stride), FIELD(11, d->aux),
                          FIELD(12, d->aux_ld),     FIELD(13, d->aux_stride),  FIELD(15, about_speed),
                          FIELD(22, d->aux_type),   FIELD(26, d->bias_type)};
  return set("cublasLtMatmulDescSetAttribute", fields, attribute, value, bytes);
}

int cublasLtMatmulPreferenceCreate(void** preference) { return cublasLtCreate(preference); }
int cublasLtMatmulPreferenceDestroy(void* preference) { return cublasLtDestroy(preference); }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return kSuccess; }  // all about speed

int cublasLtMatmulAlgoGetHeuristic(void*, const Description*, const Layout*, const Layout*, const Layout*,
                                   const Layout*, void*, int requested, Heuristic* results, int* count) {
  *count = requested > 0;
  if (requested > 0) results[0] = {{}, 0, kSuccess, 1, {}};
  return requested > 0 ? kSuccess : kInvalidValue;
}

int cublasLtMatmul(void*, const Description* x, const void* alpha, const void* a_data, const Layout* a,
                   const void* b_data, const Layout* b, const void* beta, const void* c_data, const Layout* c,
                   void* d_data, const Layout* d, const void*, void*, size_t, cudaStream_t stream) {
  constexpr const char* name = "cublasLtMatmul";
  for (const Layout* l : {a, b, c, d})
    if (l->order) return refuse(name, "matrices that do not lie by columns");
  if (x->pointers > 1) return refuse(name, "a vector of alphas");
  const bool fits = is_double(x->compute)    ? x->scale == CUDA_R_64F
                    : is_integer(x->compute) ? x->scale == CUDA_R_32I
                                             : x->scale == CUDA_R_32F;
  if (!fits) return refuse(name, "scalars of another type than the sums");
  const bool a_normal = x->operation_a == kNormal, b_normal = x->operation_b == kNormal;
  Product p;
  p.m = static_cast<int64_t>(d->rows), p.n = static_cast<int64_t>(d->columns), p.batch = d->batch;
  p.k = static_cast<int64_t>(a_normal ? a->columns : a->rows);
  const bool agrees = (a_normal ? a->rows : a->columns) == d->rows && (b_normal ? b->columns : b->rows) == d->columns &&
                      (b_normal ? b->rows : b->columns) == static_cast<uint64_t>(p.k);
  if (!agrees) {
    std::fprintf(stderr, "%s: the rows and columns of a, b and d do not fit each other\n", name);
    return kInvalidValue;
  }
  p.operation_a = x->operation_a, p.operation_b = x->operation_b, p.compute = x->compute;
  p.alpha = alpha, p.beta = beta;
  const auto matrix = [](const void* data, const Layout* l) { return Matrix{data, l->type, l->ld, l->stride}; };
  p.a = matrix(a_data, a), p.b = matrix(b_data, b), p.c = matrix(c_data, c), p.d = matrix(d_data, d);
  const int error = read_epilogue(name, *x, *d, &p);
  return error ? error : multiply(name, p, stream);
}

}  // extern "C"
