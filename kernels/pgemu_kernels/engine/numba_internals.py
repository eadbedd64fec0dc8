"""What numba has no public way for: a cache with a stamp of our own, inner functions compiled once, less to ask twice.

Everything here leans on private interfaces of the pinned minor version of numba.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

from llvmlite import ir
from llvmlite.binding import Linkage
from numba import njit
from numba.core import base, caching, cgutils, event, serialize, transforms, types
from numba.core.callconv import CPUCallConv
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.cpu import CPUContext
from numba.core.environment import Environment
from numba.core.funcdesc import _dynamic_modname
from numba.core.postproc import PostProcessor, VariableLifetime
from numba.core.sigutils import normalize_signature
from numba.core.targetconfig import ConfigStack
from numba.core.types.functions import BaseFunction
from numba.core.typing import Context as TypingContext
from numba.extending import intrinsic

from pgemu_kernels.engine import machine_code
from pgemu_kernels.engine.inner_functions import called_libraries, module_of


class KernelCache(caching._Cache):  # type: ignore[misc]
    """numba's interface of a cache, over the files of machine_code.py. `missed` is called before a compilation."""

    def __init__(self, name: str, stamp: Callable[[], str], missed: Callable[[str], None]) -> None:
        self.name = name
        self._stamp = stamp
        self._missed = missed

    @property
    def cache_path(self) -> str:
        return str(machine_code.writable())

    def enable(self) -> None:
        """It always is: numba's interface."""

    disable = flush = enable

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Of numba's `_Cache`: the compile result, None if there is none."""
        found = self.load(sig, target_context)
        if found is None:
            self._missed(self.name)
        return found

    def load(self, sig: Any, target_context: Any) -> Any:
        """The same, of an entry that is compiled elsewhere."""
        target_context.refresh()
        contents = machine_code.read(self._stamp(), self._file(sig, target_context))
        if contents is None:
            return None
        try:
            return rebuilt(target_context, *pickle.loads(contents))
        except Exception as error:  # whole, but no machine code of ours
            machine_code.say_once(f"compiled kernels are not understood, and not used ({type(error).__name__})")
            return None

    def has(self, sig: Any, target_context: Any) -> bool:
        """Whether `load` would find it."""
        return machine_code.read(self._stamp(), self._file(sig, target_context)) is not None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Of numba's `_Cache`."""
        machine_code.write(self._stamp(), self._file(sig, data.target_context), serialize.dumps(reduced(data)))

    def _file(self, sig: Any, target_context: Any) -> str:
        """Of the entry for argument types and for a processor."""
        arguments, _ = normalize_signature(sig)
        key = repr((list(map(str, arguments)), target_context.codegen().magic_tuple()))
        return f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


library_of = attrgetter("library")  # the code of a compile result


def reduced(result: Any) -> tuple[Any, ...]:
    """What of a compile result is needed to call it: not its bitcode, which numba would parse each time."""
    descriptor = result.fndesc
    descriptor.typemap = descriptor.calltypes = None
    library = library_of(result)
    return library.name, library._get_compiled_object(), descriptor, result.signature, list(result.environment.consts)


def rebuilt(target_context: Any, name: str, machine_code: bytes, descriptor: Any, signature: Any, consts: Any) -> Any:
    """The compile result for what `reduced` gave, without its modules: whoever runs kernels needs none of them."""
    library = target_context.codegen().create_library(name)
    library.enable_object_caching()
    library._set_compiled_object(machine_code)
    library._finalize_final_module()
    names = (
        *(descriptor.llvm_func_name, descriptor.env_name),
        *(descriptor.llvm_cpython_wrapper_name, descriptor.llvm_cfunc_wrapper_name),
    )
    library.codegen._engine._defined_symbols.update(names)
    environment = Environment({})
    environment.env_name = descriptor.env_name
    environment.consts.extend(consts)
    descriptor.modname = _dynamic_modname
    return CompileResult(
        typing_context=target_context.typing_context, target_context=target_context,
        entry_point=target_context.get_executable(library, descriptor, environment), typing_error=None,
        type_annotation="", signature=signature, objectmode=False, lifted=(), fndesc=descriptor, library=library,
        call_helper=None, environment=environment, metadata=None, reload_init=(), referenced_envs=(),
    )  # fmt: skip


def compiled_elsewhere(function: Callable[..., Any], obtain: Callable[[Any], Any], **options: Any) -> Any:
    """A dispatcher that stands for another one: `obtain(argument types)` gives compile results, from wherever."""
    dispatcher = njit(**options)(function)

    def compile(signature: Any) -> Any:
        """Dispatcher.compile()"""
        arguments, _ = normalize_signature(signature)
        found = dispatcher.overloads.get(arguments)
        if found is None:
            found = obtain(arguments)
            dispatcher.add_overload(found)
        return found.entry_point

    dispatcher.compile = compile
    return dispatcher


