// Marks where an inference begins and ends, for an emulator that counts instructions.
//
// The mark is prctl(2) with an option number that no kernel knows: it fails with EINVAL and changes nothing, and a
// qemu plugin sees it among the system calls.

#ifndef EDGEOPT_MARK_HPP_
#define EDGEOPT_MARK_HPP_

#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace edgeopt {

constexpr int kMarkOption = 0x45444F50;  // "EDOP"
constexpr unsigned long kMarkEnd = 0, kMarkBegin = 1;

// Marks its own lifetime, where asked to and on Linux.
class Mark {
 public:
  explicit Mark(bool wanted) : wanted_(wanted) { tell(kMarkBegin); }
  ~Mark() { tell(kMarkEnd); }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;

 private:
  void tell(unsigned long which) const {
#ifdef __linux__
    if (wanted_) prctl(kMarkOption, which, 0UL, 0UL, 0UL);
#else
    static_cast<void>(which);
#endif
  }

  const bool wanted_;
};

}  // namespace edgeopt

#endif  // EDGEOPT_MARK_HPP_
