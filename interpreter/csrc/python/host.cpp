// The interpreter's parser of PTX and its number formats as Python objects. It is a pybind11 module, so a build serves
// one Python version only, and it is optional: no other library needs Python's C API (csrc/README.md).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "formats.h"
#include "ptx.h"

namespace gpuless {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Codes = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// f(a value of the format's layout).
template <class F>
auto with_layout(const std::string& format, F f) {
  if (format == "f16") return f(F16());
  if (format == "bf16") return f(Bf16());
  if (format == "tf32") return f(Tf32());
  if (format == "e4m3") return f(E4m3());
  if (format == "e5m2") return f(E5m2());
  throw py::value_error("the formats are f16, bf16, tf32, e4m3 and e5m2, not " + format);
}

Codes encode_all(const Floats& values, const std::string& format, Rounding mode, bool saturate, bool relu) {
  Codes codes(std::vector<py::ssize_t>(values.shape(), values.shape() + values.ndim()));
  with_layout(format, [&](auto layout) {
    for (py::ssize_t i = 0; i < values.size(); ++i)
      codes.mutable_data()[i] = encode<decltype(layout)>(values.data()[i], mode, saturate, relu);
  });
  return codes;
}

Floats decode_all(const Codes& codes, const std::string& format) {
  Floats values(std::vector<py::ssize_t>(codes.shape(), codes.shape() + codes.ndim()));
  with_layout(format, [&](auto layout) {
    for (py::ssize_t i = 0; i < codes.size(); ++i) values.mutable_data()[i] = decode<decltype(layout)>(codes.data()[i]);
  });
  return values;
}

ptx::Module parse(const std::string& text) {
  try {
    return ptx::parse(text);
  } catch (const ptx::SyntaxError& e) {
    throw py::value_error("PTX line " + std::to_string(e.line) + ": " + e.message);
  }
}

}  // namespace
}  // namespace gpuless

PYBIND11_MODULE(_host, m) {
  using namespace gpuless;
  namespace ptx = gpuless::ptx;
  m.doc() = "The syntax tree of PTX, and the number formats below fp32 with their roundings.";

  py::class_<ptx::Location>(m, "Location", "A line of source: `file` indexes Module.files.")
      .def_readonly("file", &ptx::Location::file)
      .def_readonly("line", &ptx::Location::line);
  py::class_<ptx::Variable>(m, "Variable")
      .def_readonly("name", &ptx::Variable::name)
      .def_readonly("bytes", &ptx::Variable::bytes)
      .def_readonly("alignment", &ptx::Variable::alignment);
  py::class_<ptx::Statement>(m, "Statement", "An instruction: `location` indexes Module.locations.")
      .def_readonly("opcode", &ptx::Statement::opcode)
      .def_readonly("line", &ptx::Statement::line)
      .def_readonly("location", &ptx::Statement::location)
      .def_property_readonly("predicated", [](const ptx::Statement& s) { return s.guard >= 0; })
      .def_property_readonly("operands", [](const ptx::Statement& s) { return s.operands.size(); });
  py::class_<ptx::Function>(m, "Function")
      .def_readonly("name", &ptx::Function::name)
      .def_readonly("entry", &ptx::Function::entry)
      .def_readonly("line", &ptx::Function::line)
      .def_readonly("parameters", &ptx::Function::parameters)
      .def_readonly("variables", &ptx::Function::variables)
      .def_readonly("body", &ptx::Function::body);
  py::class_<ptx::Module>(m, "Module")
      .def_readonly("version", &ptx::Module::version)
      .def_readonly("target", &ptx::Module::target)
      .def_readonly("files", &ptx::Module::files)
      .def_readonly("locations", &ptx::Module::locations)
      .def_readonly("variables", &ptx::Module::variables)
      .def_readonly("functions", &ptx::Module::functions);
  m.def("parse", &parse, py::arg("text"), "The syntax tree; ValueError with the line of what is no PTX.");

  py::enum_<Rounding>(m, "Rounding")
      .value("rn", Rounding::rn)
      .value("rna", Rounding::rna)
      .value("rz", Rounding::rz)
      .value("rm", Rounding::rm)
      .value("rp", Rounding::rp);
  m.def("encode", &encode_all, py::arg("values"), py::arg("format"), py::arg("mode") = Rounding::rn,
        py::arg("saturate") = false, py::arg("relu") = false, "The codes of fp32 values in a format.");
  m.def("decode", &decode_all, py::arg("codes"), py::arg("format"), "The fp32 values behind codes.");
}
