"""Functions that only other compiled functions call: lowered to LLVM IR, linked into the entries that call them.

numba would compile each to machine code of its own, and make each able to raise: a call is twenty instructions then,
an item of an array thirty, and most of the time of a compilation goes into writing, reading and removing them. Here a
function returns its value, an array is an address and a length, and an item is one load. A build that checks bounds
has to raise, so it keeps numba's ways.

Leans on private interfaces of the pinned minor version of numba.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NoReturn

from llvmlite import ir as llvm
from llvmlite.binding import Linkage
from numba import njit
from numba.core import config, ir, types
from numba.core.callconv import CPUCallConv, TryStatus
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, _pass_registry, register_pass
from numba.core.cpu import CPUContext
from numba.core.errors import NumbaError
from numba.core.lowering import Lower
from numba.core.sigutils import normalize_signature
from numba.core.typed_passes import IRLegalization, NativeLowering, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes, WithLifting


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


def _parts(context: Any, kind: Any) -> Iterator[Any]:
    """The LLVM types that a value of a numba type is passed as: of an array, which is contiguous, data and length."""
    if isinstance(kind, types.BaseTuple):
        for item in kind:
            yield from _parts(context, item)
    elif isinstance(kind, types.Array):
        if kind.ndim != 1 or kind.layout != "C":
            raise NumbaError(f"{kind}: inner functions take arrays of one dimension, item after item")
        yield from (context.get_value_type(kind).elements[_field(context, kind, name)] for name in ("data", "nitems"))
    elif isinstance(kind, (types.NoneType, types.Omitted)):
        raise NumbaError("inner functions take every argument, and no None")
    else:
        yield context.get_value_type(kind)


def _taken_apart(context: Any, builder: Any, kind: Any, value: Any) -> Iterator[Any]:
    if isinstance(kind, types.BaseTuple):
        for index, item in enumerate(kind):
            yield from _taken_apart(context, builder, item, builder.extract_value(value, index))
    elif isinstance(kind, types.Array):
        yield from (builder.extract_value(value, _field(context, kind, name)) for name in ("data", "nitems"))
    else:
        yield value


def _put_together(context: Any, builder: Any, kind: Any, parts: Iterator[Any]) -> Any:
    if isinstance(kind, types.BaseTuple):
        return context.make_tuple(builder, kind, [_put_together(context, builder, item, parts) for item in kind])
    if isinstance(kind, types.Array):
        return array_value(context, builder, kind, *islice(parts, 2))
    return next(parts)


def _field(context: Any, kind: Any, name: str) -> int:
    position: int = context.data_model_manager[kind].get_field_position(name)
    return position


def array_value(context: Any, builder: Any, kind: Any, data: Any, length: Any) -> Any:
    """The value of a contiguous array of one dimension; no owner, so that nothing is counted."""
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    fields = [llvm.Constant(field, None) for field in context.get_value_type(kind).elements]
    for name, value in (("itemsize", size), ("strides", [size])):
        position = _field(context, kind, name)
        fields[position] = llvm.Constant(fields[position].type, value)
    array = llvm.Constant.literal_struct(fields)
    for name, value in (("nitems", length), ("data", data)):
        array = builder.insert_value(array, value, _field(context, kind, name))
    return builder.insert_value(array, length, [_field(context, kind, "shape"), 0])


def declared(context: Any, module: Any, descriptor: Any) -> Any:
    """The LLVM function of an inner function, in the module of a caller or in its own."""
    result = context.get_value_type(descriptor.restype)
    parts = [part for kind in descriptor.argtypes for part in _parts(context, kind)]
    function = get_or_insert_function(module, llvm.FunctionType(result, parts), descriptor.mangled_name)
    if descriptor.inline:
        function.attributes.add("alwaysinline")
    return function


def call_of(descriptor: Any, library: Any) -> Callable[..., Any]:
    """What numba is to do where the function is called."""

    def call(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = declared(context, builder.module, descriptor)
        taken = zip(descriptor.argtypes, values, strict=True)
        return builder.call(
            function, [part for kind, value in taken for part in _taken_apart(context, builder, kind, value)]
        )

    call.signature = descriptor.argtypes  # type: ignore[attr-defined]
    call.libs = (library,)  # type: ignore[attr-defined]
    return call


class NeverRaises(CPUCallConv):  # type: ignore[misc]
    """Calls of numba's own functions from a function that cannot raise. None of those that kernels call does."""

    def set_static_user_exc(self, *arguments: object, **options: object) -> None:
        """Nobody could read it."""

    def check_try_status(self, builder: Any) -> Any:
        return TryStatus(in_try=llvm.Constant(llvm.IntType(1), 0), excinfo=None)

    def return_status_propagate(self, builder: Any, status: Any) -> None:
        self._return_errcode_raw(builder, status.code)

    def _return_errcode_raw(self, builder: Any, code: Any) -> None:
        trap = llvm.FunctionType(llvm.VoidType(), ())
        builder.call(get_or_insert_function(builder.module, trap, "llvm.trap"), ())
        builder.unreachable()


class InnerContext(CPUContext):  # type: ignore[misc]
    """Where an inner function is lowered."""

    @property
    def call_conv(self) -> Any:
        return NeverRaises(self)


class CheckedLower(Lower):  # type: ignore[misc]
    """numba's lowering of instructions, without a text of each for a debugger."""

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


