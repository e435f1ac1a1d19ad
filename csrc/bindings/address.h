// Tensors come as addresses.
#pragma once

#include <cstdint>

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
