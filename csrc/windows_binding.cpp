#include "bindings.h"

namespace megalrps {

void bind_windows(pybind11::module_&) {}

}  // namespace megalrps
