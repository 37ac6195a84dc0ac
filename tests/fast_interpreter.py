"""Makes Triton's interpreter prepare `triton.language` once a launch, not at every call within it.

Each call of a device function, `tl.max` too, otherwise looks through all names of the language;
that is most of what an interpreted kernel takes.
"""

import triton.language as tl
from triton.runtime import interpreter


def install():
    """Has no effect where Triton's internals have other names."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared = set()

    def prepare_once(function):
        used = {id(each) for each in function.__globals__.values() if each is tl or each is tl.core}
        if used <= prepared:
            return interpreter._LangPatchScope()
        prepared.update(used)
        return prepare(function)

    def launch_afresh(self, *args, **kwargs):
        prepared.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            prepared.clear()

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launch_afresh
