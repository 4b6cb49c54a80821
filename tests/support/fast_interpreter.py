"""Makes Triton's interpreter find the functions that it replaces once, and not at every call.

It replaces the functions of `triton.language` at every launch, and again whenever a jitted function calls another; each
time it lists all members of five modules and classes, which is a third of the time of an interpreted kernel. What is
replaced, and by what, stays as it is.
"""

import inspect

from triton import language as tl
from triton.runtime import interpreter

_PACKAGES = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)


def install():
    """Replace two functions of the interpreter, before the first kernel is launched."""
    builtins = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in _PACKAGES
    }
    patch_language = interpreter._patch_lang

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

    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch_lang
