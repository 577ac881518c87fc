#include "bindings.h"

namespace megalrps {

void bind_word_pieces(pybind11::module_&) {}

}  // namespace megalrps
