"""What numba has no public way for: a cache with a stamp of our own, inner functions compiled once, less to ask twice.

Everything here leans on private interfaces of the pinned minor version of numba.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

from llvmlite.binding import Linkage
from numba import njit
from numba.core import caching, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.sigutils import normalize_signature
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import NativeLowering
from numba.core.types.functions import BaseFunction


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

    numba links every function's callees into it, optimises all and emits machine code, and does the three again in
    its callers. With hundreds of small functions that is most of the compile time.
    """

    def finalize(self) -> None:
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        """With all that it calls, for callers that numba compiles by itself."""
        if self._shared_module is None:
            module = self.own_module().clone()
            for library in called_libraries(self):
                module.link_in(module_of(library), preserve=True)
            self._shared_module = module
        return self._shared_module

    def own_module(self) -> Any:
        """Its function, as one that may come from several libraries and go where it is inlined everywhere."""
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.external:
                function.linkage = "linkonce_odr"
        return self._final_module


def called_libraries(library: Any) -> list[Any]:
    """The libraries of all that is called, callers first; other than inner ones contain what they call.

    LLVM leaves out a function that may come from several libraries where nothing linked before refers to it.
    """
    seen: set[Any] = set()
    found: list[Any] = []

    def visit(caller: Any) -> None:
        for called in caller._linking_libraries:
            if called not in seen:
                seen.add(called)
                if isinstance(called, InnerLibrary):
                    visit(called)
                found.append(called)

    visit(library)
    return found[::-1]


def module_of(library: Any) -> Any:
    return library.own_module() if isinstance(library, InnerLibrary) else library._get_module_for_linking()


class EntryLibrary(JITCodeLibrary):
    """Links each function that is called, however deep, once."""

    def finalize(self) -> None:
        for library in called_libraries(self):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(module_of(library), preserve=True)
        self._linking_libraries = []
        super().finalize()


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


class StepCompiler(InnerCompiler):
    """Inlined where the machine's parameters are constants, called where they are read (handle.py:MachineType)."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any,
                 locals: Any) -> None:  # fmt: skip
        flags.forceinline = not args[0].full
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


def inner_function(pipeline: type[InnerCompiler] = InnerCompiler, **options: Any) -> Callable[..., Any]:
    """Like njit(**options), for functions that only other compiled functions call."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(pipeline_class=pipeline, **options)(function)

        def compile(signature: Any) -> Any:
            """Dispatcher.compile() without what an inner function has no use for: timers, a cache, a C callable."""
            args, return_type = normalize_signature(signature)
            if args not in dispatcher.overloads:
                with dispatcher._compiling_counter:
                    dispatcher.overloads[args] = dispatcher._compiler.compile(args, return_type)
            return dispatcher.overloads[args].entry_point

        dispatcher.compile = compile
        return dispatcher

    return decorate


# Argument types whose meaning does not change: asked twice about them, numba's overload resolution says the same.
_PLAIN = (types.Number, types.Boolean, types.NoneType, types.Array, types.BaseTuple)

# (function type, context, flags, argument types) -> (signature, key of the implementation). The keys keep what they
# name alive, so that no other object takes its identity.
_signatures: dict[Any, tuple[Any, Any]] = {}

_resolve = BaseFunction.get_call_type


def _remembered_call_type(self: Any, context: Any, args: Any, kws: Any) -> Any:
    """numba's resolution of a call, asked once: for `a + b` it tries every one of a hundred templates each time."""
    if kws or not all(isinstance(argument, _PLAIN) for argument in args):
        return _resolve(self, context, args, kws)
    key = (_Same(self), _Same(context), _flags(), tuple(args))
    found = _signatures.get(key)
    if found is None:
        signature = _resolve(self, context, args, kws)
        if signature is None:
            return None
        found = _signatures[key] = signature, self._impl_keys[signature.args]
    signature, self._impl_keys[signature.args] = found[0], found[1]
    return signature


class _Same:
    """A key that equals itself only: types of functions compare by their templates, at length."""

    __slots__ = ("what",)

    def __init__(self, what: Any) -> None:
        self.what = what

    def __hash__(self) -> int:
        return id(self.what)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.what is other.what


def _flags() -> Any:
    """What the function being compiled hands down to overloads that are compiled for it."""
    flags = ConfigStack.top_or_none()
    return flags and tuple(sorted((name, str(value)) for name, value in flags._values.items()))


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Let numba compile with less to do: remembered signatures, no garbage collection. Within its compiler lock only.

    It makes millions of objects that stay, and the collector would go through all of them time and again.
    """
    collecting, resolving = gc.isenabled(), BaseFunction.get_call_type
    gc.disable()
    BaseFunction.get_call_type = _remembered_call_type
    try:
        yield
    finally:
        BaseFunction.get_call_type = resolving
        if collecting:
            gc.enable()


class EntryCompiler(Compiler):
    """numba's own pipeline, for functions that Python calls; all that they call is compiled within."""

    def compile_extra(self, func: Any) -> Any:
        self.state.library = EntryLibrary(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        with quick_compilation():
            return super().compile_extra(func)
