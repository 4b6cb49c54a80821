"""Makes Triton's interpreter find the functions that it replaces once, and not at every call.

It replaces the functions of `triton.language` at every launch, and again whenever a jitted function calls another; each
time it lists all members of five modules and classes, which is a third of the time of an interpreted kernel. What is
replaced, and by what, stays as it is.

It also computes every sum and product of 32-bit integers once more in 64 bits to see whether they overflow. The numbers
of the tests are small, and products with program ids are looked for in the source (`tests/kernels/test_source.py`):
that is left to the runs of all cases.
"""

import dataclasses
import functools
import inspect

from triton import language as tl
from triton.runtime import interpreter

_PACKAGES = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)


def install(*, check_overflow):
    """Replace functions of the interpreter, before the first kernel is launched."""
    builtins = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in _PACKAGES
    }
    patch_language, of_numbers = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
    of_pointers = interpreter._get_np_dtype(tl.pointer_type(tl.int8))

    def np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return of_pointers if isinstance(element, tl.pointer_type) else of_numbers(element)

    def patch_builtin(package, builder, scope):
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_lang(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()  # called by a kernel that runs
        return patch_language(function)

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=check_overflow)
    interpreter._get_np_dtype = np_dtype
    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch_lang
