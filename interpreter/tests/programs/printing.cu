// printf, once by the host and once by a kernel: the lines have to be the same.
#include <cuda_runtime.h>

#include <cstdio>

__host__ __device__ void speak() {
  char text[8];
  for (int i = 0; i < 7; ++i) text[i] = static_cast<char>('a' + i);
  text[7] = 0;
  const int n = -42;
  const unsigned u = 3000000000u;
  const long long wide = -(1ll << 40);
  const double d = 3.14159265358979;
  printf("plain, %% and a lonely %d\n", n);
  printf("[%5d] [%-5d] [%05d] [%+d] [% d] [%.3d] [%*d] [%-*d|\n", n, n, n, 7, 7, 7, 8, n, 8, n);
  printf("[%u] [%x] [%#X] [%o] [%i]\n", u, u, u, u, n);
  printf("[%lld] [%ld] [%llu] [%lx] [%zu] [%td] [%jd]\n", wide, static_cast<long>(wide), 1ull << 63, 255l, sizeof(d),
         static_cast<long>(-3), static_cast<long>(-4));
  printf("[%hd] [%hhd] [%hu] [%hhu]\n", 70000, 300, 70000u, 300u);
  printf("[%f] [%.0f] [%10.3e] [%G] [%g] [%a] [%E]\n", d, d, d, 1e-10, 1e10, 0.5, -d);
  printf("[%f] [%f] [%5.1f]\n", 1.0 / 0.0, -1.0 / 0.0, static_cast<double>(2.25f));
  printf("[%c%c] [%s] [%10s] [%-10s] [%.3s]\n", 'o', 'k', text, "right", "left", "cut off");
  printf("%d %s %f %d %lld %c %f\n", 1, "two", 3.0, 4, 5ll, '6', 7.0);
}

__global__ void on_device() { speak(); }

int main(int argc, char**) {
  if (argc == 1) {
    speak();
    return 0;
  }
  on_device<<<1, 1>>>();
  return cudaDeviceSynchronize();
}
