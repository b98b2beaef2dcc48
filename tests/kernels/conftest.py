"""Fixtures of the kernels' tests."""

import functools
from dataclasses import replace

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter without what costs it two thirds of its time: ``triton.language`` is patched once for each
    module and launch, not at every call of a device function; types are looked up once; integers are not tried for
    overflow, as they are not on a GPU."""
    patch, patched = pytest.MonkeyPatch(), set()
    try:
        from triton.runtime import interpreter

        patch_language, nothing = interpreter._patch_lang, interpreter._LangPatchScope
        launch, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder
        options = replace(builder.options, sanitize_overflow=False)
        pointer, find_dtype = interpreter.tl.pointer_type, interpreter._get_np_dtype
    except (ImportError, AttributeError, TypeError):  # no Triton, or another's internals: slower
        yield
        return

    known = functools.cache(find_dtype)

    def known_dtype(dtype):
        scalar = dtype.scalar
        return find_dtype(scalar) if isinstance(scalar, pointer) else known(scalar)

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return nothing()  # there is nothing to restore
        patched.add(module)
        return patch_language(function)

    def launch_anew(executor, *args, **kwargs):
        patched.clear()  # a launch restores what it patched
        return launch(executor, *args, **kwargs)

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter, "_get_np_dtype", known_dtype)
    patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
    patch.setattr(builder, "options", options)
    yield
    patch.undo()
