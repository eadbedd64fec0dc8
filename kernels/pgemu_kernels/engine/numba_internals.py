"""What numba has no public way for: a cache with a stamp of our own, inner functions compiled once, less to ask twice.

Everything here leans on private interfaces of the pinned minor version of numba.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from llvmlite.binding import Linkage
from numba import njit
from numba.core import caching, cgutils, event, ir, serialize, transforms, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompilerBase, CompileResult, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, _pass_registry, register_pass
from numba.core.cpu import CPUContext
from numba.core.environment import Environment
from numba.core.errors import NumbaError
from numba.core.funcdesc import _dynamic_modname
from numba.core.lowering import Lower
from numba.core.postproc import PostProcessor, VariableLifetime
from numba.core.sigutils import normalize_signature
from numba.core.targetconfig import ConfigStack
from numba.core.typed_passes import AnnotateTypes, IRLegalization, NativeLowering, NopythonRewrites
from numba.core.types.functions import BaseFunction
from numba.core.typing import Context as TypingContext
from numba.core.untyped_passes import InlineClosureLikes, WithLifting
from numba.extending import intrinsic

from pgemu_kernels.engine import machine_code


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
        except Exception:  # whole, but no machine code of ours
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


def reduced(result: Any) -> tuple[Any, ...]:
    """What of a compile result is needed to call it: not its bitcode, which numba would parse each time."""
    descriptor = result.fndesc
    descriptor.typemap = descriptor.calltypes = None
    library = result.library
    return library.name, library._get_compiled_object(), descriptor, result.signature, list(result.environment.consts)


def rebuilt(target_context: Any, name: str, machine_code: bytes, descriptor: Any, signature: Any, consts: Any) -> Any:
    """The compile result for what `reduced` gave, without its modules: whoever runs kernels needs none of them."""
    library = target_context.codegen().create_library(name)
    library.enable_object_caching()
    library._set_compiled_object(machine_code)
    library._finalize_final_module()
    names = (descriptor.llvm_func_name, descriptor.llvm_cpython_wrapper_name, descriptor.env_name)
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


def address_of(dispatcher: Any) -> int:
    """Where the code of a dispatcher's only signature begins, for call_address()."""
    (result,) = dispatcher.overloads.values()
    address: int = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    if not address:
        raise RuntimeError(f"no machine code of {result.fndesc.llvm_func_name}")
    return address


@intrinsic(prefer_literal=False)
def call_address(typingctx: Any, address: Any, arguments: Any) -> Any:
    """call_address(address, (argument, ...)): call the function, which takes them and returns int64, there."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = tuple(signature.args[1])
        kind = context.call_conv.get_function_type(types.int64, kinds)
        function = builder.inttoptr(values[0], kind.as_pointer())
        unpacked = cgutils.unpack_tuple(builder, values[1], len(kinds))
        status, result = context.call_conv.call_function(builder, function, types.int64, kinds, unpacked)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return types.int64(address, arguments), generate


class InnerLibrary(JITCodeLibrary):
    """Code of a function that is only ever linked into others: kept as it was lowered.

    numba links every function's callees into it, optimises all and emits machine code, and does the three again in
    its callers. With hundreds of small functions that is most of the compile time.
    """

    def finalize(self) -> None:
        self._finalized = True

    def _optimize_functions(self, module: Any) -> None:
        """Not by itself: where it is inlined it is optimised with its caller."""
        module.data_layout = self._codegen._data_layout

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

    def _optimize_final_module(self) -> None:
        """numba's, less the round of passes before it prunes reference counting: kernels have none."""
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


class InnerLower(Lower):
    """numba's lowering of the instructions, without a text of each for a debugger."""

    def lower_block(self, block: Any) -> None:
        try:
            for inst in block.body:
                self.loc = inst.loc
                if isinstance(inst, ir.Assign):
                    self.storevar(self.lower_assign(self.typeof(inst.target.name), inst), inst.target.name)
                else:
                    self.lower_inst(inst)
        except Exception as error:
            error.add_note(f"lowering {inst} of {self.fndesc.qualname} at {self.loc}")
            raise


@register_pass(mutates_CFG=True, analysis_only=False)
class InnerLowering(NativeLowering):
    """Lower to LLVM IR and register the function for its callers, without machine code."""

    _name = "inner_lowering"
    lowering_class = InnerLower

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


# Kernels have no closures, no `with`, no expressions of whole arrays, nothing to delete: no reference counting.
_NEEDLESS = (AnnotateTypes, InlineClosureLikes, IRLegalization, NopythonRewrites, WithLifting)


class InnerPasses(PassManager):
    """A list of passes, run without an event, timers, a text of the arguments and a check of the whole for each."""

    def run(self, state: Any) -> None:
        for kind, description in self.passes:
            stage = _pass_registry.get(kind).pass_inst
            stage.analysis = self._analysis
            try:
                stage.run_initialization(state)
                stage.run_pass(state)
                stage.run_finalizer(state)
            except NumbaError as error:
                raise self._patch_error(f"Failed in inner function (step: {description})", error) from None


_inner_passes: list[InnerPasses] = []  # the same for every function


class InnerCompiler(CompilerBase):
    """numba's nopython pipeline with `InnerLowering`."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any,
                 locals: Any) -> None:  # fmt: skip
        library = InnerLibrary(targetctx.codegen(), "inner")
        flags.no_cpython_wrapper = True
        flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)

    def define_pipelines(self) -> list[Any]:
        if not _inner_passes:
            manager = InnerPasses("inner")
            manager.passes = [
                (InnerLowering, text) if stage is NativeLowering else (stage, text)
                for stage, text in DefaultPassBuilder.define_nopython_pipeline(self.state).passes
                if stage not in _NEEDLESS
            ]
            manager.finalize()
            _inner_passes.append(manager)
        return _inner_passes


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


# What numba does once more for every function, and what stands in for it.
_QUICK = (
    (BaseFunction, "get_call_type", _remembered_call_type),
    (PostProcessor, "run", _remembering_less),
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


class EntryCompiler(Compiler):
    """numba's own pipeline, for functions that Python calls; all that they call is compiled within."""

    def compile_extra(self, func: Any) -> Any:
        self.state.library = EntryLibrary(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        with quick_compilation():
            return super().compile_extra(func)
