/* What programs that embed Python begin with: start it, in the environment that pgemu is installed in, and look at
 * Python objects. C99 and C++11. */
#ifndef EMBEDDING_H
#define EMBEDDING_H

#include <pgemu.h>
#include <stdio.h>
#include <stdlib.h>

/* Start Python, of the virtual environment that is activated if one is. */
static inline void start_python(void)
{
    PyConfig config;
    PyStatus status = {};
    char python[4096];
    char const *environment = getenv("VIRTUAL_ENV");

    PyConfig_InitPythonConfig(&config);
    if (environment) {
        snprintf(python, sizeof python, "%s/bin/python3", environment);
        status = PyConfig_SetBytesString(&config, &config.program_name, python);
    }
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
}

/* Go on with what Python gave; end with its exception where it gave nothing. */
static inline PyObject *must(PyObject *found)
{
    if (!found) {
        PyErr_Print();
        exit(1);
    }
    return found;
}

/* Run lines of Python whose names are kept in `names`, a dict. */
static inline void run_python(char const *lines, PyObject *names)
{
    Py_DECREF(must(PyRun_String(lines, Py_file_input, names, names)));
}

/* The number that an expression has. */
static inline uint64_t number_of(char const *expression, PyObject *names)
{
    PyObject *found = must(PyRun_String(expression, Py_eval_input, names, names));
    uint64_t number = PyLong_AsUnsignedLongLong(found);

    Py_DECREF(found);
    if (PyErr_Occurred())
        must(NULL);
    return number;
}

/* The table of functions, and the machine that a name in `names` stands for. */
static inline pgemu_api const *must_import(void)
{
    pgemu_api const *api = pgemu_import();

    if (!api)
        must(NULL);
    return api;
}

static inline pgemu_machine *machine_of(char const *name, PyObject *names)
{
    PyObject *machine = PyDict_GetItemString(names, name);
    pgemu_machine *m = machine ? pgemu_handle(machine) : NULL;

    if (!m)
        must(NULL);
    return m;
}

#endif /* EMBEDDING_H */
