// Says what the CPU tells its programs that it can: AT_HWCAP and AT_HWCAP2 of the auxiliary vector, in hexadecimal.
// Built for aarch64 Linux when the emulator is set up, and run on every CPU that it can be.

#include <sys/auxv.h>

#include <cstdio>

int main() {
  std::printf("%lx %lx\n", getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
  return 0;
}
