"""What numba has no public way for: a cache with a stamp of our own, and inner functions compiled once.

Everything here leans on private interfaces of the pinned minor version of numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from numba import njit
from numba.core import caching
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


def stamped_cache(stamp: Callable[[], str], missed: Callable[[], None]) -> type[caching.FunctionCache]:
    """A cache class whose entries are valid only for the current `stamp()`; `missed` is called before a compilation.

    numba's own locators keep the places (NUMBA_CACHE_DIR, beside the source, the user's cache).
    """

    def stamped(locator: type[Any]) -> type[Any]:
        class Stamped(locator):
            def get_source_stamp(self) -> str:
                return stamp()

        Stamped.__name__ = Stamped.__qualname__ = locator.__name__
        return Stamped

    locators = (caching.UserProvidedCacheLocator, caching.InTreeCacheLocator, caching.UserWideCacheLocator)

    class StampedCacheImpl(caching.CompileResultCacheImpl):
        _locator_classes: ClassVar[list[type[Any]]] = [stamped(locator) for locator in locators]

    class StampedCache(caching.FunctionCache):
        _impl_class = StampedCacheImpl

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            found = super().load_overload(sig, target_context)
            if found is None:
                missed()
            return found

    return StampedCache


class InnerLibrary(JITCodeLibrary):
    """Code of a function that is only ever linked into others: kept as it was lowered.

    numba optimises every function and emits machine code for it before it links it into its callers,
    where both are done again. With a hundred small functions that is most of the compile time.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class InnerLowering(NativeLowering):
    """Lower to LLVM IR and register the function for its callers, without machine code."""

    _name = "inner_lowering"

    def run_pass(self, state: Any) -> bool:
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        name = state.func_id.func_qualname
        if not state.flags.forceinline:
            # LLVM would copy it into each of its callers.
            state["library"].get_function(lowered.fndesc.mangled_name).add_function_attribute("noinline")

        def inner(*args: object) -> NoReturn:
            raise TypeError(f"{name} is an inner kernel: call it from an entry point")

        # Callers find the function by this key.
        state.targetctx.insert_user_function(inner, lowered.fndesc, [state["library"]])
        state["cr"] = lowered._replace(cfunc=inner)
        return True


class InnerCompiler(CompilerBase):
    """numba's nopython pipeline with `InnerLowering`."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any,
                 locals: Any) -> None:  # fmt: skip
        library = InnerLibrary(targetctx.codegen(), "inner")
        flags.no_cpython_wrapper = True
        flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)

    def define_pipelines(self) -> list[Any]:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (InnerLowering, text) if stage is NativeLowering else (stage, text) for stage, text in manager.passes
        ]
        manager._finalized = False
        manager.finalize()
        return [manager]


def inner_function(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Like njit(**options), for functions that only other compiled functions call."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(pipeline_class=InnerCompiler, **options)(function)

        def add_overload(compiled: Any) -> None:
            # Not into the C table of callables: there is no machine code to call.
            dispatcher.overloads[tuple(compiled.signature.args)] = compiled

        dispatcher.add_overload = add_overload
        return dispatcher

    return decorate