def address_of(dispatcher: Any, for_c: bool = False) -> int:
    """Where the code of a dispatcher's only signature begins, for call_address(), or for C's calling convention."""
    (result,) = dispatcher.overloads.values()
    name = result.fndesc.llvm_cfunc_wrapper_name if for_c else result.fndesc.llvm_func_name
    address: int = library_of(result).get_pointer_to_function(name)
    if not address:
        raise RuntimeError(f"no machine code of {name}")
    return address


@intrinsic(prefer_literal=False)
def call_address(typingctx: Any, address: Any, arguments: Any) -> Any:
    """call_address(address, (argument, ...)): call the function, which takes them and returns int64, there."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = tuple(signature.args[1])
        convention = CPUCallConv(context)
        kind = convention.get_function_type(types.int64, kinds)
        function = builder.inttoptr(values[0], kind.as_pointer())
        unpacked = cgutils.unpack_tuple(builder, values[1], len(kinds))
        status, result = convention.call_function(builder, function, types.int64, kinds, unpacked)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return types.int64(address, arguments), generate


class EntryLibrary(JITCodeLibrary):
    """Links each function that is called, however deep, once."""

    def finalize(self) -> None:
        for library in called_libraries(self):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(module_of(library), preserve=True)
        # Entries that were compiled by different processes have the same names for different functions: where machine
        # code is linked, no name is to be seen.
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = "private"
        self._linking_libraries = []
        super().finalize()

    def _optimize_final_module(self) -> None:
        """numba's, less the round of passes before it prunes reference counting: kernels have none."""
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


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


_post_process = PostProcessor.run


def _remembering_less(self: Any, emit_dels: bool = False, extend_lifetimes: bool = False) -> None:
    """numba's PostProcessor.run(): nine passes ask for it, but the lifetimes of variables matter to the last only."""
    if emit_dels or self.func_ir.is_generator:
        _post_process(self, emit_dels, extend_lifetimes)
        return
    self.func_ir.blocks = transforms.canonicalize_cfg(self.func_ir.blocks)
    self.func_ir.variable_lifetime = VariableLifetime(self.func_ir.blocks)  # it computes what it is asked for
    self.func_ir.generator_info = None


def _nothing(*args: object, **options: object) -> None:
    """Of what is done for nobody."""


def _install_known_registries(self: Any) -> None:
    """CPUContext.load_additional_registries(), less the import of thirty modules: that came before any kernel."""
    for registry in list(self._registries):
        self.install_registry(registry)


_has_location = cache(base._has_loc)  # it looks at a function's signature, for every call that is lowered


# What numba does once more for every function, and what stands in for it.
_QUICK = (
    (BaseFunction, "get_call_type", _remembered_call_type),
    (PostProcessor, "run", _remembering_less),
    (base, "_has_loc", _has_location),
    (event, "start_event", _nothing),  # nobody listens
    (event, "end_event", _nothing),
    (CPUContext, "load_additional_registries", _install_known_registries),
    (TypingContext, "load_additional_registries", _install_known_registries),
)


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Let numba compile with less to do, and without a garbage collector. Within its compiler lock only.

    It makes millions of objects that stay, and the collector would go through all of them time and again.
    """
    collecting = gc.isenabled()
    usual = [getattr(owner, name) for owner, name, _ in _QUICK]
    gc.disable()
    for owner, name, quick in _QUICK:
        setattr(owner, name, quick)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(_QUICK, usual, strict=True):
            setattr(owner, name, function)
        if collecting:
            gc.enable()


class CLibrary(EntryLibrary):
    """C enters the function itself: numba's wrapper, which would call it, has it inlined."""

    def add_ir_module(self, module: Any) -> None:
        if module.name == "cfunc_wrapper":
            calls = [line for wrapper in module.functions for block in wrapper.blocks for line in block.instructions]
            for attributes in (line.attributes for line in calls if isinstance(line, ir.CallInstr)):
                if "noinline" in attributes:
                    attributes.remove("noinline")
                    attributes.add("alwaysinline")
        super().add_ir_module(module)


class EntryCompiler(Compiler):
    """numba's own pipeline, for functions that Python calls; all that they call is compiled within."""

    library_class: type[EntryLibrary] = EntryLibrary

    def compile_extra(self, func: Any) -> Any:
        library = self.state["library"] = self.library_class(self.state.targetctx.codegen(), func.__qualname__)
        library.enable_object_caching()
        with quick_compilation():
            return super().compile_extra(func)


class CFunctionCompiler(EntryCompiler):
    """The same for functions that C calls."""

    library_class = CLibrary
