// Which instruction sets this processor has.
#pragma once
#include <string>
#include <vector>

#include "args.h"

namespace sterna {
// Best first; the last one always runs.
std::vector<const KernelTable*> runnable_tables();
}  // namespace sterna