class InnerLower(CheckedLower):
    """The same for a function that returns its value, and reads and writes arrays without checks."""

    def init(self) -> None:
        super().init()
        self.context.__class__ = InnerContext  # a copy of numba's, for this function

    def _find_singly_assigned_variable(self) -> None:
        """What is assigned once is a value, no memory: its assignment comes before every use of it (ReconstructSSA)."""
        assigned = Counter(inst.target.name for block in self.blocks.values() for inst in block.find_insts(ir.Assign))
        self._singly_assigned_vars = {name for name, times in assigned.items() if times == 1}
        self._blk_local_varmap = {}

    def lower_function_body(self) -> Any:
        """Blocks in an order in which a block comes after those through which every path to it leads."""
        order = _reverse_postorder(self.blocks, self.firstblk)
        for offset in order:
            self.blkmap[offset] = self.function.append_basic_block(f"B{offset}")
        for offset in order:
            self.builder.position_at_end(self.blkmap[offset])
            self.lower_block(self.blocks[offset])
        return self.entry_block

    def storevar(self, value: Any, name: str, argidx: int | None = None) -> None:
        """Without a look at what was there, to give it back."""
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))

    def setup_function(self, descriptor: Any) -> None:
        self.function = declared(self.context, self.module, descriptor)
        self.entry_block = self.function.append_basic_block("entry")
        self.builder = llvm.IRBuilder(self.entry_block)
        self.call_helper = None

    def extract_function_arguments(self) -> Any:
        parts = iter(self.function.args)
        kinds = self.fndesc.argtypes
        self.fnargs = tuple(_put_together(self.context, self.builder, kind, parts) for kind in kinds)
        return self.fnargs

    def lower_inst(self, inst: Any) -> None:
        if isinstance(inst, ir.Return):
            self.builder.ret(self.loadvar(inst.value.name))
        elif isinstance(inst, ir.SetItem):
            self.lower_setitem(inst.target, inst.index, inst.value, self.fndesc.calltypes[inst])
        elif isinstance(inst, ir.StaticSetItem):
            self.lower_setitem(inst.target, inst.index_var, inst.value, self.fndesc.calltypes[inst])
        elif isinstance(inst, (ir.DynamicRaise, ir.StaticRaise)):
            raise NumbaError("inner functions return errors", loc=self.loc)
        else:
            super().lower_inst(inst)

    def lower_expr(self, resty: Any, expr: Any) -> Any:
        if expr.op == "static_getitem" and isinstance(self.typeof(expr.value.name), types.Array):
            return self.lower_getitem(resty, expr, expr.value, expr.index_var, self.fndesc.calltypes[expr])
        return super().lower_expr(resty, expr)

    def lower_getitem(self, resty: Any, expr: Any, value: Any, index: Any, signature: Any) -> Any:
        item = self._item(value, index, signature)
        if item is None:
            return super().lower_getitem(resty, expr, value, index, signature)
        return self.context.cast(self.builder, self.builder.load(item), signature.return_type, resty)

    def lower_setitem(self, target: Any, index: Any, value: Any, signature: Any) -> Any:
        item = self._item(target, index, signature)
        if item is None:
            return super().lower_setitem(target, index, value, signature)
        stored = self.loadvar(value.name)
        self.builder.store(
            self.context.cast(self.builder, stored, self.typeof(value.name), signature.args[0].dtype), item
        )
        return None

    def _item(self, array: Any, index: Any, signature: Any) -> Any:
        """The address of an item of numbers; None where numba has to work out which one or how it is kept."""
        kind, where = signature.args[:2]
        plain = isinstance(kind, types.Array) and kind.ndim == 1 and kind.layout == "C"
        if not (plain and isinstance(kind.dtype, types.Integer) and _counts_up(where)):
            return None
        position = self.context.cast(self.builder, self.loadvar(index.name), self.typeof(index.name), types.uint64)
        data = self.builder.extract_value(self.loadvar(array.name), _field(self.context, kind, "data"))
        return self.builder.gep(data, [position])


def _reverse_postorder(blocks: Any, first: int) -> list[int]:
    order: list[int] = []
    seen = {first}
    path = [(first, iter(blocks[first].terminator.get_targets()))]
    while path:
        offset, targets = path[-1]
        target = next((target for target in targets if target not in seen), None)
        if target is None:
            order.append(offset)
            path.pop()
        else:
            seen.add(target)
            path.append((target, iter(blocks[target].terminator.get_targets())))
    return order[::-1]


def _counts_up(index: Any) -> bool:
    """Whether an index of this type is never counted from an array's end."""
    if isinstance(index, types.IntegerLiteral):
        return bool(index.literal_value >= 0)
    return isinstance(index, types.Integer) and not index.signed


@register_pass(mutates_CFG=True, analysis_only=False)
class InnerLowering(NativeLowering):  # type: ignore[misc]
    """Lower to LLVM IR and register the function for its callers, without machine code."""

    _name = "inner_lowering"

    @property
    def lowering_class(self) -> Any:
        return CheckedLower if config.BOUNDSCHECK else InnerLower

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
        if config.BOUNDSCHECK:
            state.targetctx.insert_user_function(inner, lowered.fndesc, [state["library"]])
        else:
            call = call_of(lowered.fndesc, state["library"])
            state.targetctx.insert_func_defn([(call, inner, call.signature)])
        state["cr"] = lowered._replace(cfunc=inner)
        return True


# Kernels have no closures, no `with`, no expressions of whole arrays, nothing to delete: no reference counting.
_NEEDLESS = (InlineClosureLikes, IRLegalization, NopythonRewrites, WithLifting)


class InnerPasses(PassManager):  # type: ignore[misc]
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


class InnerCompiler(CompilerBase):  # type: ignore[misc]
    """numba's nopython pipeline with `InnerLowering`."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any,
                 locals: Any) -> None:  # fmt: skip
        library = InnerLibrary(targetctx.codegen(), "inner")
        flags.no_cpython_wrapper = True
        flags.no_cfunc_wrapper = True
        if not config.BOUNDSCHECK:
            flags.error_model = "numpy"  # which does not raise
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
