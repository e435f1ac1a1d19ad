// Working memory of the threads.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

namespace expander {

// Scratch of every thread, allocated by the thread that uses it (first touch), on 64-byte boundaries.
class ScratchPool {
 public:
  ScratchPool(int threads, size_t bytes) : bytes_(bytes), parts_(static_cast<size_t>(threads)) {}

  void* of(int slot) {
    auto& part = parts_[static_cast<size_t>(slot)];
    if (part == nullptr) part.reset(::operator new(bytes_ + 64, std::align_val_t{64}));
    return part.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  size_t bytes_;
  std::vector<std::unique_ptr<void, Free>> parts_;
};

}  // namespace expander
