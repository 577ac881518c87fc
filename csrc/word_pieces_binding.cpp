#include "word_pieces.h"

#include <memory>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace megalrps {

namespace {

std::string_view utf8_of(py::handle text) {
    if (!PyUnicode_Check(text.ptr())) throw py::type_error("every text must be a str");
    Py_ssize_t size = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (bytes == nullptr) throw py::error_already_set();
    return {bytes, static_cast<size_t>(size)};
}

std::unique_ptr<WordPieces> make(const py::list& texts, const Array<float>& scores, const Array<int32_t>& ids,
                                 const Array<int32_t>& byte_ids, bool prefix, size_t memory_bytes) {
    const auto score_view = flat_view(scores, "scores");
    const auto id_view = flat_view(ids, "ids");
    if (score_view.size() != texts.size() || id_view.size() != texts.size()) {
        throw py::value_error("a piece needs one text, one score and one id");
    }
    std::vector<ScoredPiece> pieces;
    for (size_t i = 0; i < texts.size(); ++i) {
        pieces.push_back({std::string(utf8_of(texts[i])), score_view[i], id_view[i]});
    }
    const auto byte_view = flat_view(byte_ids, "byte_ids");
    py::gil_scoped_release unlocked;
    return std::make_unique<WordPieces>(pieces, byte_view, prefix, memory_bytes);
}

py::tuple encode(WordPieces& words, const py::iterable& texts) {
    // The tuple keeps the texts alive, whatever happens to the list meanwhile.
    const py::tuple kept(texts);
    std::vector<std::string_view> views;
    for (const py::handle text : kept) views.push_back(utf8_of(text));
    Array<int64_t> lengths(views.size());
    int64_t* const length = lengths.mutable_data();
    auto ids = std::make_unique<std::vector<int32_t>>();
    {
        py::gil_scoped_release unlocked;
        for (size_t i = 0; i < views.size(); ++i) {
            const size_t before = ids->size();
            words.encode(views[i], *ids);
            length[i] = static_cast<int64_t>(ids->size() - before);
        }
    }
    const std::vector<int32_t>& found = *ids;
    const py::capsule owner(ids.release(), [](void* vector) { delete static_cast<std::vector<int32_t>*>(vector); });
    return py::make_tuple(py::array_t<int32_t>(found.size(), found.data(), owner), lengths);
}

}  // namespace

void bind_word_pieces(py::module_& module) {
    py::class_<WordPieces>(module, "WordPieces", "Byte-pair encoding by the scores of pieces, word by word.")
        .def(py::init(&make), py::arg("texts"), py::arg("scores"), py::arg("ids"), py::arg("byte_ids"), py::kw_only(),
             py::arg("prefix"), py::arg("memory_bytes"),
             "texts: str of each piece; scores, ids: [pieces]; byte_ids: [256]; prefix: a space goes before each text; "
             "memory_bytes: for words seen.")
        .def("encode", &encode, py::arg("texts"),
             "(tokens int32 [T], lengths int64 [texts]) of an iterable of str, without the GIL.");
}

}  // namespace megalrps
