// What the Triton backend's launches are told apart by (moe_kernels/backends/triton/launching.py): some 30 arguments
// each, which Python takes 3 us to look at. Python's own interface: pybind11's counts references five times as slowly.
#pragma once
#include <pybind11/pybind11.h>

namespace moe {

// Return (values, key) of launch_key(arguments, parameters, options, tensor, descriptor): a dictionary, names of
// parameters, names that may be missing, two types. The values are those of the parameters, in their order; the key
// differs where Triton would compile anew: of a tensor its dtype, and whether its address is a multiple of 16; of a
// descriptor its `kind`; of anything else type and value.
inline PyObject* launch_key(PyObject*, PyObject* const* args, Py_ssize_t given) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  static PyObject* const kind = PyUnicode_InternFromString("kind");
  if (given != 5 || !PyDict_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]))
    return PyErr_Format(PyExc_TypeError, "launch_key: expected a dict, two tuples of names, two types");
  PyObject *arguments = args[0], *parameters = args[1], *options = args[2];
  const auto tensor = reinterpret_cast<PyTypeObject*>(args[3]), descriptor = reinterpret_cast<PyTypeObject*>(args[4]);
  const Py_ssize_t count = PyTuple_GET_SIZE(parameters), more = PyTuple_GET_SIZE(options);
  PyObject *values = PyTuple_New(count), *key = PyTuple_New(2 * count + more), *both = nullptr;
  Py_ssize_t taken = count;
  if (!values || !key) goto end;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = PyDict_GetItemWithError(arguments, PyTuple_GET_ITEM(parameters, i));
    if (!value) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, PyTuple_GET_ITEM(parameters, i));
      goto end;
    }
    Py_INCREF(value);
    PyTuple_SET_ITEM(values, i, value);
    PyObject *first, *second;
    if (PyType_IsSubtype(Py_TYPE(value), tensor)) {
      PyObject* address = PyObject_CallMethodNoArgs(value, data_ptr);
      if (!address) goto end;
      second = PyBool_FromLong(PyLong_AsUnsignedLongLong(address) % 16 == 0);
      Py_DECREF(address);
      first = PyObject_GetAttr(value, dtype);
    } else if (Py_TYPE(value) == descriptor) {
      second = Py_NewRef(Py_None);
      first = PyObject_GetAttr(value, kind);
    } else {
      second = Py_NewRef(value);
      first = Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(value)));
    }
    PyTuple_SET_ITEM(key, 2 * i, first);
    PyTuple_SET_ITEM(key, 2 * i + 1, second);
    if (!first) goto end;
  }
  for (Py_ssize_t i = 0; i < more; ++i) {
    PyObject* value = PyDict_GetItemWithError(arguments, PyTuple_GET_ITEM(options, i));
    taken += value != nullptr;
    PyTuple_SET_ITEM(key, 2 * count + i, Py_NewRef(value ? value : Py_None));
  }
  if (taken == PyDict_GET_SIZE(arguments))
    both = PyTuple_Pack(2, values, key);
  else if (PyObject* names = PyDict_Keys(arguments)) {
    PyErr_Format(PyExc_TypeError, "arguments: got %R, expected the parameters %R", names, parameters);
    Py_DECREF(names);
  }
end:
  Py_XDECREF(values);
  Py_XDECREF(key);
  return both;
}

}  // namespace moe
